"""Pruner: stop trials by asynchronous successive halving, and those with negative transfer.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, https://arxiv.org/abs/1810.05934.

Unlike there, rungs end early enough for a stop to save time, and references (scratch and plain KD) are compared but not
stopped, since the gain of a search is measured from them. Other published settings are stopped like samples: on
exhaustive tables (benchmarks/search_efficiency) training all of them took a third of a small budget from the search for
better ones. Trainings of the search with the same number of epochs are compared; if costs are objectives, those of the
same student, or only large students would remain.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Protocol

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.study.assignment import BEHIND, NEGATIVE_TRANSFER, REFERENCES
from heterokd.study.posterior import pooled_squares

if TYPE_CHECKING:
    from heterokd.study.trials import TrialRecord, Trials

LAST_RUNG = Fraction(2, 3)
"""Share of the epochs after which no trial is stopped: it would save little and lose a trained student."""

FEWEST_EPOCHS = 3
"""Epoch before which no training is stopped unless `search.min_epochs` allows it: the first two say little of a method
whose projectors start from random weights."""

COMPARED = Fraction(1, 3)
"""Share of a training's epochs whose mean is compared at a rung, the newest ones; all if there are fewer."""

TWIN_FROM = Fraction(1, 4)
"""Share of the epochs before which no training is compared with its scratch twin: a method's projectors start from
random weights, so some methods are behind at first and lead later."""

TWIN_DEVIATIONS = 3.0
"""Standard errors from which a difference between two single trainings is significant."""

CURVE_EPOCHS = 10
"""Minimum number of evaluated epochs of a complete training, evenly spaced, so that its curve is seen to its end."""

FEWEST_SPREAD = 5
"""Minimum number of values for an estimate of a standard deviation."""


def checkpoint_epochs(experiment: Experiment, epochs: int) -> tuple[int, ...]:
    """Return the finished epochs after which a training of `epochs` is compared with others and saved."""
    found, rung = [], max(_least_epochs(experiment), round(experiment.search.first_rung * epochs))
    while rung <= LAST_RUNG * epochs:
        found.append(rung)
        rung *= experiment.search.reduction_factor
    return tuple(found)


def _least_epochs(experiment: Experiment) -> int:
    """Return the epoch before which no training is stopped."""
    asked = experiment.search.min_epochs
    return max(FEWEST_EPOCHS, math.ceil(experiment.training.warmup_epochs)) if asked == "auto" else asked


def compared(epochs: int) -> int:
    """Return the number of epochs whose mean a rung compares."""
    return max(1, round(COMPARED * epochs))


def evaluated_epochs(experiment: Experiment, epochs: int) -> frozenset[int] | None:
    """Return the finished epochs after which a training of `epochs` is evaluated; None: all.

    Decisions read the epochs that a rung compares, and the last, which is the result; the others are for its curve.
    """
    if experiment.search.evaluate == "every" or experiment.search.pruner is not None:
        return None
    newest = compared(epochs)
    read = {epoch for rung in checkpoint_epochs(experiment, epochs) for epoch in range(rung - newest + 1, rung + 1)}
    curve = {math.ceil(part * epochs / CURVE_EPOCHS) for part in range(1, CURVE_EPOCHS + 1)}
    return frozenset(epoch for epoch in read | curve if epoch > 0)


class Pruner(Protocol):
    """Decides which trainings are stopped early."""

    @property
    def every_epoch(self) -> bool:
        """Whether it is called after every epoch; otherwise only at checkpoints, see `checkpoint_epochs`."""

    def decide(self, trials: Trials, record: TrialRecord, epoch: int) -> str | None:
        """Decide on a training that has reported a finite value after `epoch`.

        Args:
            trials: trials of the study so far, this report included.
            record: trial of the search, not a repetition.
            epoch: finished epochs, counted from 1.

        Returns:
            The reason to stop it; None to continue.
        """


@dataclass(frozen=True)
class AsynchronousHalving:
    """Stops trials outside the best `1 / reduction_factor` of a rung, and those clearly below their scratch twin.

    Attributes:
        reduction_factor: inverse of the share of trainings that pass a rung.
        maximise: whether a larger metric is better.
        by_student: whether trainings are compared with those of the same student only.
    """

    reduction_factor: int
    maximise: bool = True
    by_student: bool = False
    every_epoch: ClassVar[bool] = False

    @classmethod
    def of(cls, experiment: Experiment) -> AsynchronousHalving:
        """Make the pruner of an experiment's settings."""
        return cls(experiment.search.reduction_factor, experiment.maximise, experiment.by_student)

    def decide(self, trials: Trials, record: TrialRecord, epoch: int) -> str | None:
        """Decide at a rung; see `Pruner`."""
        if self._does_harm(trials, record, epoch):
            return NEGATIVE_TRANSFER
        if is_reference(record):
            return None
        return BEHIND if self._is_behind(trials, record, epoch) else None

    def _is_behind(self, trials: Trials, record: TrialRecord, epoch: int) -> bool:
        """Return whether a training is outside the best share of a rung; with few values, whether it is not best."""
        values = self._comparable(trials, record, epoch)
        place = max(1, len(values) // self.reduction_factor)
        if self.maximise:
            return record.reports[epoch] < values[-place]
        return record.reports[epoch] > values[place - 1]

    def _comparable(self, trials: Trials, record: TrialRecord, epoch: int) -> Sequence[float]:
        """Return the values that a training is compared with at a rung, smallest first."""
        return trials.sorted_reports(epoch, record.epochs, record.student if self.by_student else "")

    def _does_harm(self, trials: Trials, record: TrialRecord, epoch: int) -> bool:
        """Return whether a training is significantly worse than the same student trained without a teacher.

        Its twin has the same student and the same training settings. The difference of two trainings has a standard
        deviation of sqrt(2) seed deviations; before any configuration is repeated, the standard deviation between
        configurations at this rung, which is larger, replaces the latter.
        """
        if record.method == BASELINE or epoch < TWIN_FROM * record.epochs:
            return False
        twins = [
            twin.reports[epoch]
            for twin in (*trials.baselines.get(epoch, ()), *trials.repetitions())
            if twin.method == BASELINE and epoch in twin.reports and _conditions(twin) == _conditions(record)
        ]
        twins = list(filter(math.isfinite, twins))
        if not twins:
            return False
        deviation = _seed_deviation(trials, record, epoch) or _spread(self._comparable(trials, record, epoch))
        if deviation is None:
            return False
        below = math.fsum(twins) / len(twins) - record.reports[epoch]
        error = deviation * math.sqrt(1 + 1 / len(twins))
        return (below if self.maximise else -below) > TWIN_DEVIATIONS * error


class NoPruning:
    """Stops no training."""

    every_epoch: ClassVar[bool] = False

    def decide(self, trials: Trials, record: TrialRecord, epoch: int) -> str | None:
        """Return None; see `Pruner`."""
        return None


def is_reference(record: TrialRecord) -> bool:
    """Return whether others are compared with this training; then no pruner stops it for being behind."""
    return record.method in REFERENCES and record.origin == "published"


def _conditions(record: TrialRecord) -> tuple[object, ...]:
    settings = {key: value for key, value in record.sample.items() if key.startswith("training.")}
    # The weight of the task loss is a setting of distillation: scratch has no other loss.
    settings.pop("training.task_weight", None)
    return record.student, record.epochs, tuple(sorted(settings.items()))


def _seed_deviation(trials: Trials, record: TrialRecord, epoch: int) -> float | None:
    """Estimate the standard deviation over seeds at a rung, pooled over configurations; None with too few values."""
    groups = [
        [
            repetition.reports[epoch]
            for repetition in group
            if repetition.epochs == record.epochs and math.isfinite(repetition.reports.get(epoch, math.nan))
        ]
        for group in trials.confirmations.values()
    ]
    squares, freedom = pooled_squares(groups)
    return math.sqrt(squares / freedom) if freedom >= FEWEST_SPREAD - 1 and squares else None


def _spread(values: Sequence[float]) -> float | None:
    """Estimate a normal standard deviation from the middle half of sorted values; None below `FEWEST_SPREAD` values."""
    first = bisect_right(values, -math.inf)
    count = bisect_left(values, math.inf) - first
    if count < FEWEST_SPREAD:
        return None
    quarter = count // 4
    width = (values[first + count - 1 - quarter] - values[first + quarter]) / 1.349
    return width or None
