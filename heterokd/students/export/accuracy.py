"""Measure what a format that is not exact costs: the student's metric on val, before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import EvalLoader
from heterokd.datasets.io.split import Split, Splits
from heterokd.networks.network import AnyNetwork, deployable
from heterokd.students.export.parity import Written
from heterokd.tasks import TASKS
from heterokd.training.evaluation import evaluate
from heterokd.training.task_modules import build_task

BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """A metric on val of a student and of its exported file.

    Attributes:
        metric: name of the metric.
        student: value of the student.
        file: value of the file.
    """

    metric: str
    student: float
    file: float

    @property
    def drop(self) -> float:
        """What the file loses; negative if it is better."""
        return self.student - self.file


class _Served(nn.Module):
    """An exported file as a module; images have the height and width that it takes."""

    def __init__(self, run: Callable[[Tensor], Tensor], size: tuple[int, int] | None) -> None:
        super().__init__()
        self._run, self._size = run, size

    def forward(self, images: Tensor) -> Tensor:
        return self._run((images if self._size is None else _resized(images, self._size)).contiguous())


def calibration_images(train: Split, count: int, size: tuple[int, int]) -> Tensor | None:
    """Return plain training images at a size, [N, 3, H, W] in [0, 1], evenly spaced; None if `count` is 0.

    Args:
        train: training images.
        count: maximum number.
        size: height and width in pixels.
    """
    if not count:
        return None
    index = np.unique(np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(np.int64))
    batches = EvalLoader(replace(train.chosen(index), extents=None), BATCH)
    return torch.cat([_resized(batch.images, size) for batch in batches])


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def accuracy_on_val(network: AnyNetwork, written: Written, recipe: Recipe, splits: Splits) -> Accuracy:
    """Evaluate a student and its file on all images of val.

    Args:
        network: the trained student, in evaluation mode, on the CPU.
        written: its file.
        recipe: recipe of its training.
        splits: data set that it was trained on.
    """
    task = build_task(recipe.task, splits.num_classes, 0.0, recipe.data.inference)
    name = TASKS[recipe.task].score
    student, file = (
        dict(evaluate(module, EvalLoader(splits.val, BATCH, counted=True), task))[name]
        for module in (deployable(network), _Served(written.opened.run, written.size))
    )
    return Accuracy(f"val/{name}", student, file)
