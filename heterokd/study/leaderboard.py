"""Which configurations lead, and how surely."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.posterior import Population, Posterior, foreseen, population
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.trials import TrialRecord, Trials

LOWER = 1.0
"""Deviations below its expected value at which a configuration's lower confidence bound stands."""


class Leaderboard:
    """The values of all configurations that were trained to the end, and what they say together.

    Attributes:
        complete: the trials that found them, by number.
        repeats: by the number of such a trial, its finished repetitions.
    """

    def __init__(self, trials: Trials, experiment: Experiment) -> None:
        self.experiment = experiment
        self.complete = {one.number: one for one in trials.search if one.is_complete}
        self.repeats = {
            number: [one for one in group if _is_measured(one)]
            for number, group in trials.confirmations.items()
            if number in self.complete
        }
        self._searched = {number: self.sign * metric(one) for number, one in self.complete.items()}
        self._fresh = {
            number: [self.sign * self._value(one) for one in group] for number, group in self.repeats.items()
        }
        # Students of other sizes reach other values: where size counts, each is believed in among its like.
        self._ranked: dict[int | None, list[RankedConfig]] = {}
        self._populations: dict[str, Population | None] = {}
        self._foreseen: dict[int, float] = {}
        for group in {self.group(one) for one in self.complete.values()}:
            mine = [number for number, one in self.complete.items() if self.group(one) == group]
            searched = {number: self._searched[number] for number in mine}
            self._foreseen |= foreseen(searched, {number: self._early(number) for number in mine})
            self._populations[group] = population(
                {number: value - self._foreseen[number] for number, value in searched.items()},
                {number: self._above(number, self._fresh[number]) for number in mine if number in self._fresh},
            )

    def group(self, training: TrialRecord) -> str:
        """Whom a training is compared with: its student, where size counts; else all."""
        return training.student if self.experiment.by_student else ""

    def population(self, group: str) -> Population | None:
        """What the configurations of a group have in common; None below two."""
        return self._populations.get(group)

    @property
    def sign(self) -> int:
        """Times a metric, what is better is larger."""
        return 1 if self.experiment.maximise else -1

    def belief(self, number: int, expected: int = 0) -> Posterior | None:
        """Of a configuration, larger being better; None below two configurations."""
        common = self._populations[self.group(self.complete[number])]
        if common is None:
            return None
        (searched,) = self._above(number, [self._searched[number]])
        found = common.believe(searched, self._above(number, self._fresh.get(number, ())), expected=expected)
        return replace(found, mean=found.mean + self._foreseen[number])

    def foremost(self, most: int) -> list[TrialRecord]:
        """Who alone may lead: all that are repeated and, of each group and of scratch there, the best of the others.

        Args:
            most: how many of the others.
        """
        chosen = set(self.repeats)
        others: dict[tuple[str, bool], list[TrialRecord]] = {}
        for one in self.complete.values():
            if one.number not in chosen:
                others.setdefault((self.group(one), one.method == BASELINE), []).append(one)
        for group in others.values():
            best = heapq.nsmallest(most, group, key=lambda one: (-self._hoped(one.number), one.number))
            chosen |= {one.number for one in best}
        return [self.complete[number] for number in sorted(chosen)]

    def leaders(self, most: int | None = None) -> list[RankedConfig]:
        """Configurations that were trained to the end, best first (the order: `Study.leaders`).

        The interval is a t-interval of the mean with the seed standard deviation pooled over all confirmed
        configurations (each has few values, too few for a deviation of its own): it supposes that seeds scatter all of
        them alike. It ends where the metric does.

        Args:
            most: only so many are wanted, and the best of scratch: those who cannot be among them are left out.
        """
        if most in self._ranked:
            return list(self._ranked[most])
        groups = [[self._value(one) for one in group] for group in self.repeats.values()]
        half_width = _half_widths(groups)
        chosen = self.complete.values() if most is None else self.foremost(most)
        found = [self._leader(one, self.repeats.get(one.number, []), half_width) for one in chosen]
        # Scratch is repeated to compare with it: that alone puts it before nobody.
        repeated = {leader.student for leader in found if leader.confirmed and leader.method != BASELINE}
        if not self.experiment.by_student and repeated:
            repeated = {leader.student for leader in found}
        self._ranked[most] = sorted(found, key=lambda leader: self._rank(leader, leader.student in repeated))
        return list(self._ranked[most])

    def _hoped(self, number: int) -> float:
        """What is believed of a configuration by its trial of the search."""
        common = self._populations[self.group(self.complete[number])]
        searched, above = self._searched[number], self._foreseen[number]
        return searched if common is None else common.expect(searched - above) + above

    def _above(self, number: int, values: Sequence[float]) -> list[float]:
        """Values of a configuration, counted from what its first epochs let expect."""
        return [value - self._foreseen[number] for value in values]

    def _early(self, number: int) -> float:
        """The mean over the first epochs of all trainings of a configuration; no number where there is none."""
        found = [one.early for one in (self.complete[number], *self.repeats.get(number, ()))]
        found = [self.sign * value for value in found if math.isfinite(value)]
        return math.fsum(found) / len(found) if found else math.nan

    def _leader(
        self, found: TrialRecord, repeats: list[TrialRecord], half_width: Callable[[int], float | None]
    ) -> RankedConfig:
        measured = repeats or [found]
        values = tuple(self._value(one) for one in measured)
        mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else -self.sign * math.inf
        half = half_width(len(values)) if math.isfinite(mean) else None
        belief = self.belief(found.number)
        # A share lies between 0 and 1, and two or three values far apart would reach beyond.
        least, most = (-math.inf, math.inf) if self.experiment.metric == "val/loss" else (0.0, 1.0)
        return RankedConfig(
            number=found.number,
            method=found.method,
            sample=found.sample,
            origin=found.origin,
            search_value=_finite(metric(found)),
            values=tuple(map(_finite, values)),
            seeds=tuple(one.seed for one in measured),
            numbers=tuple(one.number for one in measured),
            mean=_finite(mean),
            low=None if half is None else max(least, mean - half),
            high=None if half is None else min(most, mean + half),
            expected=_finite(mean if belief is None else self.sign * belief.mean),
            expected_deviation=None if belief is None else belief.deviation,
            confirmed=bool(repeats),
            student=found.student,
        )

    def _rank(self, leader: RankedConfig, are_repeated: bool) -> tuple[bool, float, float, bool, int]:
        is_unsure = are_repeated and not leader.confirmed
        expected, mean = (-math.inf if value is None else self.sign * value for value in (leader.expected, leader.mean))
        lower = expected - LOWER * (leader.expected_deviation or 0.0)
        return is_unsure, -lower, -mean, leader.method == BASELINE, leader.number

    def _value(self, training: TrialRecord) -> float:
        """A repetition that diverged counts as the worst there is."""
        return metric(training) if training.value is not None else -self.sign * math.inf


def metric(training: TrialRecord) -> float:
    """The searched metric of a trial that was trained to the end."""
    assert training.value is not None  # complete trials have one
    return training.value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_measured(training: TrialRecord) -> bool:
    """Whether a repetition says something of its configuration: also that it diverges."""
    return training.status in (TrialStatus.COMPLETE, TrialStatus.DIVERGED)


def _half_widths(groups: list[list[float]]) -> Callable[[int], float | None]:
    """Half the width of a mean's 95 % interval, as a function of how many values it is the mean of.

    The variance is pooled: sum of squared distances from each group's own mean over `sum(size - 1)` degrees of
    freedom. Without two values in any group there is none.
    """
    groups = [group for group in groups if len(group) > 1 and all(map(math.isfinite, group))]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return lambda size: None
    from scipy.special import stdtrit

    means = [math.fsum(group) / len(group) for group in groups]
    squares = math.fsum((value - mean) ** 2 for group, mean in zip(groups, means, strict=True) for value in group)
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(squares / freedom)
    return lambda size: half / math.sqrt(size)
