"""Fill the folder of a fitted teacher: its weights, its recipe, and its card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

import heterokd.distributed as distributed
from heterokd.config.recipe import Recipe
from heterokd.config.search import score_of
from heterokd.datasets.io.split import Splits
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import weights_hash
from heterokd.storage.files import write_text
from heterokd.storage.teacher_card import TeacherCard, classes_in
from heterokd.storage.workspace import CHECKPOINTS, Workspace
from heterokd.teachers.diagnosis import diagnose
from heterokd.teachers.fit import FIT_FILES, FitContext, fit_teacher
from heterokd.teachers.folders import CARD, WEIGHTS
from heterokd.training.data import open_splits, training_splits
from heterokd.training.precision import default_device
from heterokd.training.student import save_student
from heterokd.training.train import Report

TEMPORARY = (*CHECKPOINTS, *FIT_FILES)
"""Files from which an interrupted fit is resumed; deleted after the fit."""


SAVES = 10
"""`saves` of a fit on a cluster: a process that dies costs a tenth of the fit, or a minute and an epoch."""


@dataclass(frozen=True)
class Fold:
    """A part of the training images that a teacher does not see, see `Splits.without_fold`.

    Attributes:
        number: number of the fold, from 0.
        count: number of folds.
        seed: seed of the folds.
    """

    number: int
    count: int
    seed: int


class FitInto(Protocol):
    """Fits a teacher into its folder: `fit_into` in this process, or on several workers."""

    def __call__(
        self, recipe: Recipe, folder: Path, workspace: Workspace, report: Report, *, fold: Fold | None = None
    ) -> None:
        """See `fit_into`."""


# More parameters than `FitInto` has: a process on a cluster knows its device, and may be killed.
def fit_into(
    recipe: Recipe,
    folder: Path,
    workspace: Workspace,
    report: Report,
    *,
    fold: Fold | None = None,
    device: torch.device | str | None = None,
    save_now: Callable[[], bool] = lambda: False,
    saves: int = 0,
) -> None:
    """Fit a teacher and write weights, recipe.yaml and teacher.json; each rank of a sharded fit calls it.

    Args:
        recipe: of `teacher_recipe`, with local files.
        folder: folder of the teacher; the fit resumes from its checkpoint if there is one.
        workspace: holds decoded images and measured precisions.
        report: called by rank 0 with the metrics of each epoch; False ends the fit.
        fold: images that it does not see.
        device: device of the fit; None: the GPU if there is one.
        save_now: see `FitContext`.
        saves: see `FitContext`.

    Raises:
        UserError: see `fit_teacher`.
    """
    device = default_device() if device is None else device
    largest = recipe.data.pixels_max_gb
    splits = training_splits(open_splits(recipe.data), workspace, largest)
    if fold is not None:
        splits = training_splits(splits.without_fold(fold.number, fold.count, fold.seed), workspace, largest)
    fitted = fit_teacher(recipe, splits, FitContext(workspace, folder, device, save_now, saves), report)
    if distributed.rank() != 0:
        return
    with distributed.alone():
        save_student(fitted.network, folder / WEIGHTS)
        settings = recipe.teacher
        start = "" if settings.start_from is None else f" from {settings.start_from}"
        source = f"fitted {settings.network}{start}"
        card = describe_teacher(recipe, fitted.network, splits, fitted.metrics, source, str(device))
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        write_text(folder / CARD, replace(card, reason=fitted.reason).to_json())


def describe_teacher(
    recipe: Recipe, network: AnyNetwork, splits: Splits, metrics: Mapping[str, float], source: str, device: str
) -> TeacherCard:
    """Return the card of a teacher, which is diagnosed on val and on a sample of train; `metrics` are those on val."""
    teacher, metric = recipe.teacher, score_of(recipe.task)
    folds = None if teacher.cross_fit is None else splits.folds(teacher.cross_fit, teacher.training.seed)
    return TeacherCard(
        network=teacher.network,
        options=dict(teacher.options),
        num_classes=network.spec.num_classes,
        image_size=network.spec.image_size,
        weights=weights_hash(network),
        metric=metric,
        val_score=metrics[metric],
        source=source,
        iou_classes=classes_in(metric, metrics),
        **vars(diagnose(network, splits, device, folds)),
    )
