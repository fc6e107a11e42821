"""Metrics that count every class the same, however few images it has; the definitions are scikit-learn's.

- `balanced_accuracy`: mean recall of the classes that have labels.
- `macro_f1`: mean F1 score of the classes that have labels or predictions.
- `auroc`: mean area under the ROC curve of each class against the rest, by its softmax score; equal scores count half.

All take the number of times that each image counts, so that bootstrap samples are scored at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function from logits [N, K], class numbers [N] and counts [R, N] to scores [R], NaN where undefined."""

AUROC_CLASSES = 100
"""Maximum number of classes for which the AUROC is measured, since the scores of every class are sorted."""


def balanced_accuracy(logits: Tensor, labels: Tensor, times: Tensor) -> Tensor:
    """Return the mean recall over classes [R]."""
    right, _, total = _counts(logits, labels, times)
    return (right / total).nanmean(dim=1)  # 0 / 0, a class without labels, is NaN


def macro_f1(logits: Tensor, labels: Tensor, times: Tensor) -> Tensor:
    """Return the mean F1 score over classes [R]."""
    right, predicted, total = _counts(logits, labels, times)
    return (2 * right / (predicted + total)).nanmean(dim=1)


def auroc(logits: Tensor, labels: Tensor, times: Tensor) -> Tensor:
    """Return the mean area under the ROC curve over classes [R]; NaN if no class has images and others have some."""
    areas = []
    for number, scores in enumerate(logits.double().softmax(dim=1).T):
        order = scores.argsort()
        values, place = torch.unique_consecutive(scores[order], return_inverse=True)
        weights = times[:, order].double()
        is_class = labels[order] == number
        shape = (len(times), len(values))
        positive, negative = (
            torch.zeros(shape, dtype=torch.float64).index_add_(1, place[chosen], weights[:, chosen])
            for chosen in (is_class, ~is_class)
        )
        below = negative.cumsum(dim=1) - negative / 2
        areas.append((positive * below).sum(dim=1) / (positive.sum(dim=1) * negative.sum(dim=1)))
    return torch.stack(areas).nanmean(dim=0)


MACRO_METRICS: dict[str, Score] = {"balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1, "auroc": auroc}
"""Metrics by their keys."""


def macro_score(metric: str, logits: Tensor, labels: Tensor) -> float:
    """Return a metric of all images, each counted once; NaN if it is undefined."""
    if not len(labels):
        return math.nan
    return float(MACRO_METRICS[metric](logits, labels, torch.ones(1, len(labels)))[0])


def _counts(logits: Tensor, labels: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return correct predictions, predictions and labels of each class, [R, K] each."""
    predicted, weights = logits.argmax(dim=1), times.double()

    def summed(classes: Tensor, each: Tensor) -> Tensor:
        return torch.zeros(len(times), logits.shape[1], dtype=torch.float64).index_add_(1, classes, each)

    return summed(labels, weights * (predicted == labels)), summed(predicted, weights), summed(labels, weights)
