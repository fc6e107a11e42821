"""Results of a network on each image of a split, their interval, and the paired test of two networks."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 2000
"""Draws of the bootstrap: enough for the second digit of a 95 % interval."""
RESAMPLES_AT_ONCE = 250
NORMAL_975 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class PairedTest:
    """A network compared with another one on the same images.

    Attributes:
        score: of the other network.
        gain: score of the network minus that.
        low: lower end of the gain's 95 % interval.
        high: upper end.
        test: name of the test; the interval is Wald's for paired proportions with McNemar's test, and the percentiles
            of the resampled gains with the bootstrap.
        p_value: two-sided.
        wins: images that only the network gets right; None where an image is right in part.
        losses: images that only the other network gets right; None where an image is right in part.
    """

    score: float
    gain: float
    low: float
    high: float
    test: str
    p_value: float
    wins: int | None = None
    losses: int | None = None


@dataclass(frozen=True, eq=False)
class ImageResults(ABC):
    """What a network decided on each image of a split.

    Attributes:
        images: [N, ...] result of each image.
        labels: [N, ...] of the images; two networks are compared only where these are equal.
        score: of the whole split.
    """

    images: Tensor
    labels: Tensor
    score: float

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The score's 95 % interval; `seed` is that of a bootstrap."""

    @abstractmethod
    def compared(self, other: ImageResults) -> PairedTest:
        """This network compared with another one of the same task."""


class CorrectImages(ImageResults):
    """Results of classification: `images` [N] is whether the decision is right, `labels` [N] class numbers."""

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """Wilson's interval."""
        from scipy.stats import binomtest  # only promotion compares networks; a training need not load it

        found = binomtest(int(self.images.sum()), len(self)).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    def compared(self, other: ImageResults) -> PairedTest:
        """The exact McNemar test."""
        return compare_correct(self.images, other.images)


class ImageConfusions(ImageResults):
    """Results of segmentation: `images` [N, K, K] counts pixels, rows are labels and columns decisions.

    `labels` [N, K] counts the labelled pixels of each class.
    """

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """Percentiles of a bootstrap over images."""
        areas, scores = _areas(self.images), []
        generator = np.random.default_rng(seed)
        for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
            times = generator.multinomial(len(self), np.full(len(self), 1 / len(self)), size=RESAMPLES_AT_ONCE)
            scores.append(_mean_iou(times.astype(np.float64), areas))
        low, high = np.percentile(np.concatenate(scores), (2.5, 97.5))
        return float(low), float(high)

    def compared(self, other: ImageResults) -> PairedTest:
        """A paired bootstrap over images."""
        return compare_confusions(self.images, other.images)


def compare_correct(correct: Tensor, other: Tensor) -> PairedTest:
    """Compare two classifiers image by image: the exact McNemar test.

    Args:
        correct: [N] whether the network is right.
        other: [N] whether the other network is right.
    """
    count = len(correct)
    wins = int((correct & ~other).sum())
    losses = int((other & ~correct).sum())
    gain = (wins - losses) / count
    half = NORMAL_975 * math.sqrt(max(wins + losses - (wins - losses) ** 2 / count, 0.0)) / count
    from scipy.stats import binomtest

    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    score = float(other.float().mean())
    return PairedTest(score, gain, gain - half, gain + half, "exact McNemar", p_value, wins, losses)


def compare_confusions(confusions: Tensor, other: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> PairedTest:
    """Compare two segmentation networks on the same images: a paired bootstrap over images.

    The mIoU of a split is no mean over its images, so there is no test on paired figures of single images. Resampling
    the images with replacement, the same ones for both networks, shows how the gain varies between test sets.

    Args:
        confusions: [N, K, K] pixel counts of each image; rows are labels, columns decisions.
        other: [N, K, K] those of the other network.
        seed: of the resampling.
        resamples: number of them.
    """
    count = len(confusions)
    areas, others = _areas(confusions), _areas(other)
    whole = np.ones((1, count))
    gain = float((_mean_iou(whole, areas) - _mean_iou(whole, others))[0])
    generator = np.random.default_rng(seed)
    gains = np.empty(resamples)
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        part = gains[start : start + RESAMPLES_AT_ONCE]
        times = generator.multinomial(count, np.full(count, 1 / count), size=len(part)).astype(np.float64)
        part[:] = _mean_iou(times, areas) - _mean_iou(times, others)
    low, high = np.percentile(gains, (2.5, 97.5))
    # One more than counted, as if the data's gain were among the draws: a p-value of 0 would claim too much.
    tails = (1 + np.count_nonzero(gains <= 0), 1 + np.count_nonzero(gains >= 0))
    p_value = min(1.0, 2 * min(tails) / (1 + resamples))
    score = float(_mean_iou(whole, others)[0])
    return PairedTest(score, gain, float(low), float(high), "paired bootstrap", p_value)


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
