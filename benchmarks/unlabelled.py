"""What images without labels add: digits with ten labels of each class, and the other training images without labels.

    python benchmarks/unlabelled.py [--out results.json] [--seeds 5] [--first 0] [--arms scratch kd rest] [--root DIR]

Teacher, student and training are those of experiments/quickstart.yaml; KD has its default parameters. An arm is trained
on each seed, and val/top1 of the last epoch is compared in pairs of the same seed. `rest` learns from the other 978
training images without their labels, half of each batch. An epoch has 3 updates without them and 33 with them: 4 epochs
of `rest` are as many updates as 44 of `scratch` and `kd`. The arms `-long` have ten times as many.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from heterokd.config.reading import load_experiment
from heterokd.storage.workspace import open_workspace
from heterokd.teachers.prepare import open_prepared, prepare_teacher
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.train import train

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
REST = "data.unlabelled=rest"
ARMS: dict[str, tuple[str, list[str]]] = {
    "scratch": ("scratch", ["training.epochs=44"]),
    "kd": ("kd", ["training.epochs=44"]),
    "rest": ("kd", ["training.epochs=4", REST]),
    "rest-0.8": ("kd", ["training.epochs=4", REST, "training.unlabelled_share=0.8"]),
    "scratch-long": ("scratch", ["training.epochs=440"]),
    "kd-long": ("kd", ["training.epochs=440"]),
    "rest-long": ("kd", ["training.epochs=40", REST]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--root", help="workspace with the teacher; default: a new one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as new:
        seeds = range(given.first, given.first + given.seeds)
        scores = {arm: measured(arm, seeds, given.root or new) for arm in given.arms}
    if given.out:
        given.out.write_text(json.dumps(scores, indent=1))
    for other in [arm for arm in given.arms if not arm.startswith("rest")]:
        for arm in [arm for arm in given.arms if arm.startswith("rest")]:
            gains = [one - two for one, two in zip(scores[arm], scores[other], strict=True)]
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            print(f"{arm} over {other}: {statistics.fmean(gains):+.4f}, standard error {error:.4f}")


def measured(arm: str, seeds: range, folder: str) -> list[float]:
    """Train an arm on each seed; return val/top1 of the last epochs."""
    torch.set_num_threads(1)
    method, overrides = ARMS[arm]
    experiment = load_experiment(EXPERIMENT, ["training.precision=fp32", *overrides])
    root = open_workspace(folder)
    weights, splits = prepare_teacher(experiment, root).weights, open_splits(experiment.data)
    scores, began = [], time.perf_counter()
    for seed in seeds:
        recipe = experiment.recipe({"method": method}, seed=seed)
        live = open_prepared(recipe, weights, splits.num_classes)
        done = train(recipe, live, recipe_loaders(recipe, splits), lambda metrics: True)
        scores.append(done.metrics["val/top1"])
    seconds = (time.perf_counter() - began) / len(seeds)
    print(
        f"{arm:<13}{statistics.fmean(scores):.4f}  {' '.join(f'{score:.4f}' for score in scores)}  {seconds:.1f} s each"
    )
    return scores


if __name__ == "__main__":
    main()
