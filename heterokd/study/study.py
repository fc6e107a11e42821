"""What comes next in a search, and what came of it."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState, create_trial

from heterokd.config import Experiment
from heterokd.priors import expected_ranks, method_prior, published_samples
from heterokd.root import StudyFolder
from heterokd.space import Scalar
from heterokd.study import halving
from heterokd.study.assignments import BASELINE, Assignment, Origin, State, assignment_attrs, method_space
from heterokd.study.leaders import Leader, confirmations, rank_leaders
from heterokd.study.sampling import STOP_AFTER, distributions, end_like, has_freedom, known_in_a_row, propose
from heterokd.study.standing import Standing
from heterokd.study.storage import open_database
from heterokd.study.summary import summarise
from heterokd.study.trials import Trials


class Study:
    """A search in progress. Calls come one at a time (in a search it lives in one actor)."""

    def __init__(
        self, experiment: Experiment, folder: StudyFolder, *, excluded: Mapping[str, str] | None = None
    ) -> None:
        """Open the study in `folder`, or create it.

        Args:
            experiment: the question, its search space read.
            folder: where study.db and the trial folders lie.
            excluded: methods that cannot exist for this teacher and student, with the reason. Like the list of
                methods it is frozen when the study is created, and ignored when it is opened again.

        Raises:
            StudyError: the study belongs to another experiment, its database is damaged, or no method is left.
        """
        self.experiment = experiment
        self.folder = folder
        database = open_database(experiment, folder, excluded or {})
        database.pruner = halving.pruner(experiment)
        self.methods: tuple[str, ...] = tuple(database.user_attrs["methods"])
        self.excluded: dict[str, str] = dict(database.user_attrs["excluded"])
        self._trials = Trials(database)
        # A method with one possible sample (scratch, usually) runs once, as its published start. Were it among the
        # sampler's options, a good baseline would be proposed again and again in place of something new.
        spaces = {method: method_space(experiment, method) for method in self.methods}
        self._spaces = {method: space for method, space in spaces.items() if has_freedom(space)}
        # Scratch first, then what published tables let expect most of; each method's published settings.
        ordered = sorted(expected_ranks(experiment, self.methods), key=lambda method: method != BASELINE)
        self._starts = [sample for method in ordered for sample in published_samples(experiment, method)]
        found = self._trials.search(duplicates=False)
        self._numbers = {trial.user_attrs["assignment"]["hash"]: trial.number for trial in found}
        self._unfinished: deque[int] = deque()
        self._recover()

    def next(self) -> Assignment | Literal["wait"] | None:
        """What to run now.

        Returns:
            An assignment; "wait" when what comes next depends on trials that are running; None when nothing is left.
        """
        if self._unfinished:
            return self._assignment(self._trials[self._unfinished.popleft()])
        while not self._search_is_over():
            start = self._next_start()
            assignment = self._sample() if start is None else self._hand_out(start, "published")
            if assignment is not None:
                return assignment
        if any(trial.state == TrialState.RUNNING for trial in self._trials.search()):
            return "wait" if self.experiment.search.confirm_leaders * self.experiment.search.confirm_seeds else None
        for number, seed in self._missing_confirmations():
            sample = self._trials[number].user_attrs["assignment"]["sample"]
            return self._hand_out(sample, "confirm", confirms=number, seed=seed)
        return None

    def report(self, number: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Record a running trial's metrics at a rung.

        Args:
            number: of the trial.
            epoch: finished epochs, counted from 1; between rungs nothing is recorded.
            metrics: holds the searched metric; missing or not finite counts as worst.

        Returns:
            Whether to keep going. A trial that was once told to stop is told so again, also after a restart.
        """
        trial = self._trials[number]
        if trial.state.is_finished() or "stopped_at" in trial.user_attrs:
            return False
        assignment = self._assignment(trial)
        if epoch not in assignment.rungs:
            return True
        self._trials.report(number, epoch, self._value(metrics))
        if halving.stops(self._trials, assignment, epoch, self.experiment):
            self._trials.set_attr(number, "stopped_at", epoch)
            return False
        return True

    def finish(self, number: int, state: State, metrics: Mapping[str, float], error: str | None = None) -> None:
        """Record the end of a trial; a second call for the same trial changes nothing.

        Args:
            number: of the trial.
            state: trained to the end, stopped at a rung, or failed.
            metrics: of the end. Missing or not finite counts as worst for a complete trial.
            error: one line, for a failed trial.
        """
        if number in self._unfinished:
            self._unfinished.remove(number)
        if self._trials[number].state.is_finished():
            return
        if state == "complete":
            self._trials.tell(number, TrialState.COMPLETE, self._value(metrics))
        elif state == "pruned":
            # Without a value: Optuna takes the last report, and the sampler learns at which rung it fell behind.
            self._trials.tell(number, TrialState.PRUNED)
        else:
            self._trials.set_attr(number, "error", error or "")
            self._trials.tell(number, TrialState.FAIL)

    def standing(self) -> Standing:
        """How far the study is."""
        confirmed = self._trials.confirmations()
        over, settings = self._search_is_over(), self.experiment.search
        states = [trial.state for trial in self._trials.search(duplicates=False)]
        running = [*states, *(trial.state for trial in confirmed)].count(TrialState.RUNNING)
        if over and TrialState.RUNNING not in states:
            left = len(self._missing_confirmations())
            planned = len(confirmed) + left
        else:
            configurations = settings.confirm_leaders + (BASELINE in self.methods if settings.confirm_leaders else 0)
            left = planned = max(len(confirmed), configurations * settings.confirm_seeds)
        return Standing(
            planned=len(states) if over else settings.trials,
            running=running,
            complete=states.count(TrialState.COMPLETE),
            pruned=states.count(TrialState.PRUNED),
            failed=states.count(TrialState.FAIL),
            confirmations_done=sum(trial.state.is_finished() for trial in confirmed),
            confirmations_planned=planned,
            finished=over and not running and not left,
        )

    def leaders(self) -> list[Leader]:
        """Configurations that were trained to the end, best first.

        Confirmed ones come first, by the pessimistic end of their interval (then by their mean, which tells apart those
        whose interval ends where the metric does), then the others by their search value; among equals, scratch comes
        last and an earlier trial first.
        """
        return rank_leaders(self._trials, self.experiment)

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: standing, the first leaders, winner, best scratch; plain values, no NaN."""
        return summarise(self.experiment, self.methods, self.excluded, self.standing(), self.leaders())

    def _search_is_over(self) -> bool:
        """Whether no more start or sample is wanted; some may still run."""
        if len(self._trials.search(duplicates=False)) >= self.experiment.search.trials:
            return True
        return self._next_start() is None and (not self._spaces or known_in_a_row(self._trials) >= STOP_AFTER)

    def _next_start(self) -> dict[str, Scalar] | None:
        """The next published setting that has not been tried."""
        attrs = [trial.user_attrs["assignment"] for trial in self._trials.search()]
        tried = Counter(one["sample"]["method"] for one in attrs if one["origin"] == "published")
        for sample in self._starts:
            if not tried[sample["method"]]:
                return sample
            tried[sample["method"]] -= 1
        return None

    def _sample(self) -> Assignment | None:
        """Ask the sampler; None when the study knows its answer already, which costs no budget."""
        # The starts tell methods apart and little else; a few uniform samples tell parameters apart.
        startup = max(10, len(self.methods) + 5)
        origins = [
            trial.user_attrs["assignment"]["origin"] for trial in self._trials.search() if trial.state.is_finished()
        ]
        prior = method_prior(self.experiment, tuple(self._spaces), origins.count("sampled"))
        trial, sample = propose(self._trials, self._spaces, self.experiment.search.seed, startup, prior)
        recipe = self.experiment.recipe(sample)
        known = self._numbers.setdefault(recipe.hash, trial.number)
        is_new = known == trial.number
        attrs = assignment_attrs(sample, "sampled", recipe, duplicate_of=None if is_new else known)
        trial.set_user_attr("assignment", attrs)
        if not is_new:
            end_like(self._trials, trial, self._trials[known])
        self._trials.store(trial.number)
        return self._assignment(self._trials[trial.number]) if is_new else None

    def _hand_out(
        self, sample: dict[str, Scalar], origin: Origin, *, confirms: int | None = None, seed: int | None = None
    ) -> Assignment:
        """A trial whose values are not the sampler's choice."""
        recipe = self.experiment.recipe(sample, seed=seed)
        learned = distributions(self._spaces, str(sample["method"]))
        number = self._trials.add(
            create_trial(
                state=TrialState.RUNNING,
                params={key: sample[key] for key in learned},
                distributions=learned,
                user_attrs={"assignment": assignment_attrs(sample, origin, recipe, confirms=confirms)},
            )
        )
        if origin != "confirm":
            self._numbers[recipe.hash] = number
        return self._assignment(self._trials[number])

    def _missing_confirmations(self) -> list[tuple[int, int]]:
        attrs = [trial.user_attrs["assignment"] for trial in self._trials.confirmations()]
        made = {(one["confirms"], one["seed"]) for one in attrs}
        return [wanted for wanted in confirmations(self._trials, self.experiment) if wanted not in made]

    def _recover(self) -> None:
        """Settle what a dead process left running: adopt what its folder says, hand out the rest again."""
        for trial in [trial for trial in self._trials if trial.state == TrialState.RUNNING]:
            attrs = trial.user_attrs.get("assignment")
            status = self.folder.trial(trial.number).status
            if attrs is None:
                # Not of this module's making (`study.ask` by hand): there is nothing to run.
                self._trials.tell(trial.number, TrialState.FAIL)
            elif status.get("state") in ("complete", "pruned", "failed"):
                files = self.folder.trial(trial.number)
                error = (files.error or "").strip().splitlines()[-1:]
                metrics = status.get("metrics") or (files.metrics() or [{}])[-1]
                self.finish(trial.number, status["state"], metrics, error[0] if error else None)
            else:
                self._unfinished.append(trial.number)

    def _assignment(self, trial: FrozenTrial) -> Assignment:
        attrs = trial.user_attrs["assignment"]
        sample = dict(attrs["sample"])
        recipe = self.experiment.recipe(sample, seed=None if attrs["confirms"] is None else attrs["seed"])
        rungs = halving.rungs(self.experiment, recipe.training.epochs)
        return Assignment(trial.number, recipe, sample, attrs["origin"], attrs["confirms"], rungs)

    def _value(self, metrics: Mapping[str, float]) -> float:
        value = float(metrics.get(self.experiment.metric, math.nan))
        return value if math.isfinite(value) else (-math.inf if self.experiment.maximise else math.inf)
