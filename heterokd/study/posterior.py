"""Posterior of each configuration that was trained to the end, and the repetition with the largest knowledge gradient.

Model: the true value of a configuration is normal around those of similar ones, and each training varies around it with
the same seed deviation sigma. The value x_i of the search is biased by the selection (it passed the rungs by its luck
as well), values y_ij on fresh seeds are not:

    mu_i ~ N(m, tau^2)        x_i = mu_i + b + e_i        y_ij = mu_i + e_ij        e ~ N(0, sigma^2)
    mu_i | x_i ~ N(p_i, v),   p_i = m + beta (x_i - m) - b,   beta = tau^2 / (tau^2 + sigma^2),   v = beta sigma^2
    mu_i | x_i, y_i ~ N((p_i / v + sum_j y_ij / sigma^2) v_i, v_i),   v_i = 1 / (1 / v + n_i / sigma^2)

All values are relative to what the first epochs predict: x_i, y_ij and mu_i are differences to o_i
(`expected_offsets`). sigma is pooled over repeated configurations, m and tau are estimated from the better half of the
values of the search (empirical Bayes): a search has a long tail of bad values without information on the good ones, and
below m nothing is shrunk upwards. b is the mean distance of the p_i above m from their fresh values. So the winner's
curse is removed twice: from the values of the search, and from the best among few fresh values.

The next repetition is that of the largest knowledge gradient (Frazier, Powell, Dayanik, "A Knowledge-Gradient Policy
for Sequential Information Collection", SIAM J. Control Optim. 2008): the expected gain in the best mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, median, pstdev

import numpy as np

PRIOR_FREEDOM = 2.0
"""Degrees of freedom of the prior estimate of sigma, in addition to those of repeated configurations."""

LEAST_TRUE_SHARE = 0.25
"""Minimum of tau^2 / sigma^2: configurations are never assumed to be all equal."""

PRIOR_VALUES = 0.5
"""Number of fresh values that the prior b = 0 counts as."""

EARLY = 0.5
"""Predicted final value, in standard deviations, of a configuration whose first epochs are one standard deviation above
the mean: on exhaustive tables (benchmarks/search_efficiency) 0.5 to 0.8 gave the best searches, and an estimate from
the few values of each search was worse than none."""

FEWEST_EARLY = 4
"""Minimum number of configurations for a prediction from first epochs."""

PASSES = 3
"""Iterations in which sigma and b are estimated from each other."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Posterior:
    """Mean and standard deviation of a configuration's true value."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Population:
    """Parameters that all configurations share; larger values are better.

    Attributes:
        mean: m.
        spread: tau.
        noise: sigma.
        bias: b.
    """

    mean: float
    spread: float
    noise: float
    bias: float = 0.0

    def posterior(self, searched: float, fresh: Sequence[float] = (), *, pending: int = 0) -> Posterior:
        """Compute the posterior of a configuration.

        Args:
            searched: value of the search.
            fresh: values on fresh seeds.
            pending: number of fresh values to come: they reduce the deviation and do not change the mean.
        """
        if not all(map(math.isfinite, (searched, *fresh))):
            return Posterior(-math.inf, 0.0)
        variance, seed_variance = self._shrinkage(searched) * self.noise**2, self.noise**2
        precision = 1 / variance + len(fresh) / seed_variance
        mean = (self.expect(searched) / variance + math.fsum(fresh) / seed_variance) / precision
        return Posterior(mean, math.sqrt(1 / (precision + pending / seed_variance)))

    def expect(self, searched: float) -> float:
        """Return the expected true value of a configuration given its value of the search alone."""
        return self.mean + self._shrinkage(searched) * (searched - self.mean) - self.bias

    def _shrinkage(self, searched: float) -> float:
        # The tail of bad values is longer than a normal one, so these are not shrunk.
        return self.spread**2 / (self.spread**2 + self.noise**2) if searched > self.mean else 1.0


def fit_population(searched: Mapping[int, float], repeated: Mapping[int, Sequence[float]]) -> Population | None:
    """Fit the model to the values of a search; return None below two finite values.

    Larger values are better; `repeated` are values on fresh seeds, by the same keys.
    """
    values = [value for value in searched.values() if math.isfinite(value)]
    if len(values) < 2:
        return None
    middle, high = (float(np.quantile(values, share)) for share in (0.5, 0.85))
    total = max((high - middle) / _NORMAL.inv_cdf(0.85), 1e-6 * max(*map(abs, values), 1e-6))
    finite = {key: group for key, group in repeated.items() if group and all(map(math.isfinite, group))}
    chosen = {key: group for key, group in finite.items() if middle <= searched[key] < math.inf}
    squares, freedom = pooled_squares(list(finite.values()))
    found = _split_variance(middle, total, squares, freedom)
    for _ in range(PASSES):
        # Besides their variance within a group, fresh values differ from what was predicted by sigma.
        beta = found.spread**2 / (found.spread**2 + found.noise**2)
        between = math.fsum(
            (fmean(group) - found.expect(searched[key])) ** 2 / (beta + 1 / len(group)) for key, group in chosen.items()
        )
        found = _split_variance(middle, total, squares + between, freedom + max(0, len(chosen) - 1))
        excess = math.fsum(found.expect(searched[key]) - value for key, group in chosen.items() for value in group)
        found = replace(found, bias=excess / (sum(map(len, chosen.values())) + PRIOR_VALUES))
    return found


def expected_offsets(searched: Mapping[int, float], early: Mapping[int, float]) -> dict[int, float]:
    """Predict each configuration's difference to the others' mean from its first epochs: o_i of the model.

        o_i = EARLY s_x (c_i - c) / s_c

    c_i is the value that the last rung compared, c and s_c are mean and standard deviation of these and s_x is that of
    the final values, over the better half (by final value). A learning curve is a mean of many evaluations, whose noise
    differs from that of its last point. A configuration that starts worse than all of the better half counts as the
    worst of it.

    Args:
        searched: final value of each configuration, larger is better.
        early: value of the first epochs, by the same keys; not finite if unknown.
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


def pooled_squares(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Sum the squared differences of values to their group's mean; return them with their degrees of freedom."""
    squares, freedom = [], 0
    for group in filter(None, groups):
        mean = math.fsum(group) / len(group)
        squares += [(value - mean) ** 2 for value in group]
        freedom += len(group) - 1
    return math.fsum(squares), freedom


def _split_variance(middle: float, total: float, squares: float, freedom: int) -> Population:
    """Split the variance of the better values into noise and true differences, equally before any repetition."""
    noise = (squares + PRIOR_FREEDOM * total**2) / (freedom + PRIOR_FREEDOM)
    spread = max(total**2 - noise if freedom else total**2, LEAST_TRUE_SHARE * noise)
    return Population(middle, math.sqrt(spread), math.sqrt(noise))


def best_repetition(posteriors: Mapping[int, Posterior], noise: float) -> tuple[int, float]:
    """Return the configuration whose next repetition has the largest knowledge gradient, and this gain.

    Args:
        posteriors: posterior of each configuration by number; at least one.
        noise: sigma.
    """
    ranked = sorted(posteriors, key=lambda number: (-posteriors[number].mean, number))
    best = posteriors[ranked[0]].mean
    second = posteriors[ranked[1]].mean if len(ranked) > 1 else -math.inf
    gains = {}
    for number in ranked:
        known = posteriors[number]
        rival = second if number == ranked[0] else best
        change = known.deviation**2 / math.hypot(known.deviation, noise)  # of the mean, by another value
        if change <= 0 or not math.isfinite(rival) or not math.isfinite(known.mean):
            gains[number] = 0.0
            continue
        distance = -abs(known.mean - rival) / change
        gains[number] = change * (distance * _NORMAL.cdf(distance) + _NORMAL.pdf(distance))
    chosen = max(ranked, key=lambda number: gains[number])
    return chosen, gains[chosen]
