"""Priors over methods from their ranks in published tables, whose weight decreases during a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from heterokd.config.experiment import Experiment
from heterokd.config.networks import NetworkSettings
from heterokd.errors import NetworkError
from heterokd.study.published import PublishedPair, published_pairs
from heterokd.tasks import TASKS, TaskName

UNRANKED = 0.5
"""Mean rank of a method in no table."""

SHARPNESS = 4.0
"""Logarithm of the ratio of the prior's probabilities of the best method (mean rank 0) and the worst (1)."""

WARM_WEIGHT = 0.5
"""Share of the first samples whose method is drawn by ranks, in a search with a warm start."""


def method_ranking(
    dataset: str, teacher_kind: str, student_kind: str, task: TaskName = "classification"
) -> dict[str, float]:
    """Return the mean rank of every method on similar pairs, best first: 0 is the best of each pair, 1 the worst.

    Similar pairs have the same data set and kinds (cnn, attention, mlp); if there are none, the same kinds on any data
    set; then the same student's kind; then all pairs, always of the data set's task. Methods are ranked within each
    pair, so that easy and hard pairs have equal weight; ties share their mean rank. A method that is missing in the
    similar pairs takes its rank from the next wider group.
    """
    score = TASKS[task].score
    pairs = [pair for pair in published_pairs() if pair.metric == score]
    groups = (
        lambda pair: (pair.dataset, pair.teacher_kind, pair.student_kind) == (dataset, teacher_kind, student_kind),
        lambda pair: (pair.teacher_kind, pair.student_kind) == (teacher_kind, student_kind),
        lambda pair: pair.student_kind == student_kind,
        lambda pair: True,
    )
    ranking: dict[str, float] = {}
    for is_similar in groups:
        for method, rank in _mean_ranks(pair for pair in pairs if is_similar(pair)).items():
            ranking.setdefault(method, rank)
    return dict(sorted(ranking.items(), key=lambda item: item[1]))


def expected_ranks(experiment: Experiment, methods: Sequence[str]) -> dict[str, float]:
    """Return the expected mean rank of each method on the experiment's (first) pair, best first.

    Methods in no table have `UNRANKED`; ties keep their order.
    """
    ranking = method_ranking(experiment.data.dataset, *kinds(experiment), experiment.data.task)
    expected = {method: ranking.get(method, UNRANKED) for method in methods}
    return dict(sorted(expected.items(), key=lambda item: item[1]))


def method_prior(
    ranks: Mapping[str, float], weight: float, finished: int, warm: Mapping[str, float] = MappingProxyType({})
) -> dict[str, float]:
    """Return the probability of each method to be drawn by the tables instead of the sampler for the next sample.

        share(n) = w exp(-n / N)           q(m) = exp(-s r(m)) / sum_m' exp(-s r(m'))           share(n) q(m)

    w is `search.prior_weight` (at least `WARM_WEIGHT` with a warm start, whose ranks then count half), n the number of
    finished samples (without published starts), N the number of methods, r the expected mean rank and s `SHARPNESS`.
    The share vanishes within a few N samples, so that wrong tables cannot hold a search back; the rest of 1 belongs to
    the sampler.

    `ranks`: see `expected_ranks`; `warm` are mean ranks in other studies.
    """
    weight = max(weight, WARM_WEIGHT if warm else 0.0)
    if not weight or not ranks:
        return {}
    share = weight * math.exp(-finished / len(ranks))
    ranks = {method: (rank + warm[method]) / 2 if method in warm else rank for method, rank in ranks.items()}
    likely = {method: math.exp(-SHARPNESS * rank) for method, rank in ranks.items()}
    total = math.fsum(likely.values())
    return {method: share * value / total for method, value in likely.items()}


def _mean_ranks(pairs: Iterable[PublishedPair]) -> dict[str, float]:
    ranks: dict[str, list[float]] = {}
    for pair in pairs:
        values = {method: result.value for method in pair.methods if (result := pair.of(method)) is not None}
        for method, value in values.items():
            better = sum(other > value for other in values.values())
            equal = sum(other == value for other in values.values()) - 1
            ranks.setdefault(method, []).append((better + equal / 2) / max(1, len(values) - 1))
    return {method: math.fsum(found) / len(found) for method, found in ranks.items()}


def kinds(experiment: Experiment) -> tuple[str, str]:
    """Return the kinds (cnn, attention, mlp) of the first teacher and student; empty for one that cannot be built."""
    from heterokd.networks.network import predict_spec  # lazily: a study's actor does not import torch

    def kind(settings: NetworkSettings, size: int) -> str:
        try:
            return predict_spec(settings.network, 10, settings.options, size).kind
        except NetworkError:
            return ""

    return (
        kind(experiment.teacher.settings_of(), experiment.teacher_size),
        kind(experiment.student.settings_of(), experiment.data.image_size),
    )
