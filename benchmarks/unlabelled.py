"""What images without labels add: few labels of each class, and the other training images without labels.

    python benchmarks/unlabelled.py [--experiment FILE] [--set KEY=VALUE ...] [--updates 132] [--root DIR]
                                    [--out results.json] [--seeds 5] [--first 0] [--arms scratch kd rest]

Without --experiment, digits: teacher, student and training of experiments/quickstart.yaml, with ten labels of each
class. benchmarks/unlabelled_images.yaml is for a folder of images and a checkpoint. KD has its default parameters.
An arm is trained on each seed, and the metric of the last epoch is compared in pairs of the same seed. `rest`
learns from the training images whose labels `data.labels_per_class` leaves out, half of each batch. All arms have
as many updates, those with names in `-long` ten times as many. Trainings are kept in --root: an interrupted run
goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.data import open_splits, recipe_loaders

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
REST = "data.unlabelled=rest"
LONG = 10
ARMS: dict[str, tuple[str, list[str]]] = {
    "scratch": ("scratch", []),
    "kd": ("kd", []),
    "rest": ("kd", [REST]),
    "rest-0.8": ("kd", [REST, "training.unlabelled_share=0.8"]),
    "scratch-long": ("scratch", []),
    "kd-long": ("kd", []),
    "rest-long": ("kd", [REST]),
}
"""Method and overrides, by arm."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the experiment")
    parser.add_argument("--updates", type=int, default=132, help="of each training but the long ones")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--root", help="workspace with the teacher; default: a new one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as new:
        seeds = range(given.first, given.first + given.seeds)
        root = Workspace(Path(given.root or new))
        scores = {arm: measured(arm, given, seeds, root) for arm in given.arms}
    if given.out:
        given.out.write_text(json.dumps(scores, indent=1))
    for other in [arm for arm in given.arms if not arm.startswith("rest")]:
        for arm in [arm for arm in given.arms if arm.startswith("rest")]:
            gains = [one - two for one, two in zip(scores[arm], scores[other], strict=True)]
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            print(f"{arm} over {other}: {statistics.fmean(gains):+.4f}, standard error {error:.4f}")


def measured(arm: str, given: argparse.Namespace, seeds: Sequence[int], root: Workspace) -> list[float]:
    """Train an arm on each seed; return the metric of the last epochs."""
    torch.set_num_threads(1)
    method, overrides = ARMS[arm]
    overrides = ["training.precision=fp32", "training.channels_last=false", *overrides, *given.set]
    experiment = load_experiment(given.experiment, overrides)
    splits = open_splits(experiment.data)
    steps = len(recipe_loaders(experiment.recipe({"method": method}), splits).train)
    updates = given.updates * (LONG if arm.endswith("-long") else 1)
    epochs = max(1, round(updates / steps))
    experiment = load_experiment(given.experiment, [*overrides, f"training.epochs={epochs}"])
    weights = prepare_teacher(experiment, root).weights
    began = time.process_time()
    scores = [score(experiment, method, seed, weights, root) for seed in seeds]
    seconds = (time.process_time() - began) / len(seeds)
    each = " ".join(f"{one:.4f}" for one in scores)
    print(f"{arm:<13}{statistics.fmean(scores):.4f}  {each}  {epochs} epochs, {seconds:.1f} s each", flush=True)
    return scores


def score(experiment: Experiment, method: str, seed: int, weights: Path | None, root: Workspace) -> float:
    """Train a student and return its score on val; a training of the same recipe is read instead."""
    recipe = experiment.recipe({"method": method}, seed=seed)
    folder = TrialFolder(root.path / "students" / recipe.hash)
    done = folder.path / "score.json"
    if not done.exists():
        folder.path.mkdir(parents=True, exist_ok=True)
        trained = run_recipe(recipe, folder, RunContext(root, weights, cache_use="built"), lambda metrics: True)
        done.write_text(json.dumps(trained.metrics[experiment.metric]))
    return float(json.loads(done.read_text()))


if __name__ == "__main__":
    main()
