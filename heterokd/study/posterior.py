"""What is believed of each configuration that was trained to the end, and which repetition would teach most.

Model: the true value of a configuration is normal around what its like reach, and each training scatters around it by
the same seed deviation sigma. The value x_i of the search is overstated by what led to its being chosen (it passed the
rungs because of its luck as well), values y_ij on fresh seeds are not:

    mu_i ~ N(m, tau^2)        x_i = mu_i + b + e_i        y_ij = mu_i + e_ij        e ~ N(0, sigma^2)
    mu_i | x_i ~ N(p_i, v),   p_i = m + beta (x_i - m) - b,   beta = tau^2 / (tau^2 + sigma^2),   v = beta sigma^2
    mu_i | x_i, y_i ~ N((p_i / v + sum_j y_ij / sigma^2) v_i, v_i),   v_i = 1 / (1 / v + n_i / sigma^2)

All of it is counted from what the first epochs let expect: x_i, y_ij and mu_i are what is left above o_i (`foreseen`).
sigma is pooled over repeated configurations, m and tau are read from the better half of the values of the search
(empirical Bayes): what is found in a search has a long tail of bad values that says nothing of the good ones, and below
m nothing is drawn up. b is the mean distance of the p_i above m from their fresh values. So the winner's curse is taken
out twice: of the values of the search, and of the best among few fresh values.

The next repetition is that of the largest knowledge gradient (Frazier, Powell, Dayanik, "A Knowledge-Gradient Policy
for Sequential Information Collection", SIAM J. Control Optim. 2008): the expected gain in the best mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, median, pstdev

PRIOR_FREEDOM = 2.0
"""Degrees of freedom that the guess of sigma counts as, beside the repeated configurations."""

LEAST_TRUE_SHARE = 0.25
"""tau^2 is at least this much of sigma^2: configurations are never believed to be all alike."""

PRIOR_VALUES = 0.5
"""Fresh values that the guess b = 0 counts as."""

EARLY = 0.5
"""How far above the others a configuration is expected to end whose first epochs lay one deviation above theirs, in
deviations: on exhaustive tables (benchmarks/search_efficiency) 0.5 to 0.8 made the best searches, and what was read
from each search's few values was worse than none."""

FEWEST_EARLY = 4
"""Configurations below which first epochs say nothing."""

PASSES = 3
"""Rounds in which sigma and b are found from each other."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Posterior:
    """Of one configuration.

    Attributes:
        mean: expected value.
        deviation: standard deviation of what it may be.
    """

    mean: float
    deviation: float


@dataclass(frozen=True)
class Population:
    """What all configurations have in common, larger values being better.

    Attributes:
        mean: m.
        spread: tau.
        noise: sigma.
        overstated: b.
    """

    mean: float
    spread: float
    noise: float
    overstated: float = 0.0

    def believe(self, searched: float, fresh: Sequence[float] = (), *, expected: int = 0) -> Posterior:
        """Of one configuration.

        Args:
            searched: its value of the search.
            fresh: its values on fresh seeds.
            expected: more of them that are on their way: they narrow the belief and do not move it.
        """
        if not all(map(math.isfinite, (searched, *fresh))):
            return Posterior(-math.inf, 0.0)
        beta, prior = self._shrinkage(searched), self.expect(searched)
        precision = 1 / (beta * self.noise**2) + len(fresh) / self.noise**2
        mean = (prior / (beta * self.noise**2) + math.fsum(fresh) / self.noise**2) / precision
        return Posterior(mean, math.sqrt(1 / (precision + expected / self.noise**2)))

    def expect(self, searched: float) -> float:
        """What is believed of a configuration by its value of the search alone."""
        return self.mean + self._shrinkage(searched) * (searched - self.mean) - self.overstated

    def _shrinkage(self, searched: float) -> float:
        # The tail of bad values is longer than a normal one: nothing draws them up.
        return self.spread**2 / (self.spread**2 + self.noise**2) if searched > self.mean else 1.0


def population(searched: Mapping[int, float], repeated: Mapping[int, Sequence[float]]) -> Population | None:
    """Fit to the values of a search; None below two finite ones.

    Args:
        searched: of each configuration, larger being better.
        repeated: by the same keys, values on fresh seeds.
    """
    values = sorted(value for value in searched.values() if math.isfinite(value))
    if len(values) < 2:
        return None
    middle = _quantile(values, 0.5)
    total = (_quantile(values, 0.85) - middle) / _NORMAL.inv_cdf(0.85)
    total = max(total, 1e-6 * max(abs(values[-1]), abs(values[0]), 1e-6))
    chosen = {
        key: group
        for key, group in repeated.items()
        if group and middle <= searched[key] < math.inf and all(map(math.isfinite, group))
    }
    squares, freedom = _within([group for group in repeated.values() if all(map(math.isfinite, group))])
    found = _divide(middle, total, squares, freedom)
    for _ in range(PASSES):
        # What fresh values say of sigma beside their scatter in a group: how far groups lie from what was foreseen.
        beta = found.spread**2 / (found.spread**2 + found.noise**2)
        apart = [
            (math.fsum(group) / len(group) - found.believe(searched[key]).mean, beta + 1 / len(group))
            for key, group in chosen.items()
        ]
        between = math.fsum(distance**2 / width for distance, width in apart)
        found = _divide(middle, total, squares + between, freedom + max(0, len(apart) - 1))
        plain = replace(found, overstated=0.0)
        high = math.fsum(plain.believe(searched[key]).mean - value for key, group in chosen.items() for value in group)
        found = replace(found, overstated=high / (sum(map(len, chosen.values())) + PRIOR_VALUES))
    return found


def foreseen(searched: Mapping[int, float], early: Mapping[int, float]) -> dict[int, float]:
    """How far the first epochs let expect each configuration off the others' mean: o_i of the model.

        o_i = EARLY s_x (c_i - c) / s_c

    c_i is what the last rung compared, c and s_c mean and deviation of these and s_x the deviation of the values at
    the end, over the better half (by the end). A learning curve is a mean of many evaluations and has other noise than
    its last point. One that begins worse than all of the better half counts as the worst of it.

    Args:
        searched: of each configuration, larger being better.
        early: by the same keys; not finite where nothing is known.
    """
    known = {key: (value, early[key]) for key, value in searched.items() if math.isfinite(value + early[key])}
    found = dict.fromkeys(searched, 0.0)
    if len(known) < FEWEST_EARLY:
        return found
    middle = median(value for value, _ in known.values())
    better = [pair for pair in known.values() if pair[0] >= middle]
    ends, begins = zip(*better, strict=True)
    if not (width := pstdev(begins)):
        return found
    slope, mean, least = EARLY * pstdev(ends) / width, fmean(begins), min(begins)
    return found | {key: slope * (max(begin, least) - mean) for key, (_, begin) in known.items()}


def _within(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Sum of squared distances from each group's own mean, and its degrees of freedom."""
    means = [math.fsum(group) / len(group) for group in groups if group]
    pairs = zip([group for group in groups if group], means, strict=True)
    squares = math.fsum((value - mean) ** 2 for group, mean in pairs for value in group)
    return squares, sum(map(len, groups)) - len(means)


def _divide(middle: float, total: float, squares: float, freedom: int) -> Population:
    """The variance of the better values into noise and true differences.

    Before anything is repeated, as much is taken for the one as for the other.
    """
    noise = (squares + PRIOR_FREEDOM * total**2) / (freedom + PRIOR_FREEDOM)
    spread = max(total**2 - noise if freedom else total**2, LEAST_TRUE_SHARE * noise)
    return Population(middle, math.sqrt(spread), math.sqrt(noise))


def most_telling(beliefs: Mapping[int, Posterior], noise: float) -> tuple[int, float]:
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
