"""Proposer: add trials to a study, with values of the sampler or with given values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from optuna.trial import TrialState, create_trial

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.domains import Scalar
from heterokd.study.assignment import assignment_attrs
from heterokd.study.combining import possible_pairs
from heterokd.study.confirmation import Repetition
from heterokd.study.distributions import fitted, has_freedom
from heterokd.study.failures import failing_methods
from heterokd.study.initial_trials import Start
from heterokd.study.priors import method_prior
from heterokd.study.sampler import Guide, Prior, Sampler, end_like, propose
from heterokd.study.search_space import SearchSpace
from heterokd.study.trials import TrialRecord, Trials


class Proposer:
    """Adds trials to a study.

    Args:
        experiment: experiment of the study, without the students that are left out.
        space: space of the study.
        trials: trials of the study so far.
        sampler: proposes values.
        warm_ranks: mean rank of each method in other studies.
    """

    def __init__(
        self,
        experiment: Experiment,
        space: SearchSpace,
        trials: Trials,
        sampler: Sampler,
        warm_ranks: Mapping[str, float],
    ) -> None:
        self._experiment, self._space, self._trials = experiment, space, trials
        self._sampler, self._warm_ranks = sampler, warm_ranks
        # A method with a single possible sample (usually scratch) runs once, as its published start. As an option of
        # the sampler, a good baseline would be proposed repeatedly instead of a new sample.
        self._free = {method: domains for method, domains in space.domains.items() if has_freedom(domains)}
        self._pairs = [method for method in space.domains if method not in experiment.listed_methods]

    @property
    def has_samples(self) -> bool:
        """Whether any method that is not left out has parameters to sample."""
        return not self._free.keys() - set(self._pairs) <= failing_methods(self._trials).keys()

    def start(self, start: Start) -> TrialRecord:
        """Add a trial with a start's values."""
        return self._add(start, seed=None, confirms=None)

    def repeat(self, repetition: Repetition) -> TrialRecord:
        """Add a trial with the values of an earlier one, on a fresh seed."""
        sample = self._trials[repetition.number].sample
        return self._add(Start("confirm", sample), seed=repetition.seed, confirms=repetition.number)

    def sample(self) -> TrialRecord | None:
        """Add a trial with values of the sampler; None if an earlier trial has the same recipe, which costs nothing."""
        trial, sample = propose(self._trials, self._free, self._sampler, self._experiment.search.seed, self._guide())
        known = self._trials.numbers.get(self._space.identity(sample))
        trial.set_user_attr("assignment", assignment_attrs(self._experiment, sample, "sampled", duplicate_of=known))
        if known is not None:
            end_like(self._trials, trial, self._trials[known])
        record = self._trials.store()
        return record if known is None else None

    def _guide(self) -> Guide:
        prior, chosen = self._prior(self._trials.sampled), self._next_student()
        if not self._pairs:
            return Guide(prior, chosen)
        possible = possible_pairs(self._trials, self._space, self._pairs, maximise=self._experiment.maximise)
        return Guide([*possible.prior, *possible.share(prior)], chosen, frozenset(self._pairs) - possible.names)

    def _add(self, start: Start, *, seed: int | None, confirms: int | None) -> TrialRecord:
        params, learned = fitted(self._free, start.sample, self._space.defaults.get(start.method, {}))
        attrs = assignment_attrs(self._experiment, start.sample, start.origin, seed=seed, confirms=confirms)
        return self._trials.add(
            create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=learned,
                user_attrs={"assignment": attrs},
            )
        )

    def _next_student(self) -> dict[str, Scalar]:
        """If costs are objectives, return the student with the fewest trials: the sampler considers accuracy alone."""
        if not self._experiment.by_student:
            return {}
        counts = Counter(record.student for record in self._trials.search)
        return {"student.network": min(self._experiment.student.networks, key=lambda network: counts[network])}

    def _prior(self, sampled: int) -> Prior:
        """Return the methods' probabilities by published ranks, for each of several teachers in turn."""
        teachers, left_out = self._experiment.teacher.networks, failing_methods(self._trials)
        teacher = teachers[sampled % len(teachers)]
        ranks = {
            method: rank
            for method, rank in self._space.ranks.get(teacher, {}).items()
            if method in self._free
            and method not in self._pairs
            and method not in left_out
            and teacher in (self._space.teachers[method] or teachers)
        }
        likely = method_prior(ranks, self._experiment.search.prior_weight, sampled, self._warm_ranks)
        chosen = {TEACHER: teacher}
        return [
            ({"method": method, **(chosen if TEACHER in self._free[method] else {})}, probability)
            for method, probability in likely.items()
        ]
