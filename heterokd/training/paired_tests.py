"""Results of a network on each image of a split, their interval, and the paired test of two networks."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

RESAMPLES = 2000
"""Number of bootstrap samples: enough for the second digit of a 95 % interval."""
RESAMPLES_AT_ONCE = 250
NORMAL_975 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class PairedTest:
    """Comparison of a network with another network on the same images.

    Attributes:
        score: score of the other network.
        gain: score of the network minus `score`.
        low: lower end of the gain's 95 % interval.
        high: upper end.
        test: name of the test; the interval is Wald's for paired proportions with McNemar's test, and the percentiles
            of the resampled gains with the bootstrap.
        p_value: two-sided p-value.
        wins: images that only the network gets right; None in segmentation, where an image can be partly right.
        losses: images that only the other network gets right; None in segmentation.
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
    """Predictions of a network on each image of a split.

    Attributes:
        images: [N, ...] result of each image.
        labels: [N, ...] labels of the images; two networks are compared only if these are equal.
        score: score on the whole split.
    """

    images: Tensor
    labels: Tensor
    score: float

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the score."""

    @abstractmethod
    def compared(self, other: ImageResults) -> PairedTest:
        """Compare this network with another network of the same task."""

    @abstractmethod
    def found(self, number: int) -> tuple[int, int]:
        """Return how many images (pixels in segmentation) of a class are predicted as it, and how many there are."""


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share; (0, 1) without observations."""
    if not count:
        return 0.0, 1.0
    z = NORMAL_975
    share, width = correct / count, 2 * (count + z**2)
    centre = (2 * count * share + z**2) / width
    half = z * math.sqrt(z**2 + 4 * count * share * (1 - share)) / width
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == count else centre + half)


class CorrectImages(ImageResults):
    """Results of classification: `images` [N] is whether the prediction is correct, `labels` [N] class numbers."""

    def interval(self) -> tuple[float, float]:
        """Return Wilson's interval."""
        return wilson(int(self.images.sum()), len(self))

    def found(self, number: int) -> tuple[int, int]:
        """See `ImageResults`."""
        of_class = self.labels == number
        return int((self.images & of_class).sum()), int(of_class.sum())

    def compared(self, other: ImageResults) -> PairedTest:
        """Apply the exact McNemar test."""
        count = len(self)
        wins = int((self.images & ~other.images).sum())
        losses = int((other.images & ~self.images).sum())
        gain = (wins - losses) / count
        half = NORMAL_975 * math.sqrt(max(wins + losses - (wins - losses) ** 2 / count, 0.0)) / count
        p_value = _exact_mcnemar(wins, losses)
        score = float(other.images.float().mean())
        return PairedTest(score, gain, gain - half, gain + half, "exact McNemar", p_value, wins, losses)


@dataclass(frozen=True, eq=False)
class ImageLogits(ImageResults):
    """Results of classification by a metric of `MACRO_METRICS`: `images` [N, K] are logits, `labels` [N] class numbers.

    Attributes:
        metric: key of the metric.
    """

    metric: str

    def interval(self) -> tuple[float, float]:
        """Return percentiles of a bootstrap over images."""
        low, high = np.nanpercentile(self._resampled(), (2.5, 97.5))
        return float(low), float(high)

    def compared(self, other: ImageResults) -> PairedTest:
        """Apply a paired bootstrap over images: both networks are scored on the same samples."""
        assert isinstance(other, ImageLogits)  # of the same task and metric
        gain = self.score - other.score
        gains = self._resampled() - other._resampled()
        low, high = np.nanpercentile(gains, (2.5, 97.5))
        return PairedTest(other.score, gain, float(low), float(high), "paired bootstrap", _bootstrap_p_value(gains))

    def found(self, number: int) -> tuple[int, int]:
        """See `ImageResults`."""
        of_class = self.labels == number
        return int((self.images.argmax(dim=1) == number)[of_class].sum()), int(of_class.sum())

    def _resampled(self) -> NDArray[np.float64]:
        import torch

        from heterokd.training.macro_metrics import MACRO_METRICS

        samples = _bootstrap(len(self), RESAMPLES, seed=0)
        score = MACRO_METRICS[self.metric]
        return np.concatenate([score(self.images, self.labels, torch.from_numpy(times)).numpy() for times in samples])


class ImageConfusions(ImageResults):
    """Results of segmentation: `images` [N, K, K] counts pixels, rows are labels and columns predictions.

    `labels` [N, K] counts the labelled pixels of each class.
    """

    def interval(self) -> tuple[float, float]:
        """Return percentiles of a bootstrap over images."""
        areas = _areas(self.images)
        scores = [_mean_iou(times, areas) for times in _bootstrap(len(self), RESAMPLES, seed=0)]
        low, high = np.percentile(np.concatenate(scores), (2.5, 97.5))
        return float(low), float(high)

    def found(self, number: int) -> tuple[int, int]:
        """See `ImageResults`."""
        return int(self.images[:, number, number].sum()), int(self.labels[:, number].sum())

    @property
    def classes(self) -> int:
        """Number of classes in the mean of mIoU: those that labels or predictions have."""
        return int(np.count_nonzero(_areas(self.images)[1].sum(axis=0)))

    def iou(self, number: int) -> float:
        """Return the intersection over union of a class; NaN if neither labels nor predictions have it."""
        intersection, union = _areas(self.images)[:, :, number].sum(axis=1)
        return float(intersection / union) if union else math.nan

    def class_intervals(self) -> NDArray[np.float64]:
        """Return the 95 % interval of the IoU of each class, [K, 2]: percentiles of a bootstrap over images.

        NaN for classes that no sample holds.
        """
        areas = _areas(self.images)
        samples = []
        for times in _bootstrap(len(self), RESAMPLES, seed=0):
            intersection, union = times @ areas[0], times @ areas[1]
            samples.append(np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0))
        iou = np.concatenate(samples)
        intervals = np.full((iou.shape[1], 2), np.nan)
        present = ~np.isnan(iou).all(axis=0)
        intervals[present] = np.nanpercentile(iou[:, present], (2.5, 97.5), axis=0).T
        return intervals

    def compared(self, other: ImageResults, seed: int = 0, resamples: int = RESAMPLES) -> PairedTest:
        """Apply a paired bootstrap over images.

        The mIoU of a split is not a mean over its images, so a test on paired scores of single images does not exist.
        Resampling the images with replacement, the same images for both networks, shows how the gain varies between
        test sets.
        """
        areas, others = _areas(self.images), _areas(other.images)
        whole = np.ones((1, len(self)))
        score = float(_mean_iou(whole, others)[0])
        gain = float((_mean_iou(whole, areas) - _mean_iou(whole, others))[0])
        samples = _bootstrap(len(self), resamples, seed)
        gains = np.concatenate([_mean_iou(times, areas) - _mean_iou(times, others) for times in samples])
        low, high = np.percentile(gains, (2.5, 97.5))
        return PairedTest(score, gain, float(low), float(high), "paired bootstrap", _bootstrap_p_value(gains))


def _exact_mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided p-value: that of `scipy.stats.binomtest`, whose import takes half a second."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5))) if wins + losses else 1.0


def _bootstrap_p_value(gains: NDArray[np.float64]) -> float:
    """Return the two-sided p-value; the data's gain counts as a further sample, so that it is never 0."""
    tails = (1 + np.count_nonzero(gains <= 0), 1 + np.count_nonzero(gains >= 0))
    return min(1.0, 2 * min(tails) / (1 + len(gains)))


def _bootstrap(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each of `count` images is drawn, [R, N] with R of at most `RESAMPLES_AT_ONCE`."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, resamples - start)
        yield generator.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def _areas(counts: Tensor) -> NDArray[np.float64]:
    """Return the pixels [2, N, K] of intersection and union of each image and class."""
    intersection = counts.diagonal(dim1=1, dim2=2)
    union = counts.sum(dim=1) + counts.sum(dim=2) - intersection
    return np.stack((intersection.double().numpy(), union.double().numpy()))


def _mean_iou(times: NDArray[np.float64], areas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mIoU [R] of samples that hold each image `times` [R, N] times; classes without pixels are left out."""
    intersection, union = times @ areas[0], times @ areas[1]
    present = union > 0
    iou = np.divide(intersection, union, out=np.zeros_like(union), where=present)
    mean: NDArray[np.float64] = iou.sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    return mean
