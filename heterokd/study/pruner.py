"""Who goes on at a rung: asynchronous successive halving, and who does harm.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, https://arxiv.org/abs/1810.05934.

Unlike there, rungs end early enough for a stop to save something, and references (scratch and plain KD) are compared
without being stopped, since what a search brings is measured from them. Other published settings are stopped like
samples: on exhaustive tables (benchmarks/search_efficiency) training all to their end took a third of a small budget
from what finds better ones. Compared are searched trainings of the same length; where size counts beside accuracy, of
the same student as well, or only large ones would be left.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Protocol

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.study.assignment import BEHIND, NEGATIVE_TRANSFER, REFERENCES
from heterokd.study.trials import TrialRecord, Trials

LAST_RUNG = Fraction(2, 3)
"""Share of the epochs after which nothing is stopped any more: it would save little and lose a trained student."""

COMPARED = Fraction(1, 3)
"""Share of a training's epochs whose mean is compared at a rung, the newest ones; all of them where fewer are done."""

TWIN_FROM = Fraction(1, 4)
"""Share of the epochs before which no training is compared with its scratch twin: a method's projectors start from
nothing, so that some methods fall behind first and lead later."""

TWIN_DEVIATIONS = 3.0
"""Standard errors of a difference between two single trainings from which it is more than noise."""

FEWEST_SPREAD = 5
"""Values that a spread between configurations is read from."""


def checkpoint_epochs(experiment: Experiment, epochs: int) -> tuple[int, ...]:
    """Finished epochs after which a training of `epochs` is compared with the others."""
    found, rung = [], max(1, round(experiment.search.first_rung * epochs))
    while rung <= LAST_RUNG * epochs:
        found.append(rung)
        rung *= experiment.search.reduction_factor
    return tuple(found)


def compared(epochs: int) -> int:
    """Over how many epochs the mean is taken that a rung compares."""
    return max(1, round(COMPARED * epochs))


class Pruner(Protocol):
    """Decides which trainings end early."""

    @property
    def every_epoch(self) -> bool:
        """Whether it is asked after every epoch; otherwise only at checkpoints, see `checkpoint_epochs`."""

    def decide(self, trials: Trials, record: TrialRecord, epoch: int) -> str | None:
        """Decide on a training that has reported a finite value after `epoch`.

        Args:
            trials: of the study so far, this report included.
            record: of the search, not a repetition.
            epoch: finished epochs, counted from 1.

        Returns:
            Why it ends there; None: it goes on.
        """


@dataclass(frozen=True)
class AsynchronousHalving:
    """Stops whoever is outside the best `1 / reduction_factor` at a rung, or clearly below its scratch twin.

    Attributes:
        reduction_factor: one in this many trainings passes a rung.
        maximise: whether a larger metric is better.
        by_student: whether trainings are compared with those of the same student only.
    """

    reduction_factor: int
    maximise: bool = True
    by_student: bool = False
    every_epoch: ClassVar[bool] = False

    @classmethod
    def of(cls, experiment: Experiment) -> AsynchronousHalving:
        """As an experiment's keys say."""
        return cls(experiment.search.reduction_factor, experiment.maximise, experiment.by_student)

    def decide(self, trials: Trials, record: TrialRecord, epoch: int) -> str | None:
        """Decide at a rung; see `Pruner`."""
        if self._does_harm(trials, record, epoch):
            return NEGATIVE_TRANSFER
        if is_reference(record):
            return None
        return BEHIND if self._is_behind(trials, record, epoch) else None

    def _is_behind(self, trials: Trials, record: TrialRecord, epoch: int) -> bool:
        """Whether a training is outside the best share of a rung; of few values, is not the best."""
        arrived = self._comparable(trials, record, epoch)
        place = max(1, len(arrived) // self.reduction_factor)
        if self.maximise:
            return record.reports[epoch] < arrived[-place]
        return record.reports[epoch] > arrived[place - 1]

    def _comparable(self, trials: Trials, record: TrialRecord, epoch: int) -> Sequence[float]:
        """Values that a training is compared with at a rung, smallest first."""
        return trials.arrived(epoch, record.epochs, record.student if self.by_student else "")

    def _does_harm(self, trials: Trials, record: TrialRecord, epoch: int) -> bool:
        """Whether a training is worse than the same student trained on labels alone, by more than noise.

        Its twin has the same student and the same settings of training. The difference of two trainings scatters by
        sqrt(2) seed deviations; as long as no configuration was repeated, the spread between configurations at this
        rung, which is larger, stands in for it.
        """
        if record.method == BASELINE or epoch < TWIN_FROM * record.epochs:
            return False
        twins = [
            twin.reports[epoch]
            for twin in (
                *trials.baselines.get(epoch, ()),
                *(one for group in trials.confirmations.values() for one in group),
            )
            if twin.method == BASELINE and epoch in twin.reports and _conditions(twin) == _conditions(record)
        ]
        twins = [value for value in twins if math.isfinite(value)]
        if not twins:
            return False
        deviation = _seed_deviation(trials, record, epoch) or _spread(self._comparable(trials, record, epoch))
        if deviation is None:
            return False
        below = math.fsum(twins) / len(twins) - record.reports[epoch]
        error = deviation * math.sqrt(1 + 1 / len(twins))
        return (below if self.maximise else -below) > TWIN_DEVIATIONS * error


class NoPruning:
    """Lets every training reach its end."""

    every_epoch: ClassVar[bool] = False

    def decide(self, trials: Trials, record: TrialRecord, epoch: int) -> str | None:
        """Nothing; see `Pruner`."""
        return None


def is_reference(record: TrialRecord) -> bool:
    """Whether a training is one that others are compared with; no pruner ends it for being behind."""
    return record.method in REFERENCES and record.origin == "published"


def _conditions(record: TrialRecord) -> tuple[object, ...]:
    settings = {key: value for key, value in record.sample.items() if key.startswith("training.")}
    # How much the labels weigh beside the teacher is a setting of distillation: scratch has nothing beside them.
    settings.pop("training.task_weight", None)
    return record.student, record.epochs, tuple(sorted(settings.items()))


def _seed_deviation(trials: Trials, record: TrialRecord, epoch: int) -> float | None:
    """Pooled over the configurations that reported at this rung on several fresh seeds; None below four such values."""
    squares, freedom = 0.0, 0
    for group in trials.confirmations.values():
        values = [one.reports[epoch] for one in group if epoch in one.reports and one.epochs == record.epochs]
        values = [value for value in values if math.isfinite(value)]
        if len(values) > 1:
            mean = math.fsum(values) / len(values)
            squares += math.fsum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom >= FEWEST_SPREAD - 1 and squares else None


def _spread(values: Sequence[float]) -> float | None:
    """Middle half of sorted values as a normal deviation; None below `FEWEST_SPREAD` finite ones."""
    first = bisect_right(values, -math.inf)
    count = bisect_left(values, math.inf) - first
    if count < FEWEST_SPREAD:
        return None
    quarter = count // 4
    width = (values[first + count - 1 - quarter] - values[first + quarter]) / 1.349
    return width or None
