"""What is believed of each configuration that was trained to the end, and which repetition would teach most.

Model: the true value of a configuration is normal around what its like reach, and each training scatters around it by
the same seed deviation sigma:

    mu_i ~ N(m, tau^2)          y_ij = mu_i + e_ij,  e_ij ~ N(0, sigma^2)
    mu_i | y ~ N((m / tau^2 + sum_j y_ij / sigma^2) v_i, v_i),   v_i = 1 / (1 / tau^2 + n_i / sigma^2)

sigma is pooled over repeated configurations, m and tau are read from the better half of the values of the search
(empirical Bayes): what is found in a search has a long tail of bad values that says nothing of the good ones. Shrinking
towards m takes out what the best of many noisy values overstates, also among values on fresh seeds.

The next repetition is that of the largest knowledge gradient (Frazier, Powell, Dayanik, "A Knowledge-Gradient Policy
for Sequential Information Collection", SIAM J. Control Optim. 2008): the expected gain in the best mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

PRIOR_FREEDOM = 2.0
"""Degrees of freedom that the guess of sigma counts as, beside the repeated configurations."""

NOISE_SHARE = 0.5
"""Share of the variance among the better half of the values that is guessed to be noise before anything is repeated."""

LEAST_TRUE_SHARE = 0.25
"""tau^2 is at least this much of sigma^2: configurations are never believed to be all alike."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Belief:
    """Of one configuration.

    Attributes:
        mean: expected value.
        deviation: standard deviation of what it may be.
    """

    mean: float
    deviation: float


@dataclass(frozen=True)
class Population:
    """What all configurations have in common: m, tau and sigma, larger values being better."""

    mean: float
    spread: float
    noise: float

    def believe(self, values: Sequence[float], *, expected: int = 0) -> Belief:
        """Of a configuration with these values; `expected`: more that are on their way (they narrow, not move)."""
        if not all(map(math.isfinite, values)):
            return Belief(-math.inf, 0.0)
        precision = 1 / self.spread**2 + len(values) / self.noise**2
        mean = (self.mean / self.spread**2 + math.fsum(values) / self.noise**2) / precision
        return Belief(mean, math.sqrt(1 / (precision + expected / self.noise**2)))


def population(searched: Sequence[float], repeated: Sequence[Sequence[float]]) -> Population | None:
    """Fit to the values of the search and the groups of repetitions; None below two finite values.

    Args:
        searched: one value a configuration, larger being better.
        repeated: the values on fresh seeds of each repeated configuration.
    """
    values = sorted(value for value in searched if math.isfinite(value))
    if len(values) < 2:
        return None
    middle = _quantile(values, 0.5)
    total = (_quantile(values, 0.85) - middle) / _NORMAL.inv_cdf(0.85)
    scale = max(abs(values[-1]), abs(values[0]), 1e-6)
    total = max(total, 1e-6 * scale)
    squares, freedom = 0.0, 0
    for group in repeated:
        if len(group) > 1 and all(map(math.isfinite, group)):
            mean = math.fsum(group) / len(group)
            squares += math.fsum((value - mean) ** 2 for value in group)
            freedom += len(group) - 1
    noise = (squares + PRIOR_FREEDOM * NOISE_SHARE * total**2) / (freedom + PRIOR_FREEDOM)
    spread = max(total**2 - noise, LEAST_TRUE_SHARE * noise)
    return Population(middle, math.sqrt(spread), math.sqrt(noise))


def most_telling(beliefs: Mapping[int, Belief], noise: float) -> tuple[int, float]:
    """The configuration whose next repetition is expected to raise the best mean most, and by how much.

    Args:
        beliefs: of at least one configuration, by number.
        noise: sigma.
    """
    ranked = sorted(beliefs, key=lambda number: (-beliefs[number].mean, number))
    best = beliefs[ranked[0]].mean
    second = beliefs[ranked[1]].mean if len(ranked) > 1 else -math.inf
    gains = {}
    for number in ranked:
        belief = beliefs[number]
        rival = second if number == ranked[0] else best
        change = belief.deviation**2 / math.hypot(belief.deviation, noise)  # of its mean, by one more value
        if change <= 0 or not math.isfinite(rival) or not math.isfinite(belief.mean):
            gains[number] = 0.0
            continue
        distance = -abs(belief.mean - rival) / change
        gains[number] = change * (distance * _NORMAL.cdf(distance) + _NORMAL.pdf(distance))
    chosen = max(ranked, key=lambda number: gains[number])
    return chosen, gains[chosen]


def _quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, interpolated."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
