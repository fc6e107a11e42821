"""Fit a teacher: solve its classifier on frozen features, fine-tune from there, or train all weights.

Fine-tuning starts from the solved classifier, as linear probing then fine-tuning does (Kumar et al., ICLR 2022,
https://arxiv.org/abs/2202.10054), with a small learning rate that falls from layer to layer (layer decay: Bao et al.,
"BEiT", ICLR 2022, https://arxiv.org/abs/2106.08254).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import heterokd.distributed as distributed
from heterokd.config.networks import Fit
from heterokd.config.recipe import Recipe
from heterokd.config.search import score_of
from heterokd.config.training import TrainingSettings
from heterokd.datasets.io.loaders import Loaders
from heterokd.datasets.io.split import Splits
from heterokd.errors import ConfigError
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import load_weights, save_weights
from heterokd.storage.files import write_file
from heterokd.storage.study_dir import CHECKPOINT
from heterokd.storage.teacher_card import score_text
from heterokd.storage.workspace import Workspace
from heterokd.teachers.head import linear_head, solve_head
from heterokd.training.best_epoch import BestEpoch
from heterokd.training.data import recipe_draws, recipe_loaders
from heterokd.training.evaluation import evaluate
from heterokd.training.precision import Precision
from heterokd.training.setup import measured_precision
from heterokd.training.student import build_student, save_student
from heterokd.training.task_modules import build_task
from heterokd.training.train import Report, TrainOptions, train

FIT_FILES = (HEAD, BEST, BEST_SCORE) = ("head.safetensors", "best.safetensors", "best.json")
"""Weights with the solved classifier, and of the best epoch with its score; deleted after the fit."""

LEARNING_RATE_SHARE = 0.2
"""Learning rate of fine-tuning as a share of `teacher.training.learning_rate`, which is one for random weights."""
EPOCHS_SHARE, LEAST_EPOCHS = 0.1, 5
"""Epochs of fine-tuning: a share of `teacher.training.epochs`, and at least this number of them."""
LAYER_DECAY = 0.75
"""Layer decay of fine-tuning, unless `teacher.training.layer_decay` is set; usual values are 0.65 to 0.85."""

PATIENCE_SHARE, LEAST_PATIENCE = 1 / 6, 3
"""Epochs without a better score after which a fit ends: a share of all epochs, and at least this number."""


@dataclass(frozen=True)
class FittedTeacher:
    """A fitted teacher.

    Attributes:
        network: with the weights that are kept, on the device of the fit.
        metrics: score on val, and of an mIoU the number of classes in the mean.
        reason: which weights are kept, and why, as a phrase.
    """

    network: AnyNetwork
    metrics: Mapping[str, float]
    reason: str


@dataclass(frozen=True)
class FitContext:
    """Where a teacher is fitted; nothing here changes the result.

    Attributes:
        workspace: remembers measured precisions.
        folder: folder of the teacher; of a sharded fit, this rank's copy, or a folder that all ranks share.
        device: device of the fit.
        save_now: called after each epoch; True writes a checkpoint, since the node is about to be preempted.
        saves: number of checkpoints that are written in any case, evenly over the epochs.
    """

    workspace: Workspace
    folder: Path
    device: torch.device | str
    save_now: Callable[[], bool] = lambda: False
    saves: int = 0


@dataclass(frozen=True)
class _Fit:
    """What every fit reads."""

    recipe: Recipe
    splits: Splits
    context: FitContext
    report: Report

    @property
    def folder(self) -> Path:
        return self.context.folder

    @property
    def device(self) -> torch.device | str:
        return self.context.device

    @property
    def metric(self) -> str:
        return score_of(self.recipe.task)

    def score_name(self, score: float) -> str:
        return score_text(self.metric, score)

    def precision(self, recipe: Recipe, loaders: Loaders) -> Precision:
        return measured_precision(recipe, None, loaders, self.device, self.context.workspace)

    def options(
        self, recipe: Recipe, precision: Precision, best: BestEpoch | None, start: Path | None = None
    ) -> TrainOptions:
        epochs, saves = recipe.training.epochs, self.context.saves
        return TrainOptions(
            self.folder / CHECKPOINT,
            checkpoint_epochs={math.ceil(epochs * number / saves) for number in range(1, saves)},
            save_now=self.context.save_now,
            device=self.device,
            precision=precision,
            start=start,
            best=best,
        )

    def evaluate(self, network: AnyNetwork, loaders: Loaders) -> float:
        """Evaluate on val: rank 0 does, and all ranks get the score."""
        score = 0.0
        if distributed.rank() == 0:
            task = build_task(self.recipe.task, loaders.num_classes, inference=self.recipe.data.inference)
            metrics = dict(evaluate(network, loaders.val, task, device=self.device))
            score = metrics[task.facts.score]
        return distributed.broadcast(score)


def fit_teacher(recipe: Recipe, splits: Splits, context: FitContext, report: Report) -> FittedTeacher:
    """Fit a teacher as `teacher.fit` says; an interrupted fit is resumed from the files in its folder.

    In a sharded fit each rank calls it, with its shard of every batch; the result holds on rank 0.

    Args:
        recipe: of `teacher_recipe`.
        splits: all training images.
        context: workspace, folder and device.
        report: called by rank 0 with the metrics of each epoch, and of the solved classifier as epoch 0; False ends
            the fit.

    Raises:
        ConfigError: `teacher.fit` solves the classifier, and the network's is not a linear layer on its embedding.
    """
    fit = _Fit(recipe, splits, context, report)
    how = planned_fit(recipe)
    if how in ("head", "head_then_all"):
        torch.manual_seed(recipe.training.seed)
        start = build_student(recipe, splits.num_classes)
        if linear_head(start) is not None:
            return _fit_head(fit, start, fine_tune=how == "head_then_all")
        if recipe.teacher.fit != "auto":
            raise ConfigError(
                f"teacher.fit: {how}: the classifier of {recipe.teacher.network} is not a linear layer on its "
                "embedding; set teacher.fit: all"
            )
    return _fit_all(fit, stops=recipe.teacher.fit == "auto")


def planned_fit(recipe: Recipe) -> Fit:
    """Return how a teacher is fitted: `teacher.fit`, with `auto` resolved."""
    settings = recipe.teacher
    if settings.fit != "auto":
        return settings.fit
    if not settings.has_start:
        return "all"
    return "head" if recipe.training.trainable == "head" else "head_then_all"


def fine_tuning(training: TrainingSettings) -> TrainingSettings:
    """Return the settings of fine-tuning from a solved classifier, given `teacher.training`."""
    epochs = max(min(training.epochs, LEAST_EPOCHS), round(training.epochs * EPOCHS_SHARE))
    changes = {
        "epochs": epochs,
        "warmup_epochs": training.warmup_epochs * epochs / training.epochs,
        "learning_rate": training.learning_rate * LEARNING_RATE_SHARE,
        "min_learning_rate": training.min_learning_rate * LEARNING_RATE_SHARE,
        # The solved classifier belongs to features of the running statistics, which a few epochs do not replace: some
        # of timm's batch norms move them by a hundredth in a step.
        "freeze_batch_norm": True,
        "layer_decay": LAYER_DECAY if training.layer_decay is None else training.layer_decay,
    }
    return training.model_copy(update=changes)


def patience(epochs: int) -> int:
    """Return the number of epochs without a better score after which a fit of `epochs` ends."""
    return max(LEAST_PATIENCE, round(epochs * PATIENCE_SHARE))


def _fit_all(fit: _Fit, *, stops: bool) -> FittedTeacher:
    """Train all weights: to the last epoch, or until the score stops improving, and keep the best epoch."""
    recipe, epochs = fit.recipe, fit.recipe.training.epochs
    loaders = recipe_loaders(recipe, fit.splits, fit.device)
    best = BestEpoch(fit.folder / BEST, fit.metric, patience(epochs)) if stops else None
    trained = train(recipe, None, loaders, fit.report, fit.options(recipe, fit.precision(recipe, loaders), best))
    if best is None:
        return FittedTeacher(trained.student, trained.metrics, f"after {trained.epochs} epochs")
    if distributed.rank() == 0:
        load_weights(trained.student, best.file)
    reason = f"the best of {trained.epochs} epochs is number {best.epoch}"
    if trained.epochs < epochs:
        reason += f"; stopped before epoch {epochs}, because {best.patience} epochs brought nothing better"
    return FittedTeacher(trained.student, best.metrics, reason)


def _fit_head(fit: _Fit, network: AnyNetwork, *, fine_tune: bool) -> FittedTeacher:
    """Solve the classifier; then fine-tune all weights and keep the better."""
    settings = fine_tuning(fit.recipe.training)
    recipe = fit.recipe.model_copy(update={"training": settings})
    loaders = recipe_loaders(recipe, fit.splits, fit.device)
    precision = fit.precision(recipe, loaders)
    file = fit.folder / HEAD
    network.to(fit.device)
    if distributed.rank() == 0:
        if file.exists():  # of an interrupted fit
            load_weights(network, file)
        else:
            _solve(fit, network, precision)
            save_student(network, file)
    _share_head(network, file)
    solved = fit.evaluate(network, loaders)
    go_on = distributed.broadcast(distributed.rank() != 0 or fit.report({"epoch": 0, fit.metric: solved}))
    if not fine_tune or not go_on:
        return FittedTeacher(network, {fit.metric: solved}, "its classifier is solved on frozen features")
    best = BestEpoch(fit.folder / BEST, fit.metric, patience(settings.epochs))
    trained = train(recipe, None, loaders, fit.report, fit.options(recipe, precision, best, file))
    if best.score <= solved:  # on other ranks than 0, whose result nobody reads, it is minus infinity
        reason = (
            f"its classifier is solved on frozen features; {trained.epochs} epochs of fine-tuning reached "
            f"{fit.score_name(best.score)}, not more"
        )
        return FittedTeacher(network, {fit.metric: solved}, reason)
    load_weights(trained.student, best.file)
    reason = (
        f"fine-tuned, epoch {best.epoch} of {trained.epochs}; with a classifier solved on frozen features it had "
        f"{fit.score_name(solved)}"
    )
    return FittedTeacher(trained.student, best.metrics, reason)


def _share_head(network: AnyNetwork, file: Path) -> None:
    """Give all ranks the solved classifier of rank 0, and the file of a rank with its own folder."""
    if distributed.size() == 1:
        return
    solved = {name: tensor.cpu() for name, tensor in network.head.state_dict().items()}
    network.head.load_state_dict(distributed.broadcast(solved))
    if not file.exists():
        write_file(file, lambda partial: save_weights(network, partial))


def _solve(fit: _Fit, network: AnyNetwork, precision: Precision) -> None:
    """Replace the network's classifier by the solution on its frozen features."""
    head = linear_head(network)
    assert head is not None  # checked by `fit_teacher`
    if precision.channels_last:
        network.to(memory_format=torch.channels_last)
    flip, seed = fit.recipe.data.policy.flip > 0, fit.recipe.training.seed
    importance = recipe_draws(fit.recipe.training, fit.splits).importance
    images = fit.splits.train
    solved = solve_head(network, images, flip=flip, seed=seed, precision=precision, importance=importance)
    with torch.no_grad():
        head.weight.copy_(solved.weight)
        if head.bias is not None:
            head.bias.copy_(solved.bias)
