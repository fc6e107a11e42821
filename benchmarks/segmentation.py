"""What distillation adds to a segmentation student on the embedded data, over seeds.

    python benchmarks/segmentation.py [--root RUNS] [--seeds 5] [--experiment FILE] [--out results.json]

Scratch, pixel KD, CWD and HeteroAKD, each at its published settings and at the best ones of a search (the study of the
experiment under --root; it is run where there is none), trained on fresh seeds. Mean IoU is of the test split, which
the search never saw. Differences to scratch are paired by seed; p-values are Holm-corrected over all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import open_test
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.study.significance import compare
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.data import open_splits
from heterokd.training.evaluation import evaluate
from heterokd.training.precision import device_name
from heterokd.training.task_modules import build_task

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENT = REPOSITORY / "experiments" / "segmentation_quickstart.yaml"
METHODS = ("scratch", "pixel_kd", "cwd", "heteroakd")
FIRST_SEED = 9001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--root", type=Path, help="where the search is, or will be")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT)
    parser.add_argument("--set", action="append", default=[], help="key=value of the experiment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch_root:
        root = Workspace((arguments.root or Path(scratch_root)).resolve())
        experiment = load_experiment(arguments.experiment, arguments.set)
        study = root.study(experiment.name)
        if not (study.path / "summary.json").exists():
            overrides = [part for text in arguments.set for part in ("--set", text)]
            command = [sys.executable, "-m", "heterokd", "search", str(arguments.experiment), *overrides]
            subprocess.run([*command, "--root", str(root.path)], check=True, cwd=REPOSITORY)
        weights = prepare_teacher(experiment, root).weights
        recipes: dict[str, Recipe] = {}
        for method in METHODS:
            recipes[f"{method}, published"] = experiment.recipe(experiment.published(method))
            recipes[f"{method}, searched"] = best_recipe(study, method)
        seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
        work = [
            (recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})}), root, weights)
            for recipe in recipes.values()
            for seed in seeds
        ]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            # A search may find nothing better than what is published: the same training is not done twice.
            distinct = {recipe.hash: one for one in work for recipe in one[:1]}
            known: dict[str, float] = {}
            done = zip(distinct.items(), pool.map(test_miou, *zip(*distinct.values(), strict=True)), strict=True)
            for (name, (recipe, *_)), value in done:
                known[name] = value
                count = f"{len(known)}/{len(distinct)}"
                print(f"{count} {recipe.method} seed {recipe.training.seed}: {value:.4f}", flush=True)
        values = [known[recipe.hash] for recipe, *_ in work]
    count = arguments.seeds
    measured = {name: values[place * count :][:count] for place, name in enumerate(recipes)}
    results = {"machine": f"{os.cpu_count()} cores, {device_name('cpu')}", "rows": table(measured)}
    for row in results["rows"]:
        print(
            f"{row['setting']:<24}{row['mean']:.4f} +- {row['standard_error']:.4f}   {row['gain']:+.4f} "
            f"({row['low']:+.4f} to {row['high']:+.4f})   p {row['p_holm']:.3f}   {row['verdict']}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def best_recipe(study: StudyFolder, method: str) -> Recipe:
    """The recipe of a method's best trial on val, whatever seed it had."""
    trials = [trial for trial in study.trials() if trial.recipe.method == method and trial.snapshot.metrics]
    done = [trial for trial in trials if trial.status == "complete"]
    return max(done, key=lambda trial: float(trial.snapshot.metrics["val/miou"])).recipe


def test_miou(recipe: Recipe, root: Workspace, weights: Path | None) -> float:
    """Train a recipe in a folder of its own; mean IoU on the test split."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trained = run_recipe(recipe, TrialFolder(Path(folder)), RunContext(root, weights), lambda metrics: True)
    splits = open_splits(recipe.data)
    task = build_task(recipe.task, splits.num_classes, inference=recipe.data.inference)
    return dict(evaluate(trained.student, open_test(splits), task))["miou"]


def table(measured: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Mean, its standard error, and the paired difference to scratch at its searched settings."""
    reference = "scratch, searched"
    values = {name: dict(enumerate(own)) for name, own in measured.items()}
    found = compare(values, [(name, reference) for name in values if name != reference])
    compared = {one.first: one for one in found}
    rows: list[dict[str, Any]] = []
    for name, own in measured.items():
        error = statistics.stdev(own) / math.sqrt(len(own))
        row = {"setting": name, "mean": statistics.fmean(own), "standard_error": error, "values": own}
        one = compared.get(name)
        if one is None:
            row |= {"gain": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "p_holm": 1.0, "verdict": "reference"}
        else:
            interval = {"low": one.difference, "high": one.difference}
            if one.low is not None and one.high is not None:
                interval = {"low": one.low, "high": one.high}
            row |= {"gain": one.difference, **interval, "p": one.p, "p_holm": one.p_holm, "verdict": one.verdict}
            row |= {"effect": one.effect, "seeds_needed": one.seeds_needed}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
