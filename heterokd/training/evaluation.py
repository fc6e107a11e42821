"""Evaluate a network on a split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heterokd.datasets.io.loaders import EvalLoader, Loaders
from heterokd.outputs import Batch
from heterokd.training.meters import upsample
from heterokd.training.paired_tests import ImageResults
from heterokd.training.task_modules import Logits, Task

CLASSES_BYTES = 2**30
"""Maximum size of a teacher's stored predictions on a split, at a byte per pixel."""


CHEAP = 0.15
"""Maximum share of a training's computation for evaluations after every epoch, if fewer are enough."""

UPDATE_PASSES = 3
"""Forward passes that take the time of an update's forward and backward pass; the teacher's is not counted."""


def is_cheap(loaders: Loaders) -> bool:
    """Whether evaluations after every epoch are a small share of a training; counted: the same on all machines."""
    val, train = len(loaders.val.split), UPDATE_PASSES * loaders.train.images_per_epoch
    return val <= CHEAP * (val + train)


@contextmanager
def inference(network: nn.Module) -> Iterator[Logits]:
    """Yield the network as a function from images to logits, in evaluation mode and without gradients."""

    def logits_of(images: Tensor) -> Tensor:
        outputs = network(images)
        return outputs if isinstance(outputs, Tensor) else outputs.logits

    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield logits_of
    finally:
        network.train(was_training)


def predict(network: nn.Module, loader: Iterable[Batch], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return logits [N, K] in float32 and labels [N] of a classification split, in the order of the split.

    Args:
        network: maps images [B, 3, H, W] in [0, 1] to `Outputs` or to logits [B, K]; its mode is restored afterwards.
        loader: batches of plain (not augmented) images.
        device: device of `network`.
    """
    logits, labels = [], []
    with inference(network) as logits_of:
        for batch in loader:
            logits.append(logits_of(batch.images.to(device, non_blocking=True)).float())
            labels.append(batch.labels)
    return torch.cat(logits).cpu(), torch.cat(labels)


def predict_classes(
    network: nn.Module, loader: EvalLoader, device: torch.device | str = "cpu", size: tuple[int, ...] = ()
) -> Tensor | None:
    """Return predicted classes on a split, in the order of the split: [N], or [N, H, W] uint8 in segmentation.

    The maps have the height and width `size`, or else that of the images; None if they would take more than
    `CLASSES_BYTES`.
    """
    classes: list[Tensor] = []
    with inference(network) as logits_of:
        for batch in loader:
            images = batch.images.to(device, non_blocking=True)
            if batch.labels.dim() == 1:
                classes.append(logits_of(images).argmax(dim=1))
                continue
            height, width = size or images.shape[-2:]
            if len(loader.split) * height * width > CLASSES_BYTES:
                return None
            classes.append(upsample(logits_of(images), (height, width)).argmax(dim=1).to(torch.uint8))
    return torch.cat(classes)


def evaluate(
    network: nn.Module,
    loader: Iterable[Batch],
    task: Task,
    *,
    teacher_classes: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, float]]:
    """Yield the task's metrics of a network on a split: (`top1`, `top5`, `loss`, `agreement`), or (`miou`, ...).

    Args:
        network: see `predict`.
        loader: batches of plain images.
        task: defines the metrics.
        teacher_classes: [N] or [N, Hc, Wc] the teacher's predictions on the same split; `agreement` is the share on
            which student and teacher agree.
        device: device of `network`.
    """
    meter = task.meter()
    with inference(network) as logits_of:
        for batch in loader:
            for answer in task.answers(logits_of, batch, device):
                teacher = None
                if teacher_classes is not None:
                    teacher = teacher_classes[answer.index.to(teacher_classes.device)].to(device)
                meter.update(answer, teacher)
        for name, value in meter.compute():
            yield name, float(value)


def image_results(
    network: nn.Module, loader: Iterable[Batch], task: Task, device: torch.device | str = "cpu"
) -> ImageResults:
    """Return a network's results on each image of a split, for paired tests; see `evaluate` for the arguments."""
    with inference(network) as logits_of:
        return task.image_results(answer for batch in loader for answer in task.answers(logits_of, batch, device))
