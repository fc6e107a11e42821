"""Leaderboard: rank the configurations that were trained to the end, with intervals and posteriors."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.posterior import Population, Posterior, expected_offsets, fit_population
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.seed_noise import NoisePrior, half_widths
from heterokd.study.space_change import is_searched
from heterokd.study.trials import TrialRecord, Trials

LOWER = 1.0
"""Standard deviations between a configuration's expected value and its lower confidence bound."""


class Leaderboard:
    """All configurations of the search space that were trained to the end, with their values and posteriors.

    Those of methods and students that were removed from it are left out.

    Args:
        trials: trials of the study.
        experiment: experiment of the study.
        prior: see below; default: that of a study without other studies.
        methods: methods that are searched; default: those of the experiment.

    Attributes:
        experiment: experiment of the study.
        prior: prior of the variance over seeds.
        complete: trials that found them, by number.
        repeats: finished repetitions, by the number of such a trial.
    """

    def __init__(
        self,
        trials: Trials,
        experiment: Experiment,
        prior: NoisePrior | None = None,
        methods: Sequence[str] | None = None,
    ) -> None:
        self.experiment, self.prior = experiment, prior or NoisePrior()
        named = experiment.methods if methods is None else methods
        self.complete = {
            record.number: record
            for record in trials.search
            if record.is_complete and is_searched(record, named, experiment)
        }
        self.repeats = {
            # A repetition that diverged counts, too, as the worst value.
            number: [record for record in group if record.status in (TrialStatus.COMPLETE, TrialStatus.DIVERGED)]
            for number, group in trials.confirmations.items()
            if number in self.complete
        }
        self._searched = {number: self.sign * metric(record) for number, record in self.complete.items()}
        self._fresh = {
            number: [self.sign * self._value(record) for record in group] for number, group in self.repeats.items()
        }
        self._ranked: dict[int | None, list[RankedConfig]] = {}
        # Students of different size reach different values: if costs count, each student is a population.
        self._populations: dict[str, Population | None] = {}
        self._offsets: dict[int, float] = {}
        for group in {self.group(record) for record in self.complete.values()}:
            members = [number for number, record in self.complete.items() if self.group(record) == group]
            searched = {number: self._searched[number] for number in members}
            self._offsets |= expected_offsets(searched, {number: self._early(number) for number in members})
            self._populations[group] = fit_population(
                {number: value - self._offsets[number] for number, value in searched.items()},
                {number: self._relative(number, self._fresh[number]) for number in members if number in self._fresh},
            )

    def group(self, record: TrialRecord) -> str:
        """Name the group in which a training is compared: its student if costs count, otherwise all."""
        return record.student if self.experiment.by_student else ""

    def population(self, group: str) -> Population | None:
        """Return the parameters that a group's configurations share; None below two."""
        return self._populations.get(group)

    @property
    def sign(self) -> int:
        """Factor that makes larger values of the metric better."""
        return 1 if self.experiment.maximise else -1

    def posterior(self, number: int, pending: int = 0) -> Posterior | None:
        """Compute the posterior of a configuration, larger is better; None below two configurations.

        `pending` is the number of its running repetitions.
        """
        common = self._populations[self.group(self.complete[number])]
        if common is None:
            return None
        (searched,) = self._relative(number, [self._searched[number]])
        found = common.posterior(searched, self._relative(number, self._fresh.get(number, ())), pending=pending)
        return replace(found, mean=found.mean + self._offsets[number])

    def candidates(self, most: int) -> list[TrialRecord]:
        """Select the configurations that can lead: all repeated ones, and the `most` best others of each group.

        Scratch counts as a group of its own.
        """
        chosen = set(self.repeats)
        others: dict[tuple[str, bool], list[TrialRecord]] = {}
        for record in self.complete.values():
            if record.number not in chosen:
                others.setdefault((self.group(record), record.method == BASELINE), []).append(record)
        for group in others.values():
            best = heapq.nsmallest(most, group, key=lambda record: (-self._expected(record.number), record.number))
            chosen |= {record.number for record in best}
        return [self.complete[number] for number in sorted(chosen)]

    def leaders(self, most: int | None = None) -> list[RankedConfig]:
        """Rank the configurations, best first (order: see `Study.leaders`).

        The interval is a t-interval of the mean, with the variance over seeds pooled over all confirmed configurations
        (each has few values, too few for an estimate) and with `prior`: it assumes the same variance for all of them.
        It is clipped to the metric's range.

        With `most`, only so many leaders and the best of scratch are needed: others can be left out.
        """
        if most not in self._ranked:
            # A loss is not a mean of scores in [0, 1].
            scores = [] if self.experiment.metric == "val/loss" else self._searched.values()
            best = max(map(abs, scores), default=None)
            groups = [[self._value(record) for record in group] for group in self.repeats.values()]
            half_width = half_widths(groups, self.prior, best)
            chosen = self.complete.values() if most is None else self.candidates(most)
            found = [self._leader(record, half_width) for record in chosen]
            # Scratch is repeated as a reference: that alone does not put its student before others.
            repeated = {leader.student for leader in found if leader.confirmed and leader.method != BASELINE}
            if not self.experiment.by_student and repeated:
                repeated = {leader.student for leader in found}
            self._ranked[most] = sorted(found, key=lambda leader: self._rank(leader, leader.student in repeated))
        return list(self._ranked[most])

    def _expected(self, number: int) -> float:
        """Return the expected true value of a configuration given its value of the search alone."""
        common = self._populations[self.group(self.complete[number])]
        searched, offset = self._searched[number], self._offsets[number]
        return searched if common is None else common.expect(searched - offset) + offset

    def _relative(self, number: int, values: Sequence[float]) -> list[float]:
        """Subtract from values of a configuration what its first epochs predict."""
        return [value - self._offsets[number] for value in values]

    def _early(self, number: int) -> float:
        """Return the mean value of a configuration's first epochs over all its trainings, or NaN."""
        found = [record.early for record in (self.complete[number], *self.repeats.get(number, ()))]
        found = [self.sign * value for value in found if math.isfinite(value)]
        return math.fsum(found) / len(found) if found else math.nan

    def _leader(self, found: TrialRecord, half_width: Callable[[int], float | None]) -> RankedConfig:
        repeats = self.repeats.get(found.number, [])
        measured = repeats or [found]
        values = tuple(self._value(record) for record in measured)
        mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else -self.sign * math.inf
        half = half_width(len(values)) if math.isfinite(mean) else None
        posterior = self.posterior(found.number)
        # A share is in [0, 1], and the interval of two or three distant values would exceed it.
        least, most = (-math.inf, math.inf) if self.experiment.metric == "val/loss" else (0.0, 1.0)
        return RankedConfig(
            number=found.number,
            method=found.method,
            sample=found.sample,
            origin=found.origin,
            search_value=_finite(metric(found)),
            values=tuple(map(_finite, values)),
            seeds=tuple(record.seed for record in measured),
            numbers=tuple(record.number for record in measured),
            mean=_finite(mean),
            low=None if half is None else max(least, mean - half),
            high=None if half is None else min(most, mean + half),
            expected=_finite(mean if posterior is None else self.sign * posterior.mean),
            expected_deviation=None if posterior is None else posterior.deviation,
            confirmed=bool(repeats),
            student=found.student,
            iou_classes=tuple(sorted({count for record in measured for count in record.iou_classes})),
        )

    def _rank(self, leader: RankedConfig, has_repeats: bool) -> tuple[bool, float, float, bool, int]:
        is_unsure = has_repeats and not leader.confirmed
        expected, mean = (-math.inf if value is None else self.sign * value for value in (leader.expected, leader.mean))
        lower = expected - LOWER * (leader.expected_deviation or 0.0)
        return is_unsure, -lower, -mean, leader.method == BASELINE, leader.number

    def _value(self, record: TrialRecord) -> float:
        """Return the metric; a repetition that diverged has the worst value."""
        return metric(record) if record.value is not None else -self.sign * math.inf


def metric(record: TrialRecord) -> float:
    """Return the searched metric of a complete trial."""
    assert record.value is not None  # complete trials have a value
    return record.value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
