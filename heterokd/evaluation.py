"""How good a network is on one split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heterokd.loaders import EvalLoader
from heterokd.outputs import IGNORE, Batch
from heterokd.tasks import Logits, Task, upsample

# The teacher's decisions on a split are kept, a byte a pixel, unless they would take more than this.
CLASSES_BYTES = 2**30


@contextmanager
def deciding(network: nn.Module) -> Iterator[Logits]:
    """The network as a function from images to logits, in evaluation mode and without gradient while open."""

    def logits(images: Tensor) -> Tensor:
        outputs = network(images)
        return outputs if isinstance(outputs, Tensor) else outputs.logits

    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield logits
    finally:
        network.train(was_training)


def predict(network: nn.Module, loader: Iterable[Batch], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits [N, K] in float32 and labels [N] of a whole split of classification, in its order.

    Args:
        network: maps images [B, 3, H, W] in [0, 1] to `Outputs` or to logits [B, K]; left in the mode it came in.
        loader: batches of plain (not augmented) images.
        device: where `network` is.
    """
    logits, labels = [], []
    with deciding(network) as decide:
        for batch in loader:
            logits.append(decide(batch.images.to(device, non_blocking=True)).float())
            labels.append(batch.labels)
    return torch.cat(logits).cpu(), torch.cat(labels)


def predict_classes(network: nn.Module, loader: EvalLoader, device: torch.device | str = "cpu") -> Tensor | None:
    """Decisions on a whole split, in its order: class numbers [N], or [N, H, W] in bytes in segmentation.

    Returns:
        None where the maps would take more than `CLASSES_BYTES`.
    """
    classes: list[Tensor] = []
    with deciding(network) as decide:
        for batch in loader:
            images = batch.images.to(device, non_blocking=True)
            if batch.labels.dim() == 1:
                classes.append(decide(images).argmax(dim=1))
                continue
            if len(loader.split) * batch.labels[0].numel() > CLASSES_BYTES:
                return None
            classes.append(upsample(decide(images), images.shape[-2:]).argmax(dim=1).to(torch.uint8))
    return torch.cat(classes)


def evaluate(
    network: nn.Module,
    loader: Iterable[Batch],
    task: Task,
    *,
    teacher_classes: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, float]]:
    """Yield the task's metrics of a network on one split: (`top1`, `top5`, `loss`, `agreement`), or (`miou`, ...).

    Args:
        network: see `predict`.
        loader: batches of plain images.
        task: names the metrics.
        teacher_classes: [N] or [N, H, W] the teacher's decisions on the same split; `agreement` is the share that
            coincides.
        device: where `network` is.
    """
    meter, seen = task.meter(), 0
    with deciding(network) as decide:
        for batch in loader:
            logits = task.decide(decide, batch.images.to(device, non_blocking=True))
            teacher = None if teacher_classes is None else teacher_classes[seen : seen + len(batch)].to(device)
            meter.update(logits, batch.labels.to(device), teacher)
            seen += len(batch)
        for name, value in meter.compute():
            yield name, float(value)


def confusions(network: nn.Module, loader: Iterable[Batch], task: Task, device: torch.device | str = "cpu") -> Tensor:
    """Pixel counts of every image, int64 [N, K, K], rows are labels and columns decisions; `IGNORE` is left out.

    Args:
        network: maps images [B, 3, H, W] to `Outputs` or to logits [B, K, h, w].
        loader: batches of plain images with label maps.
        task: segmentation.
        device: where `network` is.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # with SciPy and matplotlib: 95 MiB

    counts: list[Tensor] = []
    with deciding(network) as decide:
        for batch in loader:
            classes = task.decide(decide, batch.images.to(device)).argmax(dim=1)
            counts.extend(
                multiclass_confusion_matrix(one, labels, task.num_classes, ignore_index=IGNORE, validate_args=False)
                for one, labels in zip(classes, batch.labels.to(device), strict=True)
            )
    return torch.stack(counts).cpu()
