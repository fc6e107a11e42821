"""Significance of differences between configurations: paired on common seeds, corrected for multiple comparisons.

A seed fixes weights, order and views, so the values of two configurations on the same seed are a pair. Two tests:

    separate    t-test of the paired differences: the least squares below, over the pair's common seeds alone
    pooled      value = configuration + seed + noise, least squares over all values; the variance is estimated from all
                of them. For two or three seeds each, too few for a variance of each pair. It assumes that the variance
                over seeds is the same for all configurations.

p-values of all pairs are corrected by Holm (A Simple Sequentially Rejective Multiple Test Procedure, 1979). The effect
is Cohen's d of the paired differences with Hedges' correction for few of them (Distribution Theory for Glass's
Estimator of Effect Size, 1981). The number of seeds that would decide a tie follows from the noncentral t.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heterokd.study.trial_view import TrialView

Values = Mapping[str, Mapping[int, float]]
"""Values of the metric by configuration and seed."""

LEVEL = 0.05
POWER = 0.8
"""Power of the test with `seeds_needed` seeds if the difference is the true one."""

MOST_SEEDS = 1000
"""Maximum of `seeds_needed`: a difference that needs more seeds is of no practical use."""

Verdict = Literal["better", "worse", "tie", "unknown"]


@dataclass(frozen=True)
class Comparison:
    """Comparison of two configurations.

    Attributes:
        first: name of the first configuration.
        second: name of the second.
        seeds: common seeds.
        difference: first minus second, positive if the first is better (also when the metric is minimised).
        low: lower end of its 95 % interval, uncorrected; None without variance or with too few seeds.
        high: upper end.
        p: two-sided p-value, uncorrected.
        p_holm: p-value corrected for all comparisons.
        effect: difference divided by the standard deviation of a seed's difference; None without variance.
        verdict: `tie` if p_holm is at least `LEVEL`; `unknown` with too few seeds.
        seeds_needed: total number of seeds that decide a tie with `POWER` if the difference is the true one; None if it
            is decided, or if more than `MOST_SEEDS` are needed.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    difference: float
    low: float | None
    high: float | None
    p: float
    p_holm: float
    effect: float | None
    verdict: Verdict
    seeds_needed: int | None

    def sentence(self, *, digits: int = 4) -> str:
        """Describe the result in a sentence."""
        if self.verdict == "unknown":
            return f"{self.first} and {self.second}: {len(self.seeds)} common seed(s) are too few; train both on more."
        word = {"better": "is better than", "worse": "is worse than", "tie": "ties with"}[self.verdict]
        text = f"{self.first} {word} {self.second}: {self.difference:+.{digits}f}, p {self.p_holm:.3f} (Holm)"
        if self.low is not None and self.high is not None:
            text += f", 95 % interval {self.low:+.{digits}f} to {self.high:+.{digits}f}"
        if self.verdict != "tie":
            return f"{text}."
        if self.seeds_needed is None:
            return f"{text}; {MOST_SEEDS} seeds cannot decide a difference as small as this."
        return f"{text}; about {self.seeds_needed} seeds would decide it ({len(self.seeds)} so far)."


@dataclass(frozen=True)
class _Estimate:
    """Difference of a pair, its standard error, degrees of freedom, and standard deviation of a seed's difference."""

    seeds: tuple[int, ...]
    difference: float
    error: float
    freedom: int
    deviation: float

    @property
    def is_known(self) -> bool:
        # Differences that are equal to the last bit come from a coarse metric, not from certainty.
        return self.freedom > 0 and self.error > 0

    @property
    def p(self) -> float:
        from scipy.special import stdtr

        if not self.is_known:
            return 1.0
        return float(2 * stdtr(self.freedom, -abs(self.difference) / self.error))

    @property
    def half_width(self) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, 1 - LEVEL / 2)) * self.error

    @property
    def effect(self) -> float:
        """Cohen's d with Hedges' correction, exact by the gamma function."""
        half = self.freedom / 2
        correction = 1.0
        if self.freedom > 1:
            correction = math.exp(math.lgamma(half) - math.lgamma(half - 0.5) - math.log(half) / 2)
        return correction * self.difference / self.deviation


def compare(
    values: Values,
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    pooled: bool = False,
    maximise: bool = True,
) -> list[Comparison]:
    """Compare configurations on the seeds that they share.

    Args:
        values: values by configuration and seed; those that are not finite are left out.
        pairs: pairs to compare, in this order; by default all, each in the order of `values`.
        pooled: estimate the variance from all values together, see above.
        maximise: whether a larger value is better.
    """
    known = {
        name: {s: value for s, value in by_seed.items() if math.isfinite(value)} for name, by_seed in values.items()
    }
    wanted = list(itertools.combinations(known, 2)) if pairs is None else list(pairs)
    sign = 1 if maximise else -1
    if pooled:
        estimates = _least_squares(known, wanted, sign)
    else:
        estimates = [_least_squares({name: known[name] for name in pair}, [pair], sign)[0] for pair in wanted]
    corrected = holm([estimate.p for estimate in estimates])
    found = []
    for (first, second), estimate, p_holm in zip(wanted, estimates, corrected, strict=True):
        verdict: Verdict = "tie"
        if not estimate.is_known:
            verdict = "unknown" if estimate.freedom < 1 else "tie"
        elif p_holm < LEVEL:
            verdict = "better" if estimate.difference > 0 else "worse"
        needed = None
        if verdict == "tie" and estimate.is_known:
            growth = estimate.freedom / max(1, len(estimate.seeds) - 1)
            needed = seeds_needed(estimate.difference / estimate.deviation, LEVEL / len(wanted), growth)
            # These seeds did not decide it, so more are needed, whatever the estimated variance.
            needed = None if needed is None else max(needed, len(estimate.seeds) + 1)
        half = estimate.half_width if estimate.is_known else None
        found.append(
            Comparison(
                first=first,
                second=second,
                seeds=estimate.seeds,
                difference=estimate.difference,
                low=None if half is None else estimate.difference - half,
                high=None if half is None else estimate.difference + half,
                p=estimate.p,
                p_holm=p_holm,
                effect=estimate.effect if estimate.is_known else None,
                verdict=verdict,
                seeds_needed=needed,
            )
        )
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down procedure, in the given order."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, values[order] * np.arange(len(values), 0, -1)))
    return [float(value) for value in corrected]


def seeds_needed(effect: float, level: float = LEVEL, growth: float = 1.0) -> int | None:
    """Return the number of common seeds with which a paired test detects a true `effect` with probability `POWER`.

    Args:
        effect: the difference divided by the standard deviation of a seed's difference.
        level: two-sided level of the test.
        growth: degrees of freedom that each further seed adds.

    Returns:
        None if more than `MOST_SEEDS` are needed.
    """
    counts = range(2, MOST_SEEDS + 1)
    place = bisect_left(counts, POWER, key=lambda seeds: power_of(effect, seeds, level, growth))
    return counts[place] if place < len(counts) else None


def power_of(effect: float, seeds: int, level: float = LEVEL, growth: float = 1.0) -> float:
    """Return the power of a paired two-sided test on `seeds` seeds for a true `effect`; see `seeds_needed`."""
    from scipy.special import nctdtr, stdtrit

    if seeds < 2 or effect == 0:
        return level
    freedom = growth * (seeds - 1)
    quantile, shift = float(stdtrit(freedom, 1 - level / 2)), abs(effect) * math.sqrt(seeds)
    # Far below the mean, where the probability is 0, SciPy returns NaN.
    above, below = (float(np.nan_to_num(nctdtr(freedom, shift, place))) for place in (quantile, -quantile))
    return 1 - above + below


def _common(values: Values, pair: tuple[str, str]) -> tuple[int, ...]:
    return tuple(seed for seed in sorted(values[pair[0]]) if seed in values[pair[1]])


def _least_squares(values: Values, pairs: Sequence[tuple[str, str]], sign: int) -> list[_Estimate]:
    """Fit configuration + seed by least squares; return each pair's contrast with the residuals' variance."""
    # A seed that only one configuration has, and a configuration that shares none, have no information on differences.
    counts = Counter(seed for by_seed in values.values() for seed in by_seed)
    seeds = sorted(seed for seed, count in counts.items() if count > 1)
    cells = [(name, seed) for name, by_seed in values.items() for seed in seeds if seed in by_seed]
    names = list(dict.fromkeys(name for name, _ in cells))
    design = np.zeros((len(cells), len(names) + len(seeds)))
    for row, (name, seed) in enumerate(cells):
        design[row, names.index(name)] = design[row, len(names) + seeds.index(seed)] = 1
    measured = np.array([sign * values[name][seed] for name, seed in cells])
    coefficients, _, rank, _ = np.linalg.lstsq(design, measured, rcond=None) if cells else (np.zeros(0), 0, 0, 0)
    freedom = len(cells) - int(rank)
    residuals = measured - design @ coefficients
    variance = float(residuals @ residuals) / freedom if freedom else 0.0
    if variance < _rounding(measured) ** 2:
        variance = 0.0
    inverse = np.linalg.pinv(design.T @ design) if cells else np.zeros((0, 0))
    estimates = []
    for pair in pairs:
        common = _common(values, pair)
        if not common:
            estimates.append(_Estimate((), 0.0, 0.0, 0, 0.0))
            continue
        contrast = np.zeros(design.shape[1])
        contrast[names.index(pair[0])], contrast[names.index(pair[1])] = 1, -1
        error = math.sqrt(variance * float(contrast @ inverse @ contrast))
        estimates.append(_Estimate(common, float(contrast @ coefficients), error, freedom, math.sqrt(2 * variance)))
    return estimates


def _rounding(values: NDArray[np.float64]) -> float:
    """Return the standard deviation below which a variance is a rounding error."""
    return 1e-12 * max(1.0, float(np.abs(values).max(initial=0)))


def fresh_values(trials: Iterable[TrialView]) -> dict[str, dict[int, float]]:
    """Collect the values of each configuration on fresh seeds, if it has at least two.

    A configuration is named by its method, and by the trial that found it if the method has several. The trial that
    found a leader is left out: as the best of many, it is biased.
    """
    groups: dict[str, list[TrialView]] = {}
    for trial in trials:
        if trial.is_complete:
            groups.setdefault(trial.configuration, []).append(trial)
    fresh = []
    for group in groups.values():
        repeats = [trial for trial in group if trial.confirms is not None] or group
        if len({trial.seed for trial in repeats}) > 1:
            fresh.append((min(trial.number for trial in group), repeats))
    methods = [repeats[0].method for _, repeats in fresh]
    return {
        repeats[0].method if methods.count(repeats[0].method) == 1 else f"{repeats[0].method} (trial {number})": {
            trial.seed: trial.value for trial in repeats if trial.value is not None
        }
        for number, repeats in sorted(fresh, key=lambda found: found[0])
    }


def compare_trials(trials: Iterable[TrialView], *, maximise: bool = True) -> list[Comparison]:
    """Compare all pairs of a study's configurations on fresh seeds, the better of each pair first.

    The variance is pooled: a study repeats few configurations on few seeds.
    """
    values = fresh_values(trials)
    sign = -1 if maximise else 1
    ranked = dict(sorted(values.items(), key=lambda item: sign * fmean(item[1].values())))
    return compare(ranked, pooled=True, maximise=maximise)


def as_rows(comparisons: Iterable[Comparison]) -> list[dict[str, object]]:
    """Convert to plain values, for JSON."""
    return [{**asdict(pair), "seeds": list(pair.seeds), "sentence": pair.sentence()} for pair in comparisons]
