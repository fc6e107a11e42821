"""Metrics of a whole split, accumulated image by image, and the pixels that they count."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from heterokd.datasets.io.loaders import EVAL_SCORES
from heterokd.outputs import IGNORE
from heterokd.training.macro_metrics import AUROC_CLASSES, MACRO_METRICS, macro_score

BOUNDARY = 0.02
"""Width of the band around boundaries as a share of the image's diagonal (Cheng et al., "Boundary IoU", CVPR 2021)."""

CURVES = 24
"""Maximum number of classes whose IoU is a metric of its own, in each epoch."""
CLASS_IOU = "iou/"
"""Beginning of the names of these metrics; the number of the class follows."""


@dataclass(frozen=True, eq=False)
class Answer:
    """Logits of images, with what they are compared with.

    Attributes:
        logits: as `Task.logits` returns them: [B, K], or [B, K, h, w].
        labels: [B], or [B, h, w] at the size of the logits.
        index: [B] positions in the split.
        own_labels: label maps [H, W] at their own sizes, which are counted; None: `labels` are.
    """

    logits: Tensor
    labels: Tensor
    index: Tensor
    own_labels: tuple[Tensor, ...] | None = None


class Meter(Protocol):
    """Metrics of a whole split, accumulated batch by batch."""

    def update(self, answer: Answer, teacher: Tensor | None = None) -> None:
        """Add images, and the teacher's predictions on them: [B], or [B, Hc, Wc] on the canvas."""
        ...

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of every metric."""
        ...


class ClassMeter:
    """Stores the logits of every image, K numbers each, and computes the metrics of the split at once."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.agreed: list[Tensor] = []

    def update(self, answer: Answer, teacher: Tensor | None = None) -> None:
        """See `Meter`."""
        self.logits.append(answer.logits.float())
        self.labels.append(answer.labels)
        if teacher is not None:
            self.agreed.append(torch.eq(answer.logits.argmax(dim=1), teacher))

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `top1`, `top5`, `loss`, the `MACRO_METRICS`, `agreement`."""
        logits, labels = torch.cat(self.logits).cpu(), torch.cat(self.labels).cpu()
        for name, top_k in (("top1", 1), ("top5", 5)):
            if top_k <= self.num_classes:
                among = (logits.topk(top_k, dim=1).indices == labels[:, None]).any(dim=1)
                yield name, among.float().mean()
        yield "loss", F.cross_entropy(logits, labels)
        for name in MACRO_METRICS:
            if name == "auroc" and self.num_classes > AUROC_CLASSES:
                continue
            value = macro_score(name, logits, labels)
            if math.isfinite(value):  # images of a single class have no AUROC
                yield name, torch.tensor(value)
        if self.agreed:
            yield "agreement", torch.cat(self.agreed).float().mean()


class PixelMeter:
    """Counts pixels over the whole split: a mean over batches would depend on which batches hold the rare classes."""

    def __init__(self, num_classes: int) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix  # with SciPy and matplotlib: 95 MiB

        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)
        self.boundary = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)
        self.loss: Tensor | float = 0.0
        self.pixels: Tensor | int = 0
        self.agreed: Tensor | int = 0
        self.compared: Tensor | int | None = None

    def update(self, answer: Answer, teacher: Tensor | None = None) -> None:
        """See `Meter`."""
        logits, labels = answer.logits, answer.labels
        for counts in (self.confusion, self.boundary):
            counts.to(logits.device)
        for classes, truth in counted_pixels(answer):
            self.confusion.update(classes, truth)
            self.boundary.update(classes, truth.masked_fill(~near_boundaries(truth), IGNORE))
        self.loss = self.loss + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").double()
        counted = labels != IGNORE
        self.pixels = self.pixels + counted.sum()
        if teacher is not None:
            same = logits.argmax(dim=1) == teacher[:, : labels.shape[1], : labels.shape[2]]
            self.agreed = self.agreed + (same & counted).sum()
            self.compared = counted.sum() + (0 if self.compared is None else self.compared)

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the metrics of segmentation; those of classes are means over the classes that occur."""
        confusion = self.confusion.compute().cpu()
        iou, both = iou_per_class(confusion), confusion.diagonal().double()
        yield "miou", iou.nanmean()
        yield "iou_classes", iou.isfinite().sum()
        for number in iou.isfinite().nonzero().flatten().tolist() if len(iou) <= CURVES else ():
            yield f"{CLASS_IOU}{number}", iou[number]
        yield "dice", (2 * both / (confusion.sum(-1) + confusion.sum(-2))).nanmean()
        yield "mean_accuracy", (both / confusion.sum(-1)).nanmean()
        yield "pixel_accuracy", both.sum() / confusion.sum().clamp(min=1)
        band = self.boundary.compute().cpu()
        if band.sum():  # images of a single class have no boundaries
            yield "boundary_iou", iou_per_class(band).nanmean()
        yield "loss", torch.as_tensor(self.loss).cpu() / torch.as_tensor(self.pixels).cpu().clamp(min=1)
        if self.compared is not None:
            yield "agreement", torch.as_tensor(self.agreed).cpu() / torch.as_tensor(self.compared).cpu().clamp(min=1)


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize logits [B, K, h, w] to `size` in float32: bilinear, as is usual in the field."""
    values = logits.float()
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    return F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=False)


def named_metrics(metrics: Iterable[tuple[str, float]], class_names: Sequence[str]) -> dict[str, float]:
    """Return metrics by `val/NAME`; those of a class have its name, as far as MLflow takes its characters."""
    named: dict[str, float] = {}
    for name, value in metrics:
        number = name.removeprefix(CLASS_IOU)
        if number != name and class_names:
            plain = re.sub(r"[^A-Za-z0-9_\- ]", "_", class_names[int(number)]).strip()
            is_new = plain.strip("_") and f"val/{CLASS_IOU}{plain}" not in named
            name = f"{CLASS_IOU}{plain if is_new else number}"
        named[f"val/{name}"] = value
    return named


def classes_at(scores: Tensor, size: tuple[int, int] | torch.Size, at_once: int = EVAL_SCORES) -> Tensor:
    """Return the classes [H, W] of scores [K, h, w] resized to a size, at most `at_once` scores at a time."""
    step = max(1, at_once // math.prod(size))
    best, classes = upsample(scores[None, :step], size)[0].max(dim=0)
    for start in range(step, len(scores), step):
        score, place = upsample(scores[None, start : start + step], size)[0].max(dim=0)
        classes = torch.where(score > best, place + start, classes)
        best = torch.maximum(score, best)
    return classes


def counted_pixels(answer: Answer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield predicted classes and labels of each image, [H, W] each, at the size at which its pixels are counted."""
    if answer.own_labels is None:
        yield from zip(answer.logits.argmax(dim=1), answer.labels, strict=True)
        return
    for scores, own in zip(answer.logits, answer.own_labels, strict=True):
        yield classes_at(scores, own.shape), own.to(scores.device).long()


def near_boundaries(labels: Tensor) -> Tensor:
    """Return which labelled pixels [H, W] are within `BOUNDARY` of a pixel of another class."""
    width = max(1, round(BOUNDARY * math.hypot(*labels.shape)))
    known = (labels != IGNORE)[None]
    changes = torch.zeros_like(known)
    for axis in (1, 2):
        length = labels.shape[axis - 1] - 1
        before, after = labels[None].narrow(axis, 0, length), labels[None].narrow(axis, 1, length)
        differ = (before != after) & (before != IGNORE) & (after != IGNORE)
        changes.narrow(axis, 0, length).logical_or_(differ)
        changes.narrow(axis, 1, length).logical_or_(differ)
    band = changes.float()
    for kernel, padding in (((2 * width - 1, 1), (width - 1, 0)), ((1, 2 * width - 1), (0, width - 1))):
        band = F.max_pool2d(band, kernel, stride=1, padding=padding)
    return (band > 0)[0] & known[0]


def iou_per_class(confusion: Tensor) -> Tensor:
    """Return the intersection over union of each class, float64 [..., K]; NaN for classes that do not occur.

    Args:
        confusion: [..., K, K] pixel counts; rows are labels, columns predictions.
    """
    counts = confusion.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(-1) + counts.sum(-2) - both)  # 0 / 0 is NaN
