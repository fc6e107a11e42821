"""Train a recipe; write weights, metrics and checkpoints to its trial's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from heterokd.config.recipe import Recipe
from heterokd.outputs import Signal
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.sync import FolderSync
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache_policy import CacheUse, training_teacher
from heterokd.teachers.prepare import open_prepared
from heterokd.training.data import open_splits, recipe_loaders, training_splits
from heterokd.training.evaluation import is_cheap
from heterokd.training.setup import measured_precision
from heterokd.training.student import save_student
from heterokd.training.train import Metrics, Report, TrainOptions, TrainResult, train

if TYPE_CHECKING:
    from heterokd.execution.this_node import NodeCheck  # imports Ray, which a training in this process does not need


@dataclass(frozen=True)
class RunContext:
    """Where and how a training runs; nothing here changes its result.

    Attributes:
        workspace: holds caches, decoded images and measured precisions.
        teacher_weights: file of the prepared teacher's weights; None: timm's published ones.
        device: device to train on.
        cache_use: whether the teacher's cache is built, shared or only read, see `CacheUse`.
        cache_signals: what other trainings of the search read from the same cache.
        checkpoint_epochs: epochs after which a checkpoint is written.
        evaluated_epochs: epochs whose metrics on val are needed; the others are evaluated where that is cheap. None:
            all are needed.
        save_now: called after each epoch; True writes a checkpoint, since the node is about to be preempted.
        check: what the nodes of workers are compared with; None on a local Ray.
        avoid: ids of nodes on which workers do not run.
        mirror: sync of the trial's folder, through whose store workers on several nodes exchange files; None: they
            share the folder.
    """

    workspace: Workspace
    teacher_weights: Path | None
    device: torch.device | str = "cpu"
    cache_use: CacheUse = "found"
    cache_signals: Signal = Signal.NONE
    checkpoint_epochs: tuple[int, ...] = ()
    evaluated_epochs: frozenset[int] | None = None
    save_now: Callable[[], bool] = lambda: False
    check: NodeCheck | None = None
    avoid: tuple[str, ...] = ()
    mirror: FolderSync | None = None


class RunRecipe(Protocol):
    """Trains a recipe in a trial's folder: `run_recipe` in this process, `OnWorkers` on several."""

    def __call__(self, recipe: Recipe, folder: TrialFolder, context: RunContext, on_epoch: Report) -> TrainResult:
        """See `run_recipe`."""


def run_recipe(recipe: Recipe, folder: TrialFolder, context: RunContext, on_epoch: Report) -> TrainResult:
    """Train a recipe; its folder then holds metrics.jsonl, the checkpoint, and (if not stopped) the student.

    Each worker of a sharded training calls this; rank 0 writes.

    Args:
        recipe: training to run.
        folder: trial folder; training resumes from its checkpoint if it has any.
        context: workspace, teacher weights, device and checkpoints.
        on_epoch: called with each epoch's metrics after they are on disk; False stops the training.

    Raises:
        CacheError: the teacher's cache is damaged.
    """
    workspace, device = context.workspace, context.device
    splits = training_splits(open_splits(recipe.data), workspace, recipe.data.pixels_max_gb)
    live = open_prepared(recipe, context.teacher_weights, splits.num_classes, workspace)
    loaders = recipe_loaders(recipe, splits, device)
    use, signals = context.cache_use, context.cache_signals
    teacher = training_teacher(recipe, splits, live, workspace, device, use, signals)
    precision = measured_precision(recipe, teacher, loaders, device, workspace)

    def report(metrics: Metrics) -> bool:
        folder.append(metrics)
        return on_epoch(metrics)

    options = TrainOptions(
        checkpoint=folder.checkpoint,
        checkpoint_epochs=context.checkpoint_epochs,
        evaluated_epochs=None if is_cheap(loaders) else context.evaluated_epochs,
        save_now=context.save_now,
        device=device,
        precision=precision,
        # An epoch whose report was damaged is trained again.
        newest_epoch=folder.reported_epochs(),
    )
    trained = train(recipe, teacher, loaders, report, options)
    if not trained.stopped:
        save_student(trained.student, folder.weights)
    return trained
