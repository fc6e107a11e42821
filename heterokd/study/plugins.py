"""Optuna's pruners and samplers instead of ours: `search.pruner` and `search.sampler` of an experiment.

A class is named as `package.module:Name`. A pruner decides as in `trial.should_prune()`, on the metric of every epoch
of every trial of the study. Optuna's samplers expect that all trials have the same parameters, which is not the case
for several methods: each group of parameters (those that methods share, those of a method) is sampled separately, from
the trials that have it.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Collection, Container, Sequence
from copy import copy
from typing import ClassVar, TypeVar, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from heterokd.config.experiment import Experiment
from heterokd.config.search import ClassSettings
from heterokd.errors import ConfigError
from heterokd.extensions import load_named
from heterokd.methods import PLUS
from heterokd.study.assignment import method_space
from heterokd.study.distributions import has_freedom
from heterokd.study.pruner import AsynchronousHalving, NoPruning, Pruner, is_reference
from heterokd.study.sampler import (
    Guide,
    Sampler,
    StudyView,
    TreeParzen,
    counts_as_worst,
    propose,
    seed_at,
)
from heterokd.study.storage import direction
from heterokd.study.trials import TrialRecord, Trials

logger = logging.getLogger(__name__)

Built = TypeVar("Built")


def build(settings: ClassSettings, base: type[Built], key: str, seed: int | None = None) -> Built:
    """Construct the class that an experiment names.

    Args:
        settings: name and arguments of the class.
        base: required base class.
        key: key of the experiment, for errors.
        seed: passed if the class has such an argument and the settings have none.

    Raises:
        ConfigError: the class does not exist, is no subclass of `base`, or does not take these arguments.
    """
    found = load_named(settings.name, key)
    if not (isinstance(found, type) and issubclass(found, base)):
        kind = f"{base.__module__.partition('._')[0]}.{base.__name__}"
        raise ConfigError(f"{key}: {settings.name!r} is no subclass of {kind}; name a subclass")
    has_seed = seed is not None and "seed" in inspect.signature(found).parameters
    arguments = ({"seed": seed} if has_seed else {}) | settings.options
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return found(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{key}: {settings.name!r} cannot be constructed ({error}); set {key}.options") from None


class OptunaPruner:
    """An Optuna pruner, called after every epoch as by `trial.should_prune()`; references are never stopped."""

    every_epoch: ClassVar[bool] = True

    def __init__(self, pruner: BasePruner) -> None:
        self._pruner = pruner

    def decide(self, trials: Trials, record: TrialRecord, epoch: int) -> str | None:
        """Return the pruner's name if it stops a training; see `Pruner`."""
        # Also called for references: Optuna's successive halving counts the trials that it has seen.
        stops = trials.should_prune(record.number, self._pruner)
        return type(self._pruner).__name__ if stops and not is_reference(record) else None


class OptunaSampler:
    """An Optuna sampler, the same object as long as a study is open; see `Sampler`."""

    def __init__(self, sampler: BaseSampler) -> None:
        self._sampler = _GroupByGroup(sampler)

    def estimator(self, seed: int) -> BaseSampler:
        """Return the sampler, which ignores the seed and continues its sequence as in Optuna."""
        return self._sampler


class _GroupByGroup(BaseSampler):
    """A sampler that reads, for each group of parameters, only the trials that have them."""

    def __init__(self, sampler: BaseSampler) -> None:
        self._sampler, self._apart = sampler, set[frozenset[str]]()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        endless = cast(optuna.Study, _Endless(study, study.get_trials(deepcopy=False)))
        self._sampler.after_trial(endless, trial, state, values)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        try:
            return self._sampler.sample_relative(_having(study, search_space), trial, search_space)
        except Exception as error:  # noqa: BLE001  samplers with a population (NSGA-II) do not support groups
            names = frozenset(search_space)
            if names not in self._apart:
                logger.warning("search.sampler: %s are sampled independently (%s)", ", ".join(sorted(names)), error)
            self._apart.add(names)
            return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        return self._sampler.sample_independent(_having(study, {param_name}), trial, param_name, param_distribution)


class _Endless(StudyView):
    """A study that its sampler cannot stop; `STOP_AFTER` known samples in a row stop it."""

    def stop(self) -> None:
        """Do nothing."""


def _having(study: optuna.Study, names: Collection[str]) -> optuna.Study:
    """Return a view of a study's trials that have these parameters.

    Failures are complete trials with the worst value so far here: most samplers read complete trials only.
    """
    trials = study.get_trials(deepcopy=False)
    values = [trial.value for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    worst = None
    if values:
        worst = min(values) if study.direction == StudyDirection.MAXIMIZE else max(values)
    found = [
        trial if worst is None or not counts_as_worst(trial) else _with_value(trial, worst)
        for trial in trials
        if trial.params.keys() >= set(names)
    ]
    return cast(optuna.Study, StudyView(study, found))


def _with_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    ended = copy(trial)
    ended.state, ended.value = TrialState.COMPLETE, value
    return ended


def make_pruner(experiment: Experiment) -> Pruner:
    """Make the pruner of an experiment.

    Raises:
        ConfigError: `search.pruner` names no pruner, or its options are invalid.
    """
    if not experiment.search.prune:
        return NoPruning()
    settings = experiment.search.pruner
    if settings is None:
        return AsynchronousHalving.of(experiment)
    return OptunaPruner(build(settings, BasePruner, "search.pruner"))  # type: ignore[type-abstract]


def make_sampler(experiment: Experiment, methods: Collection[str], begun: int = 0) -> Sampler:
    """Make the sampler of an experiment.

    `begun` is the number of existing trials, so that a resumed study does not draw the same numbers again.

    Raises:
        ConfigError: `search.sampler` names no sampler, or its options are invalid.
    """
    settings = experiment.search.sampler
    if settings is None:
        # The starts compare methods and little else; a few uniform samples compare parameters.
        return TreeParzen(startup=max(10, sum(PLUS not in method for method in methods) + 5))
    seed = seed_at(experiment.search.seed, begun)
    built = build(settings, BaseSampler, "search.sampler", seed=seed)  # type: ignore[type-abstract]
    return OptunaSampler(built)


def check_plugins(experiment: Experiment, excluded: Container[str] = ()) -> None:
    """Check that pruner and sampler work for an experiment, before anything is computed.

    `excluded`: methods that cannot be built for the pair; see `check_experiment`.

    Raises:
        ConfigError: a class does not exist, cannot be constructed, or cannot sample from this space.
    """
    make_pruner(experiment)
    if experiment.search.sampler is None:
        return
    methods = [method for method in experiment.methods if method not in excluded]
    spaces = {method: space for method in methods if has_freedom(space := method_space(experiment, method, excluded))}
    sampler = make_sampler(experiment, methods)
    for method in spaces:
        trials = Trials(optuna.create_study(direction=direction(experiment)), is_kept=False)
        try:
            propose(trials, spaces, sampler, experiment.search.seed, Guide(chosen={"method": method}))
        except Exception as error:  # noqa: BLE001  whatever the class raises, it does not support this space
            raise ConfigError(
                f"search.sampler: {experiment.search.sampler.name!r} cannot sample the parameters of method {method!r} "
                f"({error}); name a sampler that supports conditional search spaces"
            ) from None
