"""Train one recipe from files to files: weights, metrics and checkpoint in a trial's folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from heterokd import distributed
from heterokd.config.recipe import Recipe
from heterokd.networks.weights import save_weights
from heterokd.storage.disk import when_writable
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache_policy import CacheUse, training_teacher
from heterokd.teachers.prepare import open_prepared
from heterokd.training.data import open_splits, recipe_loaders, training_splits
from heterokd.training.setup import measured_precision
from heterokd.training.train import Metrics, TrainResult, train


def run_recipe(
    recipe: Recipe,
    folder: TrialFolder,
    root: Workspace,
    weights: Path | None,
    keep_going: Callable[[Metrics], bool],
    *,
    rungs: Collection[int] = (),
    save_now: Callable[[], bool] = lambda: False,
    device: torch.device | str = "cpu",
    cache: CacheUse = "found",
) -> TrainResult:
    """Train one recipe; its folder then holds metrics.jsonl, the checkpoint, and (if not stopped) the student.

    Where several workers share the training, each calls this; the first one writes.

    Args:
        recipe: what to train.
        folder: goes on from its checkpoint when it has one.
        root: remembers measured precisions.
        weights: the prepared teacher's weights.
        keep_going: told each epoch's metrics after they are on disk; False stops the training.
        rungs: epochs after which a checkpoint is written.
        save_now: see `train`.
        device: where to train.
        cache: see `training_teacher`.

    Raises:
        CacheError: the teacher's cache is damaged.
    """
    splits = training_splits(open_splits(recipe.data), root)
    live = open_prepared(recipe, weights, splits.num_classes)
    loaders = recipe_loaders(recipe, splits, device)
    teacher = training_teacher(recipe, splits, live, root, device, cache)
    precision = measured_precision(recipe, teacher, loaders, device, root)

    def report(metrics: Metrics) -> bool:
        folder.append(metrics)
        return keep_going(metrics)

    trained = train(
        recipe,
        teacher,
        loaders,
        report,
        checkpoint=folder.checkpoint,
        rungs=rungs,
        save_now=save_now,
        device=device,
        precision=precision,
        wrap=distributed.data_parallel,
    )
    if not trained.stopped and distributed.rank() == 0:
        when_writable(folder.path, lambda: save_weights(trained.student, folder.weights))
    return trained
