"""Makes the trials of a study: samples that the sampler proposes, and trainings whose values are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from optuna.trial import TrialState, create_trial

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.domains import Domain, Scalar
from heterokd.study.assignment import assignment_attrs, teachers_of
from heterokd.study.confirmation import Repetition
from heterokd.study.initial_trials import Start
from heterokd.study.priors import method_prior
from heterokd.study.sampler import Prior, Sampler, distributions, end_like, propose
from heterokd.study.storage import StudyFacts
from heterokd.study.trials import TrialRecord, Trials


class Proposer:
    """Adds trials to a study.

    Args:
        experiment: the question about the students that are not left out.
        facts: of the study.
        trials: of the study so far.
        spaces: by method, the domains of its values; only methods with more than one possible sample.
        sampler: proposes values.
    """

    def __init__(
        self,
        experiment: Experiment,
        facts: StudyFacts,
        trials: Trials,
        spaces: Mapping[str, Mapping[str, Domain]],
        sampler: Sampler,
    ) -> None:
        self._experiment, self._facts, self._trials = experiment, facts, trials
        self._spaces, self._sampler = spaces, sampler

    def start(self, start: Start) -> TrialRecord:
        """A trial with a start's values."""
        return self._add(start, seed=None, confirms=None)

    def repeat(self, repetition: Repetition) -> TrialRecord:
        """A trial with the values of an earlier one, on a fresh seed."""
        sample = self._trials[repetition.number].sample
        return self._add(Start("confirm", sample), seed=repetition.seed, confirms=repetition.number)

    def sample(self) -> TrialRecord | None:
        """A trial with values of the sampler; None if an earlier trial has the same recipe, which costs no budget."""
        prior = self._prior(self._trials.sampled)
        seed = self._experiment.search.seed
        trial, sample = propose(self._trials, self._spaces, self._sampler, seed, prior, self._turn())
        recipe = self._experiment.recipe(sample)
        known = self._trials.numbers.get(recipe.hash)
        trial.set_user_attr("assignment", assignment_attrs(sample, "sampled", recipe, duplicate_of=known))
        if known is not None:
            end_like(self._trials, trial, self._trials[known])
        record = self._trials.store()
        return record if known is None else None

    def _add(self, start: Start, *, seed: int | None, confirms: int | None) -> TrialRecord:
        recipe = self._experiment.recipe(start.sample, seed=seed)
        learned = distributions(self._spaces, start.method)
        return self._trials.add(
            create_trial(
                state=TrialState.RUNNING,
                params={key: start.sample[key] for key in learned},
                distributions=learned,
                user_attrs={"assignment": assignment_attrs(start.sample, start.origin, recipe, confirms=confirms)},
            )
        )

    def _turn(self) -> dict[str, Scalar]:
        """Where size counts, students take turns: the sampler would look for the most accurate one alone."""
        if not self._experiment.by_student:
            return {}
        counts = Counter(record.student for record in self._trials.search)
        return {"student.network": min(self._experiment.student.networks, key=lambda network: counts[network])}

    def _prior(self, sampled: int) -> Prior:
        """Methods with the probability by which tables choose them; of several teachers each in turn, by its ranks."""
        teachers = self._experiment.teacher.networks
        teacher = teachers[sampled % len(teachers)]
        known = [
            method
            for method in self._spaces
            if teacher in (teachers_of(self._experiment, method, self._facts.excluded) or teachers)
        ]
        likely = method_prior(self._experiment.for_teacher(teacher), known, sampled, self._facts.warm.ranks)
        chosen = {TEACHER: teacher}
        return [
            ({"method": method, **(chosen if TEACHER in self._spaces[method] else {})}, probability)
            for method, probability in likely.items()
        ]
