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
from collections.abc import Sequence
from fractions import Fraction

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.storage.trial_status import NOT_FINITE
from heterokd.study.assignment import REFERENCES, Stop
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


def rungs(experiment: Experiment, epochs: int) -> tuple[int, ...]:
    """Finished epochs after which a training of `epochs` is compared with the others."""
    found, rung = [], max(1, round(experiment.search.first_rung * epochs))
    while rung <= LAST_RUNG * epochs:
        found.append(rung)
        rung *= experiment.search.reduction_factor
    return tuple(found)


def compared(epochs: int) -> int:
    """Over how many epochs the mean is taken that a rung compares."""
    return max(1, round(COMPARED * epochs))


def stops(trials: Trials, training: TrialRecord, epoch: int, experiment: Experiment) -> Stop | None:
    """Why a training that has reported at the rung `epoch` ends there; None: it goes on."""
    if training.origin == "confirm":
        return None
    value = training.reports[epoch]
    if not math.isfinite(value):
        return NOT_FINITE
    if not experiment.search.prune:
        return None
    if _does_harm(trials, training, epoch, experiment):
        return "negative transfer"
    if training.method in REFERENCES and training.origin == "published":
        return None
    return "behind" if _is_behind(trials, training, epoch, experiment) else None


def _is_behind(trials: Trials, training: TrialRecord, epoch: int, experiment: Experiment) -> bool:
    """Whether a training is outside the best `1 / reduction_factor` of a rung; of few values, is not the best."""
    arrived = _comparable(trials, training, epoch, experiment)
    place = max(1, len(arrived) // experiment.search.reduction_factor)
    if experiment.maximise:
        return training.reports[epoch] < arrived[-place]
    return training.reports[epoch] > arrived[place - 1]


def _comparable(trials: Trials, training: TrialRecord, epoch: int, experiment: Experiment) -> Sequence[float]:
    """What a training is compared with at a rung, smallest first."""
    return trials.arrived(epoch, training.epochs, training.student if experiment.by_student else "")


def _does_harm(trials: Trials, training: TrialRecord, epoch: int, experiment: Experiment) -> bool:
    """Whether a training is worse than the same student trained on labels alone, by more than noise.

    Its twin has the same student and the same settings of training. The difference of two trainings scatters by
    sqrt(2) seed deviations; as long as no configuration was repeated, the spread between configurations at this rung,
    which is larger, stands in for it.
    """
    if training.method == BASELINE or epoch < TWIN_FROM * training.epochs:
        return False
    twins = [
        twin.reports[epoch]
        for twin in (
            *trials.baselines.get(epoch, ()),
            *(one for group in trials.confirmations.values() for one in group),
        )
        if twin.method == BASELINE and epoch in twin.reports and _conditions(twin) == _conditions(training)
    ]
    twins = [value for value in twins if math.isfinite(value)]
    if not twins:
        return False
    deviation = _seed_deviation(trials, training, epoch) or _spread(trials, training, epoch, experiment)
    if deviation is None:
        return False
    below = math.fsum(twins) / len(twins) - training.reports[epoch]
    error = deviation * math.sqrt(1 + 1 / len(twins))
    return (below if experiment.maximise else -below) > TWIN_DEVIATIONS * error


def _conditions(training: TrialRecord) -> tuple[object, ...]:
    settings = {key: value for key, value in training.sample.items() if key.startswith("training.")}
    # How much the labels weigh beside the teacher is a setting of distillation: scratch has nothing beside them.
    settings.pop("training.task_weight", None)
    return training.student, training.epochs, tuple(sorted(settings.items()))


def _seed_deviation(trials: Trials, training: TrialRecord, epoch: int) -> float | None:
    """Pooled over the configurations that reported at this rung on several fresh seeds; None below four such values."""
    squares, freedom = 0.0, 0
    for group in trials.confirmations.values():
        values = [one.reports[epoch] for one in group if epoch in one.reports and one.epochs == training.epochs]
        values = [value for value in values if math.isfinite(value)]
        if len(values) > 1:
            mean = math.fsum(values) / len(values)
            squares += math.fsum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom >= FEWEST_SPREAD - 1 and squares else None


def _spread(trials: Trials, training: TrialRecord, epoch: int, experiment: Experiment) -> float | None:
    """Between configurations: the middle half of their values as a normal deviation; None below `FEWEST_SPREAD`."""
    values = [value for value in _comparable(trials, training, epoch, experiment) if math.isfinite(value)]
    if len(values) < FEWEST_SPREAD:
        return None
    quarter = len(values) // 4
    width = (values[-1 - quarter] - values[quarter]) / 1.349
    return width or None
