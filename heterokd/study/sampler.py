"""What to try next: a group-aware multivariate TPE over the methods and each method's own values.

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
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from heterokd.domains import Choice, Domain, Int, Scalar
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.trials import TrialRecord, Trials

Spaces = Mapping[str, Mapping[str, Domain]]
"""By method, the domains of its values. Options of one key may differ between methods (teachers, some of which a method
does not exist for): Optuna knows them all, and a sample has its method's own."""

Prior = Sequence[tuple[Mapping[str, Scalar], float]]
"""Values that are taken without asking the estimator, each set with its probability."""

RANDOM_AFTER = 5
"""Samples in a row that were already known before the sampler is replaced by a uniform one for the next."""

STOP_AFTER = 25
"""Samples in a row that were already known before the space counts as exhausted."""

LEARNED = 500
"""Trials that the estimator learns from: its time grows with them. Older ones would weigh next to nothing."""

BEST = 25
"""Of these, the best ones, however old: as many as the estimator sets apart from the others, see `default_gamma`."""


class Sampler(Protocol):
    """Gives the estimator that proposes values."""

    def estimator(self, seed: int) -> optuna.samplers.BaseSampler:
        """For one sample; it is asked for one group of values after the other, see `_GroupSampler`.

        Args:
            seed: another one for each sample of a study.
        """


@dataclass(frozen=True)
class TreeParzen:
    """A multivariate tree-structured Parzen estimator, a fresh one for each sample: a restart changes no sample.

    Attributes:
        startup: finished trials before the estimator replaces uniform samples.
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
    prior: Prior = (),
    chosen: Mapping[str, Scalar] = MappingProxyType({}),
) -> tuple[optuna.Trial, dict[str, Scalar]]:
    """A new trial, in memory only, and its sample.

    Args:
        trials: of the study so far.
        spaces: by method, the domains of its values.
        sampler: gives the estimator.
        seed: of the search.
        prior: with which probability a method is taken without asking the estimator, which still gives its values.
        chosen: values that are not asked for.
    """
    trials.memory.sampler = _group_sampler(trials, spaces, sampler, seed, prior, chosen)
    trial = trials.memory.ask()
    method: str = trial.suggest_categorical("method", tuple(spaces))
    sample: dict[str, Scalar] = {"method": method}
    for key, domain in _known(spaces, method).items():
        sample[key] = _suggest(trial, key, domain)
    return trial, sample


def distributions(spaces: Spaces, method: str) -> dict[str, BaseDistribution]:
    """What the sampler learns from a trial that it did not propose; nothing for a method that it never proposes."""
    if method not in spaces:
        return {}
    own = {key: _distribution(domain) for key, domain in _known(spaces, method).items()}
    return {"method": CategoricalDistribution(tuple(spaces)), **own}


def _known(spaces: Spaces, method: str) -> dict[str, Domain]:
    """A method's domains as Optuna knows them: with every option that a key has for any method."""
    found = dict(spaces[method])
    for key, domain in found.items():
        if isinstance(domain, Choice) and not key.startswith(f"{method}."):
            others = [space[key] for space in spaces.values() if key in space]
            options = [option for other in others if isinstance(other, Choice) for option in other.options]
            found[key] = domain if set(options) == set(domain.options) else Choice(*dict.fromkeys(options))
    return found


def has_freedom(space: Mapping[str, Domain]) -> bool:
    """Whether there is more than one possible sample."""
    return not all(_distribution(domain).single() for domain in space.values())


def end_like(trials: Trials, trial: optuna.Trial, known: TrialRecord) -> None:
    """Give a sample that is known already the outcome of the trial that knows it, in memory."""
    if trials.every_epoch or known.status == TrialStatus.PRUNED:
        for epoch, value in trials.epochs_of(known.number).items():
            trial.report(value, epoch)
    if known.is_complete:
        trials.memory.tell(trial, known.value)
    elif known.status == TrialStatus.PRUNED:
        trials.memory.tell(trial, state=TrialState.PRUNED)
    else:
        # Still running, or failed: there is no value to learn from, and the sampler overlooks a failure.
        trials.memory.tell(trial, state=TrialState.FAIL)


class _GroupSampler(optuna.samplers.BaseSampler):
    """A multivariate estimator for the method and what all methods share, then one for the method's own values.

    What several methods share but not all (whom they follow: scratch follows nobody) has an estimator of its own, which
    learns from all that have it.

    Optuna's `group=True` finds these groups by itself, from all trials, and samples the values of every method for
    each trial, of which all but one method's are thrown away: its time grows with the number of methods.
    """

    def __init__(
        self, spaces: Spaces, estimator: optuna.samplers.BaseSampler, chosen: Mapping[str, Scalar], seed: int
    ) -> None:
        self._estimator = estimator
        self._spaces, self._random = spaces, random.Random(seed)
        common = set.intersection(*(set(space) for space in spaces.values()))
        counts = Counter(key for space in spaces.values() for key in space)
        known = {method: _known(spaces, method) for method in spaces}
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
        return {}  # what is sampled together depends on the method, which is not known yet

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
        """The value of a key; where the method does not have it, one of those that it has, evenly."""
        value = self._values[key]
        domain = None if key == "method" else self._spaces[trial.params["method"]][key]
        return value if not isinstance(domain, Choice) or value in domain else self._random.choice(domain.options)


class StudyView:
    """A study with some of its trials, for an estimator that reads them by `get_trials`."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._study, self._kept = study, trials

    def __getattr__(self, name: str) -> object:
        return getattr(self._study, name)

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """As `Study.get_trials`."""
        return self._get_trials(deepcopy, states)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        """As `Study._get_trials`, which Optuna's samplers call."""
        return [trial for trial in self._kept if states is None or trial.state in states]


class _Learned(StudyView):
    """A study with the trials that an estimator learns from: the newest, and the best in each direction."""

    def __init__(self, study: optuna.Study) -> None:
        trials = study.get_trials(deepcopy=False)
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


def _free(space: Mapping[str, Domain], keys: Set[str]) -> dict[str, BaseDistribution]:
    """The distributions of these keys, but of those that have a single value, which is not sampled."""
    found = {key: _distribution(domain) for key, domain in space.items() if key in keys}
    return {key: distribution for key, distribution in found.items() if not distribution.single()}


def _group_sampler(
    trials: Trials,
    spaces: Spaces,
    sampler: Sampler,
    seed: int,
    prior: Prior,
    chosen: Mapping[str, Scalar],
) -> _GroupSampler:
    """For the next sample, seeded by what is in the database."""
    seed = seed_at(seed, len(trials))
    if trials.known_in_a_row >= RANDOM_AFTER:
        return _GroupSampler(spaces, optuna.samplers.RandomSampler(seed), chosen, seed)
    return _GroupSampler(spaces, sampler.estimator(seed), {**_draw(prior, seed), **chosen}, seed)


def seed_at(seed: int, count: int) -> int:
    """The seed for what follows `count` trials of a search."""
    return int.from_bytes(hashlib.sha256(f"{seed} {count}".encode()).digest()[:4], "big")


def _draw(prior: Prior, seed: int) -> Mapping[str, Scalar]:
    """One of the prior's with its probability; nothing with what is left of 1."""
    place = random.Random(seed).random()
    for values, probability in prior:
        place -= probability
        if place < 0:
            return values
    return {}


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.options)
    if isinstance(domain, Int):
        return IntDistribution(domain.low, domain.high, log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _suggest(trial: optuna.Trial, key: str, domain: Domain) -> Scalar:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(key, domain.options)
    if isinstance(domain, Int):
        return trial.suggest_int(key, domain.low, domain.high, log=domain.log)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.log)
