"""Combinations of the best methods, which the sampler may propose (`search.combine`).

A pair is possible once both of its methods are among the best `LEADERS`. Its first trial has the best values of both
methods; the estimator proposes the others. Each pair is drawn until it has `TRIALS` trials, afterwards it competes with
all methods in the estimator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from heterokd.config.domain_values import nearest
from heterokd.domains import Scalar
from heterokd.methods import BASELINE, PLUS, members_of
from heterokd.study.sampler import Prior
from heterokd.study.search_space import SearchSpace
from heterokd.study.trials import TrialRecord, Trials

LEADERS = 3
"""Number of the best methods that are combined: three pairs."""

TRIALS = 2
"""Trials of a pair before only the estimator proposes it."""

SHARE = 0.5
"""Probability that the next sample is that of a pair with fewer trials, if there is any."""


@dataclass(frozen=True)
class PossiblePairs:
    """Pairs that the sampler may propose.

    Attributes:
        names: all of them.
        prior: values and probability of those with fewer than `TRIALS` trials.
    """

    names: frozenset[str]
    prior: Prior

    def share(self, prior: Prior) -> Prior:
        """Return a prior over other methods with the probability that is left."""
        left = 1 - sum(probability for _, probability in self.prior)
        return [(values, left * probability) for values, probability in prior]


def possible_pairs(trials: Trials, space: SearchSpace, pairs: Collection[str], *, maximise: bool) -> PossiblePairs:
    """Return the pairs of the best methods.

    Args:
        trials: trials of the study so far.
        space: space of the study.
        pairs: names of all pairs that the space has.
        maximise: whether a larger value is better.
    """
    best: dict[str, TrialRecord] = {}
    sign = 1 if maximise else -1
    for record in trials.search:
        if not record.is_complete or record.value is None or record.method == BASELINE or PLUS in record.method:
            continue
        if record.method not in space.domains:
            continue  # removed from the search space
        known = best.get(record.method)
        if known is None or sign * record.value > sign * _value(known):
            best[record.method] = record
    ranked = sorted(best, key=lambda method: -sign * _value(best[method]))[:LEADERS]
    possible = [pair for pair in pairs if set(members_of(pair)) <= set(ranked)]
    counts = Counter(record.method for record in trials.search)
    drawn = [pair for pair in possible if counts[pair] < TRIALS]
    prior = [
        ({"method": pair} if counts[pair] else first_values(pair, space, ranked, best), SHARE / len(drawn))
        for pair in drawn
    ]
    return PossiblePairs(frozenset(possible), prior)


def first_values(
    pair: str, space: SearchSpace, ranked: Collection[str], best: Mapping[str, TrialRecord]
) -> dict[str, Scalar]:
    """Return the best values of both methods as a sample of their pair; shared values are those of the better method.

    Args:
        pair: its name.
        space: space of the study.
        ranked: methods, best first.
        best: best trial of each method.
    """
    members = [method for method in ranked if method in members_of(pair)]
    values: dict[str, Scalar] = {}
    for method in reversed(members):
        for key, value in best[method].sample.items():
            owner, _, name = key.partition(".")
            values[f"{pair}.{method}_{name}" if owner == method else key] = value
    values |= {"method": pair}
    searched = space.domains[pair]
    defaults = {key: value for key, value in space.defaults[pair].items() if key in searched}
    return {
        key: value if key == "method" else nearest(value, searched[key])
        for key, value in {**defaults, **values}.items()
        if key == "method" or key in searched
    }


def _value(record: TrialRecord) -> float:
    assert record.value is not None  # of complete trials
    return record.value
