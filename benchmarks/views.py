"""What goes wrong without view keys: a student that learns from what the teacher said of another view.

    python benchmarks/views.py [--out results.json] [--root runs] [--policy crop] [--seeds 5] [--epochs 40] [--views 10]

KD on the quickstart's data, teacher and student, with random crops, by the same settings and seeds. The teacher answers
in three ways: `live` on a fresh view of every epoch; from a `cache` of a few views of each image, keyed by view, which
later epochs show again; and by `index`, as a cache without view keys does: what it said of the plain image, whatever
crop the student sees. The teacher is the quickstart's own, found below --root or fitted there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.datasets.io.loaders import EvalLoader
from heterokd.datasets.io.split import Split
from heterokd.execution.run import RunContext, run_recipe
from heterokd.outputs import Batch, Outputs, Signal
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import open_prepared, prepare_teacher
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.precision import device_name
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import train

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
KEEP_ON = lambda metrics: True  # noqa: E731  no training is ended early


class IndexTeacher:
    """A teacher whose outputs are those of plain images, looked up by index alone.

    Args:
        live: the network.
        split: the training images.
    """

    def __init__(self, live: LiveTeacher, split: Split) -> None:
        self.live, self.spec, self.serves = live, live.spec, Signal.LOGITS
        batches = EvalLoader(split, 256)
        self.logits = torch.cat([live.outputs(batch, Signal.LOGITS).logits for batch in batches])

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """See `Teacher`."""
        return Outputs(logits=self.logits[batch.index], owner="teacher").only(needs, "teacher")

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        """See `Teacher`."""
        return self.live.classes(loader, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--root", type=Path, help="where the fitted teacher lies, or will; forgotten when left out")
    parser.add_argument("--policy", default="crop", help="how views differ from their image")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--views", type=int, default=10, help="of each image in the cache")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    overrides = [f"data.augment={arguments.policy}", f"training.epochs={arguments.epochs}", "training.precision=fp32"]
    with tempfile.TemporaryDirectory() as scratch:
        root = Workspace(arguments.root or Path(scratch))
        fresh = load_experiment(EXPERIMENT, [*overrides, "cache.enabled=false"])
        stored = load_experiment(EXPERIMENT, [*overrides, f"cache.views={arguments.views}", "cache.dtype=fp32"])
        weights = prepare_teacher(load_experiment(EXPERIMENT), root).weights
        scores: dict[str, list[float]] = {"live": [], "cache": [], "index": []}
        for seed in range(1, arguments.seeds + 1):
            scores["live"].append(keyed(fresh, seed, weights, Workspace(Path(scratch))))
            scores["cache"].append(keyed(stored, seed, weights, Workspace(Path(scratch))))
            scores["index"].append(by_index(fresh, seed, weights))
            print(
                f"seed {seed}: " + "  ".join(f"{name} {values[-1]:.4f}" for name, values in scores.items()), flush=True
            )
        seen = teacher_on_views(fresh, weights)
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {device_name('cpu')}",
        **vars(arguments) | {"out": None, "root": None},
        "teacher_on_train_views": seen,
        "val_top1": scores,
        "differences": {},
    }
    print(f"the teacher is right on {seen:.3f} of the training views")
    for name, values in scores.items():
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        print(f"{name:<8}{statistics.fmean(values):.4f} +- {spread:.4f} (s.e.)")
    for first, second in itertools.combinations(scores, 2):
        found = compare(scores[first], scores[second])
        results["differences"][f"{first} - {second}"] = found
        print(
            f"{first} - {second}: {found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] {found['verdict']}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def keyed(experiment: Experiment, seed: int, weights: Path | None, root: Workspace) -> float:
    """val/top1 of a training whose teacher answers for the very view that the student sees."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = experiment.recipe(experiment.published("kd"), seed=seed)
        context = RunContext(root, weights, cache_use="built")
        trained = run_recipe(recipe, TrialFolder(Path(folder) / "0"), context, KEEP_ON)
    return trained.metrics["val/top1"]


def by_index(experiment: Experiment, seed: int, weights: Path | None) -> float:
    """val/top1 of a training whose teacher answers for the plain image."""
    recipe = experiment.recipe(experiment.published("kd"), seed=seed)
    splits = open_splits(recipe.data)
    teacher = IndexTeacher(open_prepared(recipe, weights, splits.num_classes), splits.train)
    return train(recipe, teacher, recipe_loaders(recipe, splits), KEEP_ON).metrics["val/top1"]


def teacher_on_views(experiment: Experiment, weights: Path | None, epochs: int = 5) -> float:
    """Share of training views whose class the teacher names: how much a crop leaves to see."""
    recipe = experiment.recipe(experiment.published("kd"))
    splits = open_splits(recipe.data)
    live = open_prepared(recipe, weights, splits.num_classes)
    loader = recipe_loaders(recipe, splits).train
    right = [
        (live.outputs(batch, Signal.LOGITS).logits.argmax(1) == batch.labels).float()
        for epoch in range(epochs)
        for batch in loader.epoch(epoch)
    ]
    return round(float(torch.cat(right).mean()), 4)


def compare(first: list[float], second: list[float]) -> dict[str, Any]:
    """Mean of the paired differences, its 95 % t-interval, and whether that leaves zero out."""
    differences = np.subtract(first, second)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return {"mean": mean, "low": -math.inf, "high": math.inf, "verdict": "not significant: one seed"}
    half = float(stdtrit(count - 1, 0.975) * differences.std(ddof=1) / math.sqrt(count))
    verdict = "significant" if abs(mean) > half else "not significant"
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4), "verdict": verdict}


if __name__ == "__main__":
    main()
