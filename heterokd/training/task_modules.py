"""Torch part of a task: the loss, the logits of a network for an image, and the metrics of a whole split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.outputs import IGNORE, Signal
from heterokd.tasks import TASKS, Size, TaskName
from heterokd.tasks import Task as Facts
from heterokd.training.macro_metrics import AUROC_CLASSES, MACRO_METRICS, macro_score
from heterokd.training.paired_tests import CorrectImages, ImageConfusions, ImageLogits, ImageResults

Logits = Callable[[Tensor], Tensor]
"""Function from images [B, 3, H, W] in [0, 1] to logits."""

LogitBatches = Iterable[tuple[Tensor, Tensor]]
"""Batches of logits, as `Task.logits` returns them, with their labels."""

WINDOW_STRIDE = 2 / 3
"""Stride of a sliding evaluation as a share of the window: no pixel is seen only at the border of a window."""


class Meter(Protocol):
    """Metrics of a whole split, accumulated batch by batch."""

    def update(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> None:
        """Add a batch: the result of `Task.logits`, the labels, and the teacher's predictions on the same images."""
        ...

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of every metric."""
        ...


class ClassificationTask(nn.Module):
    """One class per image: cross-entropy, top-1 and top-5 accuracy.

    Args:
        num_classes: K.
        label_smoothing: share of the label that is spread over all classes.
        window: unused.
        metric: metric of the image results, `top1` or one of `MACRO_METRICS`.

    Attributes:
        facts: names, shapes and words of the task.
        cached_signals: signals of the teacher that a cache holds.
    """

    facts: ClassVar[Facts] = TASKS["classification"]
    cached_signals: ClassVar[Signal] = Signal.LOGITS | Signal.EMBEDDING

    def __init__(
        self, num_classes: int, label_smoothing: float = 0.0, window: Size | None = None, metric: str = "top1"
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.metric = metric

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the task loss of logits [B, K] and class numbers [B] or class shares [B, K].

        A mean over the batch of each image's loss times its weight [B]. It is not divided by the weights of the batch,
        so that parts of a batch and workers add up to the whole batch.
        """
        if weights is None:
            return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        losses = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none")
        return (losses * weights).mean()

    def logits(self, network: Logits, images: Tensor) -> Tensor:
        """Return logits [B, K] of plain images [B, 3, H, W]."""
        return network(images)

    def meter(self) -> Meter:
        """Return a new meter: `top1`, `top5`, `loss`, the `MACRO_METRICS`, `agreement`."""
        return _ClassMeter(self.num_classes)

    def image_results(self, batches: LogitBatches) -> ImageResults:
        """Return whether the prediction for each image is correct; for a macro metric, its logits."""
        pairs = [(logits.float(), labels) for logits, labels in batches]
        logits, labels = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
        if self.metric in MACRO_METRICS:
            return ImageLogits(logits, labels, macro_score(self.metric, logits, labels), self.metric)
        correct = torch.eq(logits.argmax(dim=1), labels)
        return CorrectImages(correct, labels, float(correct.float().mean()))


class SegmentationTask(nn.Module):
    """One class per pixel: cross-entropy, mean intersection over union, pixel accuracy; `IGNORE` counts nowhere.

    Args:
        num_classes: K.
        label_smoothing: share of the label that is spread over all classes.
        window: height and width of the sliding window of an evaluation, in pixels; None evaluates the whole image.
        metric: metric of the image results, `miou`.

    Attributes:
        facts: names, shapes and words of the task.
        cached_signals: signals of the teacher that a cache holds: no embedding, which is a map of hundreds of channels.
    """

    facts: ClassVar[Facts] = TASKS["segmentation"]
    cached_signals: ClassVar[Signal] = Signal.LOGITS

    def __init__(
        self, num_classes: int, label_smoothing: float = 0.0, window: Size | None = None, metric: str = "miou"
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.window = window
        self.metric = metric

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the task loss of logits [B, K, h, w], resized to the labels, and label maps [B, H, W].

        Images with label maps have no weights. A mean over the labelled pixels; 0 if there are none.
        """
        loss = F.cross_entropy(
            upsample(logits, labels.shape[-2:]),
            labels,
            ignore_index=IGNORE,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return loss / (labels != IGNORE).sum().clamp(min=1)

    def logits(self, network: Logits, images: Tensor) -> Tensor:
        """Return logits [B, K, H, W] of images [B, 3, H, W]: of the whole image, or the mean over sliding windows."""
        height, width = images.shape[-2:]
        if self.window is None or (self.window[0] >= height and self.window[1] >= width):
            return upsample(network(images), (height, width))
        rows, columns = min(self.window[0], height), min(self.window[1], width)
        total = images.new_zeros(len(images), self.num_classes, height, width)
        count = images.new_zeros(height, width)
        for top in _starts(height, rows):
            for left in _starts(width, columns):
                place = (..., slice(top, top + rows), slice(left, left + columns))
                total[place] += upsample(network(images[place]), (rows, columns))
                count[place] += 1
        return total / count

    def meter(self) -> Meter:
        """Return a new meter of the metrics in `facts.metric_names`."""
        return _PixelMeter(self.num_classes)

    def image_results(self, batches: LogitBatches) -> ImageResults:
        """Return the confusion matrix of each image."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix  # SciPy and matplotlib: 95 MiB

        counts: list[Tensor] = []
        for logits, labels in batches:
            counts.extend(
                multiclass_confusion_matrix(classes, truth, self.num_classes, ignore_index=IGNORE, validate_args=False)
                for classes, truth in zip(logits.argmax(dim=1), labels, strict=True)
            )
        images = torch.stack(counts).cpu()
        return ImageConfusions(images, images.sum(dim=2), float(iou_per_class(images.sum(dim=0)).nanmean()))


Task = ClassificationTask | SegmentationTask
TASK_MODULES: dict[TaskName, type[Task]] = {
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
}


def build_task(
    name: TaskName,
    num_classes: int,
    label_smoothing: float = 0.0,
    window: Size | None = None,
    metric: str | None = None,
) -> Task:
    """Build the task of that name; its image results are compared by a metric, by default the task's score."""
    return TASK_MODULES[name](num_classes, label_smoothing, window, metric or TASKS[name].score)


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize logits [B, K, h, w] to `size` in float32: bilinear, as is usual in the field."""
    values = logits.float()
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    return F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=False)


def iou_per_class(confusion: Tensor) -> Tensor:
    """Return the intersection over union of each class, float64 [..., K]; NaN for classes that do not occur.

    Args:
        confusion: [..., K, K] pixel counts; rows are labels, columns predictions.
    """
    counts = confusion.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(-1) + counts.sum(-2) - both)  # 0 / 0 is NaN


class _ClassMeter:
    """Stores the logits of every image, K numbers each, and computes the metrics of the split at once."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.agreed: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> None:
        self.logits.append(logits.float())
        self.labels.append(labels)
        if teacher is not None:
            self.agreed.append(torch.eq(logits.argmax(dim=1), teacher))

    def compute(self) -> Iterator[tuple[str, Tensor]]:
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


class _PixelMeter:
    """Counts pixels over the whole split: a mean over batches would depend on which batches hold the rare classes."""

    def __init__(self, num_classes: int) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix  # with SciPy and matplotlib: 95 MiB

        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)
        self.loss: Tensor | float = 0.0
        self.agreed: Tensor | int = 0
        self.compared: Tensor | int | None = None

    def update(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> None:
        classes = logits.argmax(dim=1)
        self.confusion.to(logits.device).update(classes, labels)
        self.loss = self.loss + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").double()
        if teacher is not None:
            counts = labels != IGNORE
            self.agreed = self.agreed + ((classes == teacher) & counts).sum()
            self.compared = counts.sum() + (0 if self.compared is None else self.compared)

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        confusion = self.confusion.compute().cpu()
        pixels = confusion.sum().clamp(min=1)
        iou, both = iou_per_class(confusion), confusion.diagonal().double()
        yield "miou", iou.nanmean()
        yield "iou_classes", iou.isfinite().sum()
        yield "dice", (2 * both / (confusion.sum(-1) + confusion.sum(-2))).nanmean()
        yield "mean_accuracy", (both / confusion.sum(-1)).nanmean()
        yield "pixel_accuracy", confusion.diagonal().sum() / pixels
        yield "loss", torch.as_tensor(self.loss).cpu() / pixels
        if self.compared is not None:
            yield "agreement", torch.as_tensor(self.agreed).cpu() / torch.as_tensor(self.compared).cpu().clamp(min=1)


def _starts(length: int, window: int) -> list[int]:
    """Return the starts of windows that cover a side; the last window ends with the side."""
    stride = max(1, round(window * WINDOW_STRIDE))
    return [*range(0, length - window, stride), length - window]
