"""What is measured of a student: how it compares with another one, and how fast it is."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor, nn

from heterokd.dataset import Splits
from heterokd.evaluation import confusions, predict
from heterokd.loaders import open_test
from heterokd.promotion.decision import Comparison
from heterokd.tasks import Segmentation, Task, iou_per_class, is_correct

RESAMPLES = 2000
"""Draws of the bootstrap: enough for the second digit of a 95 % interval."""
RESAMPLES_AT_ONCE = 250
NORMAL_975 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, eq=False)
class OnTest:
    """What a student does on the test split, image by image.

    Attributes:
        images: [N] whether it is right; in segmentation [N, K, K] its confusion matrices, rows labels.
        labels: [N] class numbers, or [N, K] labelled pixels of each class: two students compare only where they agree.
        score: of the whole split.
    """

    images: Tensor
    labels: Tensor
    score: float

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The score's 95 % interval: Wilson's, or in segmentation percentiles of a bootstrap over images."""
        count = len(self.images)
        if self.images.dim() == 1:
            found = binomtest(int(self.images.sum()), count).proportion_ci(0.95, method="wilson")
            return float(found.low), float(found.high)
        areas, scores = _areas(self.images), []
        generator = np.random.default_rng(seed)
        for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
            times = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES_AT_ONCE)
            scores.append(_mean_iou(times.astype(np.float64), areas))
        low, high = np.percentile(np.concatenate(scores), (2.5, 97.5))
        return float(low), float(high)

    def compared(self, against: str, other: OnTest) -> Comparison:
        """This student as the challenger of another one, by the paired test of the task."""
        compare = compare_correct if self.images.dim() == 1 else compare_confusions
        return compare(against, self.images, other.images)


def on_test(model: nn.Module, splits: Splits, task: Task) -> OnTest:
    """A model on the test split.

    Args:
        model: images [B, 3, H, W] in [0, 1] to `Outputs`, or to logits [B, K] or [B, K, H, W].
        splits: opened for this.
        task: says how an image is decided on.
    """
    loader = open_test(splits)
    if isinstance(task, Segmentation):
        counts = confusions(model, loader, task)
        return OnTest(counts, counts.sum(dim=2), float(iou_per_class(counts.sum(dim=0)).nanmean()))
    logits, labels = predict(model, loader)
    correct = is_correct(logits, labels)
    return OnTest(correct, labels, float(correct.float().mean()))


def compare_correct(against: str, correct: Tensor, other: Tensor) -> Comparison:
    """Compare two classifiers image by image: the exact McNemar test.

    Args:
        against: who the other one is.
        correct: [N] whether the challenger is right.
        other: [N] whether the other one is.
    """
    count = len(correct)
    wins = int((correct & ~other).sum())
    losses = int((other & ~correct).sum())
    gain = (wins - losses) / count
    half = NORMAL_975 * math.sqrt(max(wins + losses - (wins - losses) ** 2 / count, 0.0)) / count
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    score = float(other.float().mean())
    return Comparison(against, score, gain, gain - half, gain + half, "exact McNemar", p_value, wins, losses)


def compare_confusions(against: str, challenger: Tensor, other: Tensor, seed: int = 0) -> Comparison:
    """Compare two segmentations of the same images: a paired bootstrap over images.

    The mIoU of a split is no mean over its images, so there is no test on paired figures of single images. Drawing the
    images anew with replacement, the same ones for both, shows how the gain would scatter over test sets like this one.

    Args:
        against: who the other one is.
        challenger: [N, K, K] pixel counts of each image; rows labels, columns predictions.
        other: [N, K, K] the other one's.
        seed: of the draws.
    """
    count = len(challenger)
    own, others = _areas(challenger), _areas(other)
    whole = np.ones((1, count))
    gain = float((_mean_iou(whole, own) - _mean_iou(whole, others))[0])
    generator = np.random.default_rng(seed)
    gains = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        part = gains[start : start + RESAMPLES_AT_ONCE]
        times = generator.multinomial(count, np.full(count, 1 / count), size=len(part)).astype(np.float64)
        part[:] = _mean_iou(times, own) - _mean_iou(times, others)
    low, high = np.percentile(gains, (2.5, 97.5))
    # One more than counted, as if the data's own gain were among the draws: a p-value of 0 would claim too much.
    tails = (1 + np.count_nonzero(gains <= 0), 1 + np.count_nonzero(gains >= 0))
    p_value = min(1.0, 2 * min(tails) / (1 + RESAMPLES))
    score = float(_mean_iou(whole, others)[0])
    return Comparison(against, score, gain, float(low), float(high), "paired bootstrap", p_value)


def _areas(counts: Tensor) -> NDArray[np.float64]:
    """[2, N, K] pixels of intersection and union of each image and class."""
    intersection = counts.diagonal(dim1=1, dim2=2)
    union = counts.sum(dim=1) + counts.sum(dim=2) - intersection
    areas: NDArray[np.float64] = torch.stack((intersection, union)).double().numpy()
    return areas


def _mean_iou(times: NDArray[np.float64], areas: NDArray[np.float64]) -> NDArray[np.float64]:
    """[R] mIoU of R samples, where image n counts `times` [R, n] times; classes of no pixel are left out."""
    intersection, union = times @ areas[0], times @ areas[1]
    present = union > 0
    iou = np.divide(intersection, union, out=np.zeros_like(union), where=present)
    mean: NDArray[np.float64] = iou.sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    return mean
