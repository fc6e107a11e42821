"""Task losses of label maps, and the weights of classes in them.

- `cross_entropy`: mean over labelled pixels, weighted by their classes.
- `ohem`: the same over hard pixels: those whose class has a probability of at most `HARD`, and at least the hardest
  `LEAST_HARD` of all (online hard example mining, as CIRKD's program and mmsegmentation have it).
- `dice`, `focal`, `lovasz`: segmentation_models_pytorch's, without weights of classes; focal has gamma 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from heterokd.datasets.io.split import Split
from heterokd.datasets.masks.class_pixels import split_pixels
from heterokd.errors import DataError
from heterokd.networks.smp_losses import smp_loss
from heterokd.outputs import IGNORE

HARD = 0.7
LEAST_HARD = 1 / 16


class PixelLoss(nn.Module):
    """A weighted sum of losses of logits [B, K, H, W] and label maps [B, H, W]; 0 without a labelled pixel.

    Args:
        factors: factor of each loss by name, of the module's docstring.
        num_classes: K.
        label_smoothing: share of the label that is spread over all classes, in `cross_entropy` and `ohem`.

    Attributes:
        class_weights: [K] weights of the classes in `cross_entropy` and `ohem`; not part of the state dict.
    """

    class_weights: Tensor

    def __init__(self, factors: Mapping[str, float], num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.factors, self.label_smoothing = dict(factors), label_smoothing
        self.register_buffer("class_weights", torch.ones(num_classes), persistent=False)
        self.weighted = False
        self.of_smp = nn.ModuleDict({name: smp_loss(name) for name in factors if name not in ("cross_entropy", "ohem")})

    def weigh_classes(self, weights: NDArray[np.float32]) -> None:
        """Set the weights [K] of the classes."""
        self.class_weights.copy_(torch.from_numpy(weights))
        self.weighted = True

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of logits at the size of the labels, a scalar."""
        total = logits.new_zeros(())
        if self.of_smp and not bool((labels != IGNORE).any()):  # smp's losses divide by the number of labelled pixels
            return total + 0 * logits.sum()
        for name, factor in self.factors.items():
            if name in self.of_smp:
                value = self.of_smp[name](logits, labels)
            else:
                value = self._cross_entropy(logits, labels, hard=name == "ohem")
            total = total + factor * value
        return total

    def _cross_entropy(self, logits: Tensor, labels: Tensor, *, hard: bool) -> Tensor:
        weights = self.class_weights if self.weighted else None
        known = labels != IGNORE
        if not hard and weights is None:
            loss = F.cross_entropy(
                logits, labels, ignore_index=IGNORE, label_smoothing=self.label_smoothing, reduction="sum"
            )
            return loss / known.sum().clamp(min=1)
        losses = F.cross_entropy(
            logits, labels, weights, ignore_index=IGNORE, label_smoothing=self.label_smoothing, reduction="none"
        )
        classes = labels.masked_fill(~known, 0)
        counted = known.float() if weights is None else weights[classes] * known
        if hard:
            counted = counted * self._hard(logits, classes, known)
            losses = losses * (counted > 0)
        return losses.sum() / counted.sum().clamp(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _hard(self, logits: Tensor, classes: Tensor, known: Tensor) -> Tensor:
        """Return which pixels [B, H, W] are hard."""
        chosen = logits.softmax(dim=1).gather(1, classes[:, None])[:, 0].masked_fill(~known, 2.0)
        # Its position is a tensor, so that nothing waits for the device; ignored pixels come last.
        ordered, last = chosen.flatten().sort().values, (known.sum() * LEAST_HARD).long().clamp(min=1) - 1
        return (chosen <= ordered[last].clamp(min=HARD)) & known


def pixel_weights(
    split: Split, class_names: tuple[str, ...], class_weights: str | Mapping[str, float]
) -> NDArray[np.float32] | None:
    """Return the weights [K] of the classes in a task loss, 1 on average over labelled pixels; None: all are 1.

    Args:
        split: training images.
        class_names: name of each class number.
        class_weights: none; inverse: of the number of pixels; median: median frequency over the class's frequency,
            which is its share of the pixels of the label maps that show it (Eigen and Fergus, ICCV 2015,
            https://arxiv.org/abs/1411.4734); or a weight by class name, 1 for classes that it leaves out.

    Raises:
        DataError: all labelled pixels have the weight 0.
    """
    if class_weights == "none":
        return None
    found = split_pixels(split, len(class_names))
    pixels, present = found.pixels.astype(np.float64), found.pixels > 0
    weights = np.ones(len(class_names))
    if class_weights == "inverse":
        weights[present] = 1 / pixels[present]
    elif class_weights == "median":
        frequency = pixels[present] / found.around[present]
        weights[present] = np.median(frequency) / frequency
    elif isinstance(class_weights, Mapping):
        weights = np.array([class_weights.get(name, 1.0) for name in class_names])
    mean = (weights * pixels).sum() / pixels.sum()
    if not mean > 0:
        raise DataError("training.class_weights: gives every labelled pixel of train the weight 0; raise one")
    weights[~present] = mean  # classes that train lacks
    scaled: NDArray[np.float32] = (weights / mean).astype(np.float32)
    return scaled
