"""Whether starts from `heterokd match` shorten a search: the same search with and without them, over seeds.

    python benchmarks/match.py [--searches 6] [--trials 12] [--epochs 10] [--out results.json]

The methods that pair stages (FBT, HCD, OFA) on the quickstart's pair. Both searches make the same number of trainings
by the same code (the study, one trial at a time, without pruning and repetitions); one tries the matched starts after
the published settings, the other samples instead. Compared is the best val/top1 so far after each number of trainings,
paired by the seed of search and trainings; and the matched starts themselves with their methods' published settings.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.execution.match import match
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.options import StudyOptions
from heterokd.study.significance import compare
from heterokd.study.study import Study
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.precision import device_name

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENT = REPOSITORY / "experiments" / "quickstart.yaml"
METHODS = "[scratch, fbt, hcd, ofa]"
SHARED = "{training.learning_rate: {low: 0.01, high: 0.2, log: true}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--searches", type=int, default=6)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    asked = [f"search.space={{methods: {METHODS}, shared: {SHARED}}}", f"search.trials={arguments.trials}"]
    asked += [f"training.epochs={arguments.epochs}", "search.prune=false", "search.confirm_leaders=0"]
    asked += ["training.precision=fp32", "training.channels_last=false"]
    experiment = load_experiment(EXPERIMENT, asked)
    with tempfile.TemporaryDirectory() as folder:
        root = Workspace(Path(folder))
        found = match(experiment, root)
        for row in found.similarity:
            print("  ".join(f"{value:5.2f}" for value in row))
        print(*found.starts, sep="\n")
        weights = prepare_teacher(experiment, root).weights
        work = [(is_matched, seed) for seed in range(arguments.searches) for is_matched in (False, True)]
        texts = [load_experiment(EXPERIMENT, [*asked, *options(*one)]).model_dump_json() for one in work]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            curves = dict(zip(work, pool.map(run, texts, [root] * len(work), [weights] * len(work)), strict=True))
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}"}
    results |= {"similarity": found.similarity, "starts": found.starts}
    results["best so far"] = table(curves, arguments.searches, arguments.trials)
    results["starts against published settings"] = starts_table(curves, arguments.searches)
    print(f"{'trainings':<12}{'published':>12}{'matched':>12}{'difference (95 % interval), p':>40}")
    for row in results["best so far"]:
        print(f"{row['trainings']:<12}{row['published']:>12.4f}{row['matched']:>12.4f}   {row['compared']}")
    for sentence in results["starts against published settings"]:
        print(sentence)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def options(is_matched: bool, seed: int) -> list[str]:
    return [f"search.match_starts={str(is_matched).lower()}", f"search.seed={seed}", f"training.seed={seed}"]


def run(text: str, root: Workspace, weights: Path | None) -> list[tuple[str, str, float]]:
    """One search; method, origin and val/top1 of each training in order."""
    torch.set_num_threads(1)
    experiment = Experiment.model_validate_json(text)
    study = Study.open(experiment, root.study(experiment.name), StudyOptions(storage="memory"))
    found = []
    while (assignment := study.next()) is not None and assignment != "wait":
        with tempfile.TemporaryDirectory() as folder:
            place = TrialFolder(Path(folder) / "0")
            trained = run_recipe(assignment.recipe, place, RunContext(root, weights), lambda metrics: True)
        study.finish(assignment.number, "complete", trained.metrics)
        layout = {key: value for key, value in assignment.sample.items() if "stage" in key}
        found.append((assignment.recipe.method, f"{assignment.origin} {layout}", trained.metrics["val/top1"]))
    return found


def table(curves: dict[tuple[bool, int], list[Any]], searches: int, trials: int) -> list[dict[str, Any]]:
    """Mean best so far of both, and their paired difference, after each number of trainings."""
    rows = []
    for count in range(4, trials + 1):
        best = {
            name: {seed: max(value for *_, value in curves[is_matched, seed][:count]) for seed in range(searches)}
            for name, is_matched in (("matched", True), ("published", False))
        }
        (one,) = compare(best)
        interval = "" if one.low is None else f" ({one.low:+.4f} to {one.high:+.4f})"
        means = {name: statistics.fmean(own.values()) for name, own in best.items()}
        rows.append({"trainings": count, **means, "compared": f"{one.difference:+.4f}{interval}, {one.p:.3f}"})
    return rows


def starts_table(curves: dict[tuple[bool, int], list[Any]], searches: int) -> list[str]:
    """Each matched start against its method's published setting, on common seeds."""
    values: dict[str, dict[int, float]] = {}
    for seed in range(searches):
        for method, origin, value in curves[True, seed]:
            if origin.startswith("published"):
                values.setdefault(f"{method} {origin.removeprefix('published ')}", {})[seed] = value
    names = list(values)
    firsts = {name.split()[0]: name for name in reversed(names)}
    pairs = [(name, firsts[name.split()[0]]) for name in names if name != firsts[name.split()[0]]]
    return [one.sentence() for one in compare(values, pairs)] if searches > 1 else []


if __name__ == "__main__":
    main()
