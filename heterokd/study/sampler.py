"""Sampler: a group-aware multivariate TPE over the methods and the parameters of each method.

Watanabe, "Tree-Structured Parzen Estimator", 2023, https://arxiv.org/abs/2304.11127; Falkner, Klein, Hutter, "BOHB",
ICML 2018, for its multivariate form.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import warnings
from collections import Counter
from collections.abc import Container, Mapping, Sequence, Set
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from heterokd.domains import Choice, Domain, Int, Scalar
from heterokd.storage.trial_status import NOT_FINITE, TrialStatus
from heterokd.study.distributions import Spaces, distribution_of, with_all_options
from heterokd.study.failures import failing_methods
from heterokd.study.trials import TrialRecord, Trials

Prior = Sequence[tuple[Mapping[str, Scalar], float]]
"""Values that replace the estimator's, each set with its probability."""

RANDOM_AFTER = 5
"""Known samples in a row after which the next sample is uniform."""

STOP_AFTER = 25
"""Known samples in a row after which the space counts as exhausted."""

LEARNED = 500
"""Maximum number of trials of the estimator, whose time grows with them; older ones would have little weight."""

BEST = 25
"""Number of the best trials among them, of any age: as many as TPE's `default_gamma` separates from the others."""


@dataclass(frozen=True)
class Guide:
    """Rules for the next sample, in addition to the estimator.

    Attributes:
        prior: probabilities with which values are drawn without the estimator, which then samples the others.
        chosen: fixed values.
        left_out: methods that are not proposed, in addition to those that fail.
    """

    prior: Prior = ()
    chosen: Mapping[str, Scalar] = field(default_factory=dict)
    left_out: Set[str] = frozenset()


class Sampler(Protocol):
    """Makes the estimator that proposes values."""

    def estimator(self, seed: int) -> optuna.samplers.BaseSampler:
        """Make the estimator of a sample, which proposes each group of values in turn; see `_GroupSampler`."""


@dataclass(frozen=True)
class TreeParzen:
    """A multivariate tree-structured Parzen estimator, created for each sample, so that a restart changes no sample.

    Attributes:
        startup: number of finished trials before which samples are uniform.
    """

    startup: int

    def estimator(self, seed: int) -> optuna.samplers.BaseSampler:
        """See `Sampler`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                multivariate=True, constant_liar=True, seed=seed, n_startup_trials=self.startup
            )


def propose(
    trials: Trials,
    spaces: Spaces,
    sampler: Sampler,
    seed: int,
    guide: Guide = Guide(),
) -> tuple[optuna.Trial, dict[str, Scalar]]:
    """Return a new trial, in memory only, and its sample.

    Args:
        trials: trials of the study so far.
        spaces: domains of each method.
        sampler: makes the estimator.
        seed: seed of the search.
        guide: rules in addition to the estimator.
    """
    seed, chosen = seed_at(seed, len(trials)), guide.chosen
    if trials.known_in_a_row >= RANDOM_AFTER:
        estimator: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    else:
        estimator, chosen = sampler.estimator(seed), {**_draw(guide.prior, seed), **chosen}
    left_out = failing_methods(trials).keys() | guide.left_out
    trials.memory.sampler = _GroupSampler(spaces, estimator, chosen, seed, left_out)
    trial = trials.memory.ask()
    method: str = trial.suggest_categorical("method", tuple(spaces))
    sample: dict[str, Scalar] = {"method": method}
    for key, domain in with_all_options(spaces, method).items():
        sample[key] = _suggest(trial, key, domain)
    return trial, sample


def end_like(trials: Trials, trial: optuna.Trial, known: TrialRecord) -> None:
    """End a known sample like the trial that has the same values, in memory."""
    is_worst = known.status.is_failure or known.stopped == NOT_FINITE
    if not is_worst and (trials.every_epoch or known.status == TrialStatus.PRUNED):
        for epoch, value in trials.epochs_of(known.number).items():
            trial.report(value, epoch)
    if known.is_complete:
        trials.memory.tell(trial, known.value)
    elif is_worst or known.status == TrialStatus.PRUNED:
        trials.memory.tell(trial, state=TrialState.PRUNED)
    else:
        # Running: there is no value to learn from yet.
        trials.memory.tell(trial, state=TrialState.FAIL)


class _GroupSampler(optuna.samplers.BaseSampler):
    """A multivariate estimator for the method and what all methods share, then another for the method's parameters.

    A parameter of several but not all methods (the teacher: scratch has none) has a separate estimator, which learns
    from all trials that have it.

    Optuna's `group=True` derives these groups from all trials and samples the values of every method for each trial,
    of which only one method's are used: its time grows with the number of methods.
    """

    def __init__(
        self,
        spaces: Spaces,
        estimator: optuna.samplers.BaseSampler,
        chosen: Mapping[str, Scalar],
        seed: int,
        left_out: Container[str],
    ) -> None:
        self._estimator, self._left_out = estimator, left_out
        self._spaces, self._random = spaces, random.Random(seed)
        common = set.intersection(*(set(space) for space in spaces.values()))
        counts = Counter(key for space in spaces.values() for key in space)
        known = {method: with_all_options(spaces, method) for method in spaces}
        first = next(iter(spaces))
        methods: dict[str, BaseDistribution] = {"method": CategoricalDistribution(tuple(spaces))}
        self._common = (methods if len(spaces) > 1 else {}) | _free(known[first], common)
        self._shared = {key for key in counts.keys() - common if counts[key] > 1}
        self._own = {method: _free(space, space.keys() - common - self._shared) for method, space in known.items()}
        self._values: dict[str, Scalar] = dict(chosen)
        self._learned: _Learned | None = None

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._estimator.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._estimator.after_trial(study, trial, state, values)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}  # the parameters that are sampled together depend on the method, which is not known yet

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Scalar]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Scalar:
        self._learned = self._learned or _Learned(study)
        learned = cast(optuna.Study, self._learned)
        if param_name not in self._values:
            if param_name in self._common:
                group = self._common
            elif param_name in self._shared:
                group = {param_name: param_distribution}
            else:
                group = self._own[trial.params["method"]]
            self._values = self._estimator.sample_relative(learned, trial, group) | self._values
        if param_name not in self._values:  # too few trials for an estimate: uniform
            found = self._estimator.sample_independent(learned, trial, param_name, param_distribution)
            self._values[param_name] = found
        return self._possible(param_name, trial)

    def _possible(self, key: str, trial: FrozenTrial) -> Scalar:
        """Return the value of a key, or a uniform option if the method does not have this value or is left out."""
        value = self._values[key]
        if key == "method" and value in self._left_out:
            # Optuna's options of a key are fixed, so the estimator may still propose a method that is left out.
            return self._random.choice([method for method in self._spaces if method not in self._left_out])
        domain = None if key == "method" else self._spaces[trial.params["method"]][key]
        return value if not isinstance(domain, Choice) or value in domain else self._random.choice(domain.options)


class StudyView:
    """View of a study with some of its trials, for an estimator that reads them by `get_trials`."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._study, self._kept = study, trials

    def __getattr__(self, name: str) -> object:
        return getattr(self._study, name)

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Return the trials; see `Study.get_trials`."""
        return self._get_trials(deepcopy, states)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        """Return the trials; see `Study._get_trials`, which Optuna's samplers call."""
        return [trial for trial in self._kept if states is None or trial.state in states]


class _Learned(StudyView):
    """View of a study with the trials that an estimator learns from: the newest, and the best in each direction.

    Failures are pruned trials without a report here, which the estimator ranks last.
    """

    def __init__(self, study: optuna.Study) -> None:
        trials = list(map(_as_learned, study.get_trials(deepcopy=False)))
        super().__init__(study, trials)
        if len(trials) > LEARNED:
            complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
            best: set[int] = set()
            for place, direction in enumerate(study.directions):
                sign = -1 if direction == optuna.study.StudyDirection.MAXIMIZE else 1
                ranked = heapq.nsmallest(BEST, ((sign * trial.values[place], trial.number) for trial in complete))
                best |= {number for _, number in ranked}
            newest = trials[-(LEARNED - len(best)) :]
            self._kept = [trial for trial in trials[: -len(newest)] if trial.number in best] + newest


def counts_as_worst(trial: FrozenTrial) -> bool:
    """Return whether a trial failed or diverged, which the sampler learns as the worst value."""
    attrs = trial.user_attrs
    is_failure = attrs.get("ended", {}).get("status") in (TrialStatus.FAILED, TrialStatus.DIVERGED)
    return trial.state.is_finished() and (is_failure or attrs.get("stopped", {}).get("reason") == NOT_FINITE)


def _as_learned(trial: FrozenTrial) -> FrozenTrial:
    if not counts_as_worst(trial):
        return trial
    learned = copy(trial)
    learned.state, learned.intermediate_values = TrialState.PRUNED, {}
    return learned


def _free(space: Mapping[str, Domain], keys: Set[str]) -> dict[str, BaseDistribution]:
    """Return the distributions of these keys, without those that have a single value, which is not sampled."""
    found = {key: distribution_of(domain) for key, domain in space.items() if key in keys}
    return {key: distribution for key, distribution in found.items() if not distribution.single()}


def seed_at(seed: int, count: int) -> int:
    """Derive the seed of the sample that follows `count` trials of a search."""
    return int.from_bytes(hashlib.sha256(f"{seed} {count}".encode()).digest()[:4], "big")


def _draw(prior: Prior, seed: int) -> Mapping[str, Scalar]:
    """Draw values from the prior; empty with the remaining probability."""
    place = random.Random(seed).random()
    for values, probability in prior:
        place -= probability
        if place < 0:
            return values
    return {}


def _suggest(trial: optuna.Trial, key: str, domain: Domain) -> Scalar:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(key, domain.options)
    if isinstance(domain, Int):
        return trial.suggest_int(key, domain.low, domain.high, log=domain.log)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.log)
