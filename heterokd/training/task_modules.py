"""Torch part of a task: the loss, the logits of a network for an image, and the metrics of a whole split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterokd.config.pixel_loss import read_pixel_loss
from heterokd.datasets.io.images import fitted_size
from heterokd.outputs import IGNORE, Batch, Signal
from heterokd.tasks import TASKS, WHOLE, Inference, Size, TaskName
from heterokd.tasks import Task as Facts
from heterokd.training.macro_metrics import MACRO_METRICS, macro_score
from heterokd.training.meters import Answer, ClassMeter, Meter, PixelMeter, counted_pixels, iou_per_class, upsample
from heterokd.training.paired_tests import CorrectImages, ImageConfusions, ImageLogits, ImageResults
from heterokd.training.pixel_losses import PixelLoss

Logits = Callable[[Tensor], Tensor]
"""Function from images [B, 3, H, W] in [0, 1] to logits."""

WINDOW_STRIDE = 2 / 3
"""Stride of a sliding evaluation as a share of the window: no pixel is seen only at the border of a window."""

LEAST_SIDE = 128
"""Side to which a smaller image keeps the padding of its canvas: decoders such as PAN need several map pixels."""


class ClassificationTask(nn.Module):
    """One class per image: cross-entropy, top-1 and top-5 accuracy.

    Args:
        num_classes: K.
        label_smoothing: share of the label that is spread over all classes.
        inference: unused.
        metric: metric of the image results, `top1` or one of `MACRO_METRICS`.
        pixel_loss: unused.

    Attributes:
        facts: names, shapes and words of the task.
        cached_signals: signals of the teacher that a cache holds.
    """

    facts: ClassVar[Facts] = TASKS["classification"]
    cached_signals: ClassVar[Signal] = Signal.LOGITS | Signal.EMBEDDING

    def __init__(
        self,
        num_classes: int,
        label_smoothing: float = 0.0,
        inference: Inference = WHOLE,
        metric: str = "top1",
        pixel_loss: str = "",
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

    def answers(self, network: Logits, batch: Batch, device: torch.device | str = "cpu") -> Iterator[Answer]:
        """Yield the network's answer for a batch of plain images."""
        images = batch.images.to(device, non_blocking=True)
        yield Answer(self.logits(network, images), batch.labels.to(device), batch.index)

    def meter(self) -> Meter:
        """Return a new meter: `top1`, `top5`, `loss`, the `MACRO_METRICS`, `agreement`."""
        return ClassMeter(self.num_classes)

    def image_results(self, answers: Iterable[Answer]) -> ImageResults:
        """Return whether the prediction for each image is correct; for a macro metric, its logits."""
        pairs = [(answer.logits.float(), answer.labels) for answer in answers]
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
        inference: how the network answers for an image in an evaluation.
        metric: metric of the image results, `miou`.
        pixel_loss: task loss, see `training.pixel_loss`.

    Attributes:
        facts: names, shapes and words of the task.
        cached_signals: signals of the teacher that a cache holds: no embedding, which is a map of hundreds of channels.
    """

    facts: ClassVar[Facts] = TASKS["segmentation"]
    cached_signals: ClassVar[Signal] = Signal.LOGITS

    def __init__(
        self,
        num_classes: int,
        label_smoothing: float = 0.0,
        inference: Inference = WHOLE,
        metric: str = "miou",
        pixel_loss: str = "cross_entropy",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss = PixelLoss(read_pixel_loss(pixel_loss), num_classes, label_smoothing)
        self.inference = inference
        self.metric = metric

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the task loss of logits [B, K, h, w], resized to the labels, and label maps [B, H, W].

        Images with label maps have no weights. See `PixelLoss`; by default the mean over the labelled pixels.
        """
        loss: Tensor = self.loss(upsample(logits, labels.shape[-2:]), labels)
        return loss

    def logits(self, network: Logits, images: Tensor) -> Tensor:
        """Return logits [B, K, H, W] of images [B, 3, H, W]: of the whole image, or the mean over sliding windows.

        With several views, the logarithm of the mean of their class probabilities.
        """
        flip, scales = self.inference.flip, self.inference.scales
        if not flip and scales == (1.0,):
            return self._scores(network, images)
        size, shares = images.shape[-2:], []
        for scale in scales:
            scaled = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
            view = upsample(images, scaled)
            shares.append(upsample(self._scores(network, view), size).softmax(dim=1))
            if flip:
                mirrored = self._scores(network, view.flip(-1)).flip(-1)
                shares.append(upsample(mirrored, size).softmax(dim=1))
        return (sum(shares[1:], start=shares[0]) / len(shares)).clamp_min(torch.finfo(torch.float32).tiny).log()

    def _scores(self, network: Logits, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        window = self.inference.window
        if window is None or (window[0] >= height and window[1] >= width):
            return upsample(network(images), (height, width))
        rows, columns = min(window[0], height), min(window[1], width)
        total = images.new_zeros(len(images), self.num_classes, height, width)
        count = images.new_zeros(height, width)
        for top in _starts(height, rows):
            for left in _starts(width, columns):
                place = (..., slice(top, top + rows), slice(left, left + columns))
                total[place] += upsample(network(images[place]), (rows, columns))
                count[place] += 1
        return total / count

    def answers(self, network: Logits, batch: Batch, device: torch.device | str = "cpu") -> Iterator[Answer]:
        """Yield the network's answers for a batch of plain images.

        Images whose label maps are counted at their own sizes are seen without the padding of the canvas.
        """
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device)
        if batch.own_labels is None:
            yield Answer(self.logits(network, images), labels, batch.index)
            return
        canvas = (images.shape[-2], images.shape[-1])
        rows_of: dict[Size, list[int]] = {}
        for row, own in enumerate(batch.own_labels):
            height, width = fitted_size(own.shape[0], own.shape[1], canvas)
            if batch.extents is not None:
                height, width = batch.extents[row].tolist()
            rows_of.setdefault((height, width), []).append(row)
        for (height, width), rows in rows_of.items():
            seen = images[rows, :, : max(height, LEAST_SIDE), : max(width, LEAST_SIDE)]
            yield Answer(
                self.logits(network, seen)[..., :height, :width],
                labels[rows, :height, :width],
                batch.index[rows],
                tuple(batch.own_labels[row] for row in rows),
            )

    def meter(self) -> Meter:
        """Return a new meter of the metrics in `facts.metric_names`."""
        return PixelMeter(self.num_classes)

    def image_results(self, answers: Iterable[Answer]) -> ImageResults:
        """Return the confusion matrix of each image, in the order of the split."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix  # SciPy and matplotlib: 95 MiB

        counts: list[Tensor] = []
        places: list[Tensor] = []
        for answer in answers:
            counts.extend(
                multiclass_confusion_matrix(classes, truth, self.num_classes, ignore_index=IGNORE, validate_args=False)
                for classes, truth in counted_pixels(answer)
            )
            places.append(answer.index.cpu())
        images = torch.stack(counts).cpu()[torch.cat(places).argsort()]
        return ImageConfusions(images, images.sum(dim=2), float(iou_per_class(images.sum(dim=0)).nanmean()))


Task = ClassificationTask | SegmentationTask
TASK_MODULES: dict[TaskName, type[Task]] = {
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
}


# One parameter for each setting of a task.
def build_task(
    name: TaskName,
    num_classes: int,
    label_smoothing: float = 0.0,
    inference: Inference = WHOLE,
    metric: str | None = None,
    pixel_loss: str = "cross_entropy",
) -> Task:
    """Build the task of that name; its image results are compared by a metric, by default the task's score."""
    return TASK_MODULES[name](num_classes, label_smoothing, inference, metric or TASKS[name].score, pixel_loss)


def _starts(length: int, window: int) -> list[int]:
    """Return the starts of windows that cover a side; the last window ends with the side."""
    stride = max(1, round(window * WINDOW_STRIDE))
    return [*range(0, length - window, stride), length - window]
