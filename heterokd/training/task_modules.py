"""The torch side of a task: its loss, how a network decides on an image, and the metrics of a whole split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.outputs import IGNORE, Signal
from heterokd.tasks import TASKS, Size, TaskName
from heterokd.tasks import Task as Facts
from heterokd.training.paired_tests import CorrectImages, ImageConfusions, ImageResults

Logits = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [0, 1] to class scores before softmax."""

Decided = Iterable[tuple[Tensor, Tensor]]
"""Batches of what `decide` gave, and the labels."""

# Neighbouring windows of a sliding evaluation share a third of their side, so that no pixel is judged at a border only.
WINDOW_STRIDE = 2 / 3


class Meter(Protocol):
    """Metrics of a whole split, added up batch by batch."""

    def update(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> None:
        """Add a batch: what `decide` gave, the labels, and the teacher's decisions on the same images."""
        ...

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every metric."""
        ...


class ClassificationTask(nn.Module):
    """One class per image: cross-entropy, top-1 and top-5 accuracy.

    Args:
        num_classes: K.
        label_smoothing: share of the label that is spread over all classes.

    Attributes:
        facts: names, shapes and words.
        cached_signals: what a cache of the teacher's outputs holds.
    """

    facts: ClassVar[Facts] = TASKS["classification"]
    cached_signals: ClassVar[Signal] = Signal.LOGITS | Signal.EMBEDDING

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, window: Size | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The task loss: logits [B, K] against class numbers [B] or class shares [B, K], a mean over the batch."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)

    def metrics(self, logits: Tensor, labels: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(`top1`, `top5`, `loss`) over a whole split: logits [N, K], class numbers [N]; shares in [0, 1]."""
        for name, top_k in (("top1", 1), ("top5", 5)):
            if top_k <= self.num_classes:
                among = (logits.topk(top_k, dim=1).indices == labels[:, None]).any(dim=1)
                yield name, among.float().mean()
        yield "loss", F.cross_entropy(logits.float(), labels)

    def decide(self, network: Logits, images: Tensor) -> Tensor:
        """Class scores [B, K] of plain images [B, 3, H, W]."""
        return network(images)

    def meter(self) -> Meter:
        """A meter that has seen no batch."""
        return _ClassMeter(self)

    def image_results(self, decided: Decided) -> ImageResults:
        """Whether each image is right, from batches of class scores and labels."""
        pairs = [(scores.float(), labels) for scores, labels in decided]
        logits, labels = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
        correct = torch.eq(logits.argmax(dim=1), labels)
        return CorrectImages(correct, labels, float(correct.float().mean()))


class SegmentationTask(nn.Module):
    """One class per pixel: cross-entropy, mean intersection over union, pixel accuracy; `IGNORE` counts nowhere.

    Args:
        num_classes: K.
        label_smoothing: share of the label that is spread over all classes.
        window: height and width of the windows that slide over an image in evaluation, in pixels; None evaluates the
            image as a whole.

    Attributes:
        facts: names, shapes and words.
        cached_signals: what a cache of the teacher's outputs holds: not the embedding, a map of hundreds of channels.
    """

    facts: ClassVar[Facts] = TASKS["segmentation"]
    cached_signals: ClassVar[Signal] = Signal.LOGITS

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, window: Size | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.window = window

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The task loss: logits [B, K, h, w], brought to the labels' size, against label maps [B, H, W].

        A mean over the pixels that count; 0 where none does.
        """
        scores = upsample(logits, labels.shape[-2:])
        total = F.cross_entropy(
            scores, labels, ignore_index=IGNORE, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / (labels != IGNORE).sum().clamp(min=1)

    def decide(self, network: Logits, images: Tensor) -> Tensor:
        """Class scores [B, K, H, W] of images [B, 3, H, W]: from the whole image, or the mean over sliding windows."""
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
        """A meter that has seen no batch."""
        return _PixelMeter(self.num_classes)

    def image_results(self, decided: Decided) -> ImageResults:
        """The confusion matrix of each image, from batches of class scores and label maps."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix  # SciPy and matplotlib: 95 MiB

        counts: list[Tensor] = []
        for scores, labels in decided:
            counts.extend(
                multiclass_confusion_matrix(one, those, self.num_classes, ignore_index=IGNORE, validate_args=False)
                for one, those in zip(scores.argmax(dim=1), labels, strict=True)
            )
        images = torch.stack(counts).cpu()
        return ImageConfusions(images, images.sum(dim=2), float(iou_per_class(images.sum(dim=0)).nanmean()))


Task = ClassificationTask | SegmentationTask
TASK_MODULES: dict[TaskName, type[Task]] = {
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
}


def build_task(name: TaskName, num_classes: int, label_smoothing: float = 0.0, window: Size | None = None) -> Task:
    """The task of that name; only segmentation reads `window`."""
    return TASK_MODULES[name](num_classes, label_smoothing, window)


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Score maps [B, K, h, w] at another size, in float32; bilinear, as is the field's habit (classes keep theirs)."""
    scores = logits.float()
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


def iou_per_class(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, float64 [..., K].

    Args:
        confusion: [..., K, K] pixel counts, rows are labels and columns decisions.

    Returns:
        NaN for classes that neither labels nor decisions hold: they have no say in the mean.
    """
    counts = confusion.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(-1) + counts.sum(-2) - both)  # 0 / 0 is NaN


class _ClassMeter:
    """Keeps every image's logits: K numbers an image are little, and the metrics come from them in one piece."""

    def __init__(self, task: ClassificationTask) -> None:
        self.task = task
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.agreed: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> None:
        self.logits.append(logits.float())
        self.labels.append(labels)
        if teacher is not None:
            self.agreed.append(torch.eq(logits.argmax(dim=1), teacher))

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.task.metrics(torch.cat(self.logits).cpu(), torch.cat(self.labels).cpu())
        if self.agreed:
            yield "agreement", torch.cat(self.agreed).float().mean()


class _PixelMeter:
    """Counts pixels over the whole split: a mean over batches would weigh rare classes by where they happen to lie."""

    def __init__(self, num_classes: int) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix  # with SciPy and matplotlib: 95 MiB

        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)
        self.loss: Tensor | float = 0.0
        self.agreed: Tensor | None = None
        self.compared = 0

    def update(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> None:
        classes = logits.argmax(dim=1)
        self.confusion.to(logits.device).update(classes, labels)
        self.loss = self.loss + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").double()
        if teacher is not None:
            agreed = (classes == teacher).sum()
            self.agreed = agreed if self.agreed is None else self.agreed + agreed
            self.compared += classes.numel()

    def compute(self) -> Iterator[tuple[str, Tensor]]:
        confusion = self.confusion.compute().cpu()
        pixels = confusion.sum().clamp(min=1)
        yield "miou", iou_per_class(confusion).nanmean()
        yield "pixel_accuracy", confusion.diagonal().sum() / pixels
        yield "loss", torch.as_tensor(self.loss).cpu() / pixels
        if self.agreed is not None:
            yield "agreement", self.agreed.cpu() / self.compared


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin so that they cover everything, the last one flush with the end."""
    stride = max(1, round(window * WINDOW_STRIDE))
    return [*range(0, length - window, stride), length - window]
