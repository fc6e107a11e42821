"""Trials an hour of `heterokd search`, over a search that is written as Ray's documentation writes it.

    python benchmarks/search.py [--out results.json] [--trials 24] [--epochs 40] [--root runs] [--prune]
                                [--ray-defaults]

Both run the quickstart's question on the same teacher, whose fit is not counted: first heterokd, then the reference
(`reference.py`) with the samples that heterokd had chosen. Both train every trial to its end, unless told otherwise,
and confirm none; as many trials at a time as there are cores, a thread each. Counted is the whole command, with
heterokd's cache that is still to be filled, its report and its registered winner.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from heterokd.config.reading import load_experiment
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.precision import device_name

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENT = REPOSITORY / "experiments" / "quickstart.yaml"
LONGEST = 120
"""Seconds for each trial after which a search counts as hanging."""

# Ray's own waits between a trainer's steps, as short as they help; and no watching of clouds' spot machines.
RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, help="of each trial; the quickstart's own when left out")
    parser.add_argument("--root", type=Path, help="where a fitted teacher may lie; fitted anew when left out")
    parser.add_argument("--prune", action="store_true", help="let heterokd end trials early, as it does by default")
    parser.add_argument("--ray-defaults", action="store_true", help="leave Ray Train's waits as long as they are")
    arguments = parser.parse_args()
    overrides = [f"search.trials={arguments.trials}", "search.confirm_leaders=0"]
    overrides += [] if arguments.prune else ["search.prune=false"]
    overrides += [f"training.epochs={arguments.epochs}"] if arguments.epochs else []
    torch.set_num_threads(1)
    # Whoever ends this process ends the search that it runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="hk") as name:
        scratch = Path(name)
        experiment = load_experiment(EXPERIMENT, overrides)
        teacher = prepare_teacher(experiment, Workspace(arguments.root or scratch / "teacher")).weights
        given = scratch / "teacher.safetensors"
        given.write_bytes(teacher.read_bytes() if teacher else b"")
        settings = [f"teacher.checkpoint={given}", *overrides]
        ours, samples = run_heterokd(scratch, settings, LONGEST * arguments.trials)
        theirs = run_reference(scratch, samples, given, arguments.epochs, {} if arguments.ray_defaults else RAY_TRAIN)
    results = {
        "machine": f"{os.cpu_count()} cores, {device_name('cpu')}",
        "epochs": experiment.training.epochs,
        "heterokd": ours,
        "reference": theirs,
        "ratio": round(ours["trials_per_hour"] / theirs["trials_per_hour"], 2),
    }
    show(results)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def run_heterokd(scratch: Path, settings: list[str], longest: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of heterokd's search, and the samples that it chose, by number."""
    command = [sys.executable, "-m", "heterokd", "search", str(EXPERIMENT), "--root", str(scratch / "runs"), "--json"]
    for setting in settings:
        command += ["--set", setting]
    began, ended = run_alone(command, scratch / "r1", {}, longest)
    folder: StudyFolder = Workspace(scratch / "runs").study("quickstart")
    trials = folder.trials()
    snapshots = [trial.snapshot for trial in trials]
    gaps: list[float] = []
    for pid in {one.pid for one in snapshots}:
        spans = sorted((one.began or 0.0, one.ended or 0.0) for one in snapshots if one.pid == pid)
        gaps += [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    images = [len(trial.metrics()) for trial in trials]
    figures = figures_of(
        [(one.began or 0.0, one.ended or 0.0) for one in snapshots],
        [one.metrics.get("val/top1", math.nan) for one in snapshots],
        (began, ended),
        {
            "between_trials": statistics.fmean(gaps) if gaps else 0.0,
            "epochs_trained": float(sum(images)),
            "trials_that_failed": float(sum(one.status.is_failure for one in snapshots)),
        },
    )
    return figures, [dict(one.sample) for one in snapshots]


def run_reference(
    scratch: Path, samples: list[dict[str, Any]], teacher: Path, epochs: int | None, environment: dict[str, str]
) -> dict[str, Any]:
    """Figures of the reference's search."""
    folder = scratch / "reference"
    folder.mkdir()
    (scratch / "samples.json").write_text(json.dumps(samples))
    script = Path(__file__).parent / "reference.py"
    command = [sys.executable, str(script), str(EXPERIMENT), str(scratch / "samples.json"), str(teacher), str(folder)]
    command += ["--epochs", str(epochs)] if epochs else []
    began, ended = run_alone(command, scratch / "r2", environment, LONGEST * len(samples))
    times = json.loads((folder / "times.json").read_text())
    trials = times["trials"]

    def mean(key: str, since: str | None = None) -> float:
        return statistics.fmean(one[key] - (one[since] if since else 0.0) for one in trials)

    return figures_of(
        [(one["began"], one["ended"]) for one in trials],
        [one["val/top1"] for one in trials],
        (began, ended),
        {
            "trial_until_its_worker_runs": mean("worker_began", "began"),
            "trial_until_its_first_step": mean("loop_began", "worker_began"),
            "trial_steps": mean("steps"),
            "trial_evaluation": mean("evaluation"),
            "trial_reports": mean("reports"),
            "trial_after_its_last_epoch": mean("ended", "worker_ended"),
            "mlflow_in_tunes_loop": times["mlflow"],
            "trials_that_failed": float(times["errors"]),
        },
    )


def figures_of(
    spans: list[tuple[float, float]], scores: list[float], whole: tuple[float, float], more: dict[str, float]
) -> dict[str, Any]:
    """What is said of both searches, in seconds, and what only one of them has."""
    finite = [score for score in scores if score == score]
    return {
        "trials": len(spans),
        "seconds": round(whole[1] - whole[0], 1),
        "trials_per_hour": round(3600 * len(spans) / (whole[1] - whole[0]), 1),
        "before_the_first_trial": round(min(began for began, _ in spans) - whole[0], 2),
        "a_trial": round(statistics.fmean(ended - began for began, ended in spans), 2),
        "after_the_last_trial": round(whole[1] - max(ended for _, ended in spans), 2),
        "mean_val_top1": round(statistics.fmean(finite), 4) if finite else None,
        **{key: round(value, 3) for key, value in more.items()},
    }


def run_alone(command: list[str], ray_folder: Path, environment: dict[str, str], longest: float) -> tuple[float, float]:
    """Run a search in a process group and with a Ray folder of its own; when it began and ended.

    Whatever is left of the group afterwards is ended by its id, also when the search hangs.
    """
    ray_folder.mkdir()
    began = time.time()
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "RAY_TMPDIR": str(ray_folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=longest)
    finally:
        ended = time.time()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output[-4000:]}")
    return began, ended


def show(results: dict[str, Any]) -> None:
    """The table: seconds unless the name says otherwise."""
    ours, theirs = results["heterokd"], results["reference"]
    print(f"{'':<34}{'heterokd':>12}{'reference':>12}")
    for key in {**ours, **theirs}:
        values = (ours.get(key), theirs.get(key))
        print(f"{key.replace('_', ' '):<34}" + "".join(f"{'-' if value is None else value:>12}" for value in values))
    print(f"trials an hour, ratio: {results['ratio']}")


if __name__ == "__main__":
    main()
