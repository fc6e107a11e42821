"""What a search adds to trials of a minute: its driver's processor time, and a trial's time outside training.

    python benchmarks/overhead.py [--out results.json] [--trials 6] [--seconds 60] [--epochs 60]

The training is a sleep, an epoch at a time, so that all processor time is the search's own; reports, rungs, the study,
Ray Tune and MLflow (SQLite) are those of `heterokd search`. Two trials at a time, from the first start to the last end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from nothing import sleep_through

from heterokd.config.reading import load_experiment
from heterokd.execution.executor import SearchJob, run_study
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.search_space import open_space
from heterokd.study.summary import StudySummary
from heterokd.tracking.runs import open_runs
from heterokd.training.precision import device_name

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
PARALLEL = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training in a trial")
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    found = measure(arguments.trials, arguments.seconds, arguments.epochs)
    results = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}", **found}
    for key, value in results.items():
        print(f"{key.replace('_', ' '):<52}{value if isinstance(value, str) else f'{value:.4g}':>24}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def measure(trials: int, seconds: float, epochs: int) -> dict[str, float]:
    """Means over the trials."""
    settings = [f"search.trials={trials}", f"search.parallel={PARALLEL}", f"training.epochs={epochs}"]
    settings += ["search.confirm_leaders=0", "search.prune=false", "cache.enabled=false"]
    # Read by the trials, which inherit the environment.
    os.environ["SLEEP_SECONDS"] = str(seconds)
    experiment = load_experiment(EXPERIMENT, settings)
    marks: list[tuple[float, float]] = []

    def listener(event: str, trial: TrialFolder, summary: StudySummary) -> None:
        marks.append((time.time(), time.process_time()))

    with tempfile.TemporaryDirectory(prefix="hk") as name:
        root = Workspace(Path(name))
        folder = root.study(experiment.name)
        folder.path.mkdir(parents=True)
        runs = open_runs(experiment, folder, root)
        run_study(
            SearchJob(experiment, root, open_space(experiment, folder)), runs, listener=listener, run=sleep_through
        )
        slept = [float(trial.snapshot.metrics["time/slept"]) for trial in folder.trials()]
        snapshots = [trial.snapshot for trial in folder.trials()]
        spans = sorted((one.began or 0.0, one.ended or 0.0) for one in snapshots)
    inside = [ended - began for began, ended in spans]
    driver = (marks[-1][1] - marks[0][1]) / trials
    # A place is free from the end of a trial to the beginning of the next one there.
    places: list[list[float]] = []
    between: list[float] = []
    for began, ended in spans:
        free = [place for place in places if place[-1] <= began]
        if free:
            last = max(free, key=lambda place: place[-1])
            between.append(began - last[-1])
            last.append(ended)
        else:
            places.append([ended])
    training = sum(slept) / trials
    outside = sum(inside) / trials - training
    gap = sum(between) / max(1, len(between))
    return {
        "seconds_of_training_in_a_trial": training,
        "driver_processor_seconds_a_trial": driver,
        "driver_over_training": driver / training,
        "trial_seconds_outside_training": outside,
        "seconds_between_two_trials_of_a_place": gap,
        "outside_and_between_over_training": (outside + gap) / training,
    }


if __name__ == "__main__":
    main()
