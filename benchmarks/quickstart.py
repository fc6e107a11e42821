"""The quickstart as a user runs it: time, memory, cost between trials, and what distillation really adds.

    python benchmarks/quickstart.py [--out results.json]

A fresh root, the command line in its own process, its whole process tree sampled. Afterwards the winning setting and
scratch at each of several learning rates are trained on five seeds that the search never used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.read_summary import read_summary
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.precision import device_name

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENT = REPOSITORY / "experiments" / "quickstart.yaml"
FRESH_SEEDS = range(7001, 7006)
SCRATCH_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--root", type=Path, help="measure a search that is there already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch_root:
        root = Workspace(arguments.root or Path(scratch_root))
        results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}"}
        if arguments.root is None:
            results |= run_search(root)
        results |= between_trials(root.study("quickstart"))
        results |= gain(load_experiment(EXPERIMENT), root)
    for key, value in results.items():
        print(f"{key:<44}{value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def run_search(root: Workspace) -> dict[str, Any]:
    """Seconds of the whole command, and the most memory that all of its processes held together (PSS)."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "heterokd", "search", str(EXPERIMENT), "--root", str(root.path), "--json"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(1)
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    standing = json.loads(output.splitlines()[-1])["standing"]
    return {
        "seconds of the whole command": round(time.perf_counter() - started, 1),
        "trials (complete, pruned, failed, again)": (
            f"{standing['complete']}, {standing['pruned']}, {standing['failed']}, {standing['confirmations_done']}"
        ),
        "peak memory of driver and workers, GiB": round(peak, 2),
    }


def tree_memory(pid: int) -> float:
    """GiB of a process and all that it started; shared pages are counted once (PSS)."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 1024**3


def between_trials(folder: StudyFolder) -> dict[str, Any]:
    """Seconds from a trial's end to the next one's beginning in the same process (building networks apart)."""
    by_process: dict[int | None, list[tuple[float, float]]] = {}
    for trial in folder.trials():
        one = trial.snapshot
        by_process.setdefault(one.pid, []).append((one.began or 0.0, one.ended or 0.0))
    gaps = []
    for spans in by_process.values():
        spans.sort()
        gaps += [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    return {
        "seconds between trials, median": round(statistics.median(gaps), 3),
        "seconds between trials, 90th percentile": round(sorted(gaps)[int(0.9 * len(gaps))], 3),
    }


def gain(experiment: Experiment, root: Workspace) -> dict[str, Any]:
    """val/top1 of the winner and of scratch at its best learning rate, on five fresh seeds each."""
    torch.set_num_threads(1)
    weights = prepare_teacher(experiment, root).weights
    summary = read_summary(root.study("quickstart"))
    assert summary is not None
    winner = summary.winner
    assert winner is not None

    def values(sample: dict[str, Any]) -> list[float]:
        found = []
        for seed in FRESH_SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                recipe = experiment.recipe(sample, seed=seed)
                trained = run_recipe(
                    recipe, TrialFolder(Path(folder) / "0"), RunContext(root, weights), lambda metrics: True
                )
            found.append(trained.metrics["val/top1"])
        return found

    chosen = values(winner.sample)
    baselines = {rate: values({"method": "scratch", "training.learning_rate": rate}) for rate in SCRATCH_RATES}
    best_rate = max(baselines, key=lambda rate: statistics.fmean(baselines[rate]))
    scratch = baselines[best_rate]
    difference = statistics.fmean(chosen) - statistics.fmean(scratch)
    error = (statistics.variance(chosen) / len(chosen) + statistics.variance(scratch) / len(scratch)) ** 0.5
    return {
        "winner": winner.method,
        "winner on fresh seeds, mean and deviation": f"{statistics.fmean(chosen):.4f}, {statistics.stdev(chosen):.4f}",
        "scratch, best learning rate": best_rate,
        "scratch on the same seeds": f"{statistics.fmean(scratch):.4f}, {statistics.stdev(scratch):.4f}",
        "difference, in standard errors": f"{difference:.4f}, {difference / error:.1f}",
    }


if __name__ == "__main__":
    main()
