"""What a trial costs beside its training, from the first hundred trials to the last: Ray Tune, the study, MLflow.

    python benchmarks/many_trials.py [--out results.json] [--trials 2000] [--study 10000]

The objective does nothing: a formula stands in for the training, everything else is what `heterokd search` runs, with
MLflow in SQLite. Then the study alone, asked and told as fast as it answers. Memory is what the process holds for
itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from nothing import score, train_nothing

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.execution.executor import SearchJob, run_study
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.search_space import open_space
from heterokd.study.study import Study
from heterokd.study.summary import StudySummary
from heterokd.tracking.runs import open_runs
from heterokd.training.precision import device_name

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
WINDOW = 100
"""Trials over which a cost is averaged."""
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--trials", type=int, default=2000, help="through the whole path; 0 leaves it out")
    parser.add_argument("--study", type=int, default=10_000, help="of the study alone; 0 leaves it out")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}"}
    if arguments.study:
        results["study"] = study_alone(arguments.study)
        show("the study alone", results["study"])
    if arguments.trials:
        results["search"] = whole_path(arguments.trials)
        show("the whole path", results["search"])
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def asked(trials: int) -> Experiment:
    """The quickstart's question with many trials and no confirmation."""
    settings = [f"search.trials={trials}", "search.confirm_leaders=0", "search.parallel=2", "cache.enabled=false"]
    return load_experiment(EXPERIMENT, settings)


def own_mib() -> float:
    """Memory that this process holds for itself: neither files nor what others share."""
    held = psutil.Process().memory_info()
    return float(held.rss - held.shared) / MIB


def whole_path(trials: int) -> dict[str, Any]:
    """A search by Ray Tune, study and MLflow; each window's cost of a trial."""
    rows: list[dict[str, float]] = []
    finished: set[int] = set()
    before = [time.monotonic(), time.process_time()]

    def listener(event: str, trial: TrialFolder, summary: StudySummary) -> None:
        if event == "start" and trial.number == 0:
            before[:] = time.monotonic(), time.process_time()  # Ray's own start is no trial's
        if event == "finish":
            finished.add(trial.number)
            if len(finished) % WINDOW == 0:
                now = [time.monotonic(), time.process_time()]
                seconds, driver = (1e3 * (end - start) / WINDOW for start, end in zip(before, now, strict=True))
                rows.append({"trials": len(finished), "ms": seconds, "driver_cpu_ms": driver, "driver_mib": own_mib()})
                before[:] = now

    experiment = asked(trials)
    with tempfile.TemporaryDirectory(prefix="hk") as name:
        root = Workspace(Path(name))
        folder = root.study(experiment.name)
        folder.path.mkdir(parents=True)
        runs = open_runs(experiment, folder, root)
        summary = run_study(
            SearchJob(experiment, root, open_space(experiment, folder)), runs, listener=listener, run=train_nothing
        )
        last = time.monotonic()
        runs.finish(summary)
        found = [
            run.info.status
            for run in runs.client.search_runs([runs.experiment_id], max_results=min(50_000, trials + 2))
        ]
        progress = summary.progress
    return {
        "rows": rows,
        "finish_seconds": time.monotonic() - last,
        "trials": progress.complete + progress.pruned,
        "failed": progress.failed,
        "runs": len(found),
        "runs_not_finished": sum(status != "FINISHED" for status in found),
        "threads": threading.active_count(),
    }


def study_alone(trials: int) -> dict[str, Any]:
    """Asked and told in one process: milliseconds of a suggestion, of all else, and the memory."""
    experiment = asked(trials)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="hk") as name:
        study = Study.open(experiment, StudyFolder(Path(name) / "many"))
        suggestions: list[float] = []
        waits: list[float] = []
        rest: list[float] = []
        done = 0
        while True:
            # Processor time: what the study takes; the clock also has the disk's share and what else the machine does.
            started, clock = time.process_time(), time.perf_counter()
            assignment: Any = study.next()
            if assignment is None:
                break
            between, waited = time.process_time(), time.perf_counter() - clock
            sample, epochs = assignment.sample, assignment.recipe.training.epochs
            goes_on, epoch = True, 0
            for epoch in assignment.rungs:
                goes_on = study.report(assignment.number, epoch, {experiment.metric: score(sample, epoch / epochs)})
                if not goes_on:
                    break
            reached = score(sample, 1.0 if goes_on else epoch / epochs)
            study.finish(assignment.number, "complete" if goes_on else "pruned", {experiment.metric: reached})
            study.summary()
            suggestions.append(1e3 * (between - started))
            waits.append(1e3 * waited)
            rest.append(1e3 * (time.process_time() - between))
            done += 1
            if done % WINDOW == 0:
                row = {"trials": done, "suggestion_cpu_ms": statistics.median(suggestions[-WINDOW:])}
                row |= {"suggestion_ms": statistics.median(waits[-WINDOW:])}
                rows.append({**row, "rest_cpu_ms": statistics.median(rest[-WINDOW:]), "mib": own_mib()})
    return {"rows": rows, "trials": done}


def show(title: str, found: dict[str, Any]) -> None:
    """Some of the windows, and what is true of all."""
    rows = found["rows"]
    print(f"{title}: {found['trials']} trials", flush=True)
    if not rows:
        return
    print("".join(f"{key.replace('_', ' '):>23}" for key in rows[0]))
    step = max(1, len(rows) // 10)
    for row in [*rows[:-1][::step], rows[-1]]:
        print("".join(f"{value:>23.6g}" for value in row.values()), flush=True)
    print({key: value for key, value in found.items() if key != "rows"}, flush=True)


if __name__ == "__main__":
    main()
