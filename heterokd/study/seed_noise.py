"""Noise of a metric over seeds: pooled over repetitions, with a prior from the number of validation images.

On the same images, the variance of top-1 over seeds is of the size of the binomial variance p (1 - p) / N. Divided by
it, it is 0.8 to 1.9 for the best tenth of configurations in the exhaustive tables of benchmarks/search_efficiency (48
seeds each, N = 300), and smaller for large validation sets: the prior errs towards ties. For a mean over images of any
score in [0, 1], such as mIoU, the binomial variance is an upper bound. That other validation images would prefer
another configuration adds little: in the tables at most 0.04 p (1 - p) / N per configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from heterokd.study.posterior import pooled_squares
from heterokd.study.summary import StudySummary

RATIO = 1.5
"""Variance over seeds divided by the binomial variance, before any repetition."""

FREEDOM = 8.0
"""Degrees of freedom of `RATIO`: 95 % of the ratios are expected between a third and three times it."""

DECAY = 0.5
"""Weight of a degree of freedom of another study."""

MOST_FREEDOM = 24.0
"""Maximum degrees of freedom of the prior, so that a study's repetitions count."""


@dataclass(frozen=True)
class NoisePrior:
    """Prior of the variance over seeds.

    Attributes:
        val_images: number of validation images; 0 if unknown, then there is no prior.
        ratio: expected variance, divided by the binomial variance.
        freedom: degrees of freedom that it counts as.
    """

    val_images: int = 0
    ratio: float = RATIO
    freedom: float = FREEDOM

    def variance(self, score: float) -> float:
        """Return the expected variance over seeds of a score in [0, 1]; 0 if it is unknown."""
        if not self.val_images or not 0 <= score <= 1:
            return 0.0
        edge = 0.5 / self.val_images
        share = min(max(score, edge), 1 - edge)
        return self.ratio * share * (1 - share) / self.val_images


def noise_prior(val_images: int, finished: Iterable[StudySummary]) -> NoisePrior:
    """Return the prior for `val_images` images, updated by finished studies whose number of images is known."""
    plain = NoisePrior(val_images)
    weighted, freedom = plain.ratio * plain.freedom, plain.freedom
    for summary in finished:
        unit = NoisePrior(summary.val_images, ratio=1.0)
        for config in summary.leaders:
            values = [value for value in config.values if value is not None]
            squares, known = pooled_squares([values])
            if config.confirmed and known and unit.variance(values[0]):
                weighted += DECAY * squares / unit.variance(math.fsum(values) / len(values))
                freedom += DECAY * known
    return NoisePrior(val_images, weighted / freedom, min(freedom, MOST_FREEDOM))


def half_widths(
    groups: Sequence[Sequence[float]], prior: NoisePrior, best: float | None
) -> Callable[[int], float | None]:
    """Return the half width of a mean's 95 % interval as a function of its number of values.

    The variance is pooled over the groups and the prior; without both it is unknown.

    Args:
        groups: values of each repeated configuration.
        prior: prior of the variance.
        best: best value of the metric, at which the prior's variance is taken; None if it is not in [0, 1].
    """
    squares, freedom = pooled_squares([group for group in groups if all(map(math.isfinite, group))])
    expected = 0.0 if best is None else prior.variance(best)
    known = freedom + (prior.freedom if expected else 0.0)
    if not known:
        return lambda size: None
    from scipy.special import stdtrit

    half = float(stdtrit(known, 0.975)) * math.sqrt((squares + prior.freedom * expected) / known)
    return lambda size: half / math.sqrt(size)
