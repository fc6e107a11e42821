"""What comes next in a search, and what came of it."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from optuna.trial import TrialState, create_trial

from heterokd.config.experiment import TEACHER, Experiment
from heterokd.config.search import MOST_TRIALS
from heterokd.domains import Scalar
from heterokd.methods import BASELINE
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import NOT_FINITE, TrialStatus, read_status
from heterokd.study import pruner
from heterokd.study.assignment import Assignment, Origin, Stop, assignment_attrs, method_space, teachers_of
from heterokd.study.budget import Spending
from heterokd.study.confirmation import Repetition, fixed_repetitions, next_repetition, share, share_after
from heterokd.study.initial_trials import matched_samples, published_starts
from heterokd.study.leaderboard import Standings
from heterokd.study.priors import expected_ranks, method_prior
from heterokd.study.progress import StudyProgress
from heterokd.study.ranked_config import RankedConfig, pareto_front
from heterokd.study.sampler import STOP_AFTER, Prior, distributions, end_like, has_freedom, propose
from heterokd.study.storage import Given, averages, given, open_database
from heterokd.study.summary import SUMMARY_LEADERS, HarmfulTrial, StudySummary, summarise
from heterokd.study.trials import TrialRecord, Trials
from heterokd.study.warm_start import WarmStart

Step = tuple[Origin, dict[str, Scalar]] | Repetition | Literal["sample", "wait"] | None
"""What comes next: a start, a repetition, whatever the sampler says, nothing for the moment, nothing."""


class Study:
    """A search in progress. Calls come one at a time (in a search it lives in one actor)."""

    def __init__(
        self,
        experiment: Experiment,
        folder: StudyFolder,
        *,
        excluded: Mapping[str, str] | None = None,
        left_out: Mapping[str, str] | None = None,
        facts: Mapping[str, Mapping[str, float]] | None = None,
        warm: WarmStart | None = None,
        storage: Literal["disk", "memory"] = "disk",
        clock: Callable[[], float] = time.time,
        devices: float = 1.0,
    ) -> None:
        """Open the study in `folder`, or create it.

        Args:
            experiment: the question, its search space read.
            folder: where study.db and the trial folders lie.
            excluded: methods that cannot exist for teacher and student, with the reason; see `check_experiment`. Like
                the list of methods (and what follows) it is frozen when the study is created, and ignored when it is
                opened again.
            left_out: students that are over a limit, with the reason.
            facts: by student, what it costs: `params_m`, `latency_ms`.
            warm: what finished studies of similar pairs let expect.
            storage: `memory` begins a study that is not kept, and touches no file (a simulated search).
            clock: the time in seconds; budgets of time are counted by it.
            devices: that one training keeps busy: GPUs, or a share of one; without any, 1.

        Raises:
            StudyError: the study belongs to another experiment, its database is damaged, or no method is left.
        """
        self.folder = folder
        is_kept = storage == "disk"
        told = Given(excluded or {}, left_out or {}, facts or {}, warm or WarmStart())
        database = open_database(experiment, folder, told, is_kept=is_kept)
        self.told = given(database)
        self._averages = averages(database)
        self.experiment = experiment = experiment.without(self.told.left_out)
        self.methods: tuple[str, ...] = tuple(database.user_attrs["methods"])
        self._trials = Trials(database, is_kept=is_kept)
        # A method with one possible sample (scratch, usually) runs once, as its published start. Were it among the
        # sampler's options, a good baseline would be proposed again and again in place of something new.
        spaces = {method: method_space(experiment, method, self.told.excluded) for method in self.methods}
        self._spaces = {method: space for method, space in spaces.items() if has_freedom(space)}
        # Scratch first, then what published tables let expect most of; each method's published settings.
        ordered = sorted(expected_ranks(experiment, self.methods), key=lambda method: method != BASELINE)
        self._starts: list[tuple[Origin, dict[str, Scalar]]] = self._list_starts(ordered)
        self._numbers = {training.hash: training.number for training in self._trials.search}
        self._clock, self._last = clock, clock()
        self._running: set[int] = set()
        self._halted: set[int] = set()  # told to stop because of the budget
        self._unfinished: deque[int] = deque()
        self._standings: Standings | None = None
        self.spending = self._spent(devices)
        if is_kept:
            self._recover()

    def next(self) -> Assignment | Literal["wait"] | None:
        """What to run now.

        Returns:
            An assignment; "wait" when what comes next depends on trials that are running; None when nothing is left.
        """
        self._pass_time()
        if self._unfinished and not self.spending.is_exhausted():
            return self._begin(self._trials[self._unfinished.popleft()])
        while True:
            step = self._next_step()
            if step is None or step == "wait":
                return step
            if isinstance(step, Repetition):
                sample = self._trials[step.number].sample
                return self._hand_out("confirm", sample, confirms=step.number, seed=step.seed)
            assignment = self._sample() if step == "sample" else self._hand_out(*step)
            if assignment is not None:
                return assignment

    def report(
        self, number: int, epoch: int, metrics: Mapping[str, float], curve: Sequence[Mapping[str, float]] = ()
    ) -> bool:
        """Record a running trial's metrics at a rung.

        Compared is the mean of the metric over the newest epochs, a third of the training (`halving.COMPARED`): in the
        middle of a schedule, where the learning rate is high, a single epoch says little (benchmarks/RESULTS.md says
        how little), and how soon a method gets going says less of where it ends.

        Args:
            number: of the trial.
            epoch: finished epochs, counted from 1; between rungs nothing is recorded.
            metrics: holds the searched metric; missing or not finite, it ends a trial of the search.
            curve: metrics of all epochs so far, `metrics` the last; empty: `metrics` alone counts.

        Returns:
            Whether to keep going (`why` says why not). A trial that was once told to stop is told so again, also after
            a restart.
        """
        self._pass_time()
        training = self._trials[number]
        if training.status.is_final or training.stopped is not None:
            return False
        if epoch in pruner.rungs(self.experiment, training.epochs):
            newest = list(curve[-pruner.compared(training.epochs) :]) if self._averages else []
            values = [self._value(one) for one in newest or [metrics]]
            self._trials.report(number, epoch, math.fsum(values) / len(values))
            reason = pruner.stops(self._trials, training, epoch, self.experiment)
            if reason is not None:
                self._trials.stop(number, epoch, reason)
                return False
        if epoch < training.epochs and self.spending.is_exhausted():
            self._halted.add(number)
            return False
        return True

    def why(self, number: int) -> Stop | None:
        """Why a trial was told to stop; None when it was not."""
        return self._trials[number].stopped or ("budget" if number in self._halted else None)  # type: ignore[return-value]

    def finish(self, number: int, status: TrialStatus, metrics: Mapping[str, float], error: str | None = None) -> None:
        """Record the end of a trial; a second call for the same trial changes nothing.

        Args:
            number: of the trial.
            status: of its end; a trial that the budget stopped is paused, also where it is called pruned.
            metrics: of the end. Missing or not finite counts as worst for a complete trial.
            error: one line, for a failed or diverged trial.
        """
        self._pass_time()
        if number in self._unfinished:
            self._unfinished.remove(number)
        training = self._trials[number]
        self._running.discard(number)
        if training.status.is_final:
            return
        status = read_status(status, training.stopped)
        if status == TrialStatus.PRUNED and training.stopped is None and number in self._halted:
            status = TrialStatus.PAUSED
        if status not in (TrialStatus.PRUNED, TrialStatus.PAUSED) or training.confirms is not None:
            self._standings = None  # a trial of the search that did not reach its end says nothing of who leads
        if status == TrialStatus.PAUSED:
            self._trials.mark(number, status)
            self._trials.set_attr(number, "ended", self._account(training, status, metrics))
            return
        if status.is_failure:
            self._trials.set_attr(number, "error", error or "")
        if status == TrialStatus.DIVERGED and training.stopped is None:
            self._trials.stop(number, int(metrics.get("epoch", training.reached)), NOT_FINITE)
        training.trained = self._trained(training, status, metrics)
        self._pay(training)
        self._trials.set_attr(number, "ended", self._account(training, status, metrics))
        # A pruned one without a value: Optuna takes its last report, from which the sampler learns.
        self._trials.end(number, status, self._value(metrics) if status == TrialStatus.COMPLETE else None)

    def progress(self) -> StudyProgress:
        """How far the study is."""
        repeats = [one for group in self._trials.confirmations.values() for one in group]
        states, stopped = Counter[TrialStatus](), Counter[str | None]()
        for (state, reason), count in self._trials.counts.items():
            states[state] += count
            stopped[reason] += count
        waiting = states[TrialStatus.RUNNING] + sum(one.is_running for one in repeats)
        step = self._next_step()
        planned, repetitions = self._planned(step)
        return StudyProgress(
            planned=planned,
            running=waiting,
            complete=states[TrialStatus.COMPLETE],
            pruned=states[TrialStatus.PRUNED],
            diverged=stopped[NOT_FINITE],
            negative_transfer=stopped["negative transfer"],
            paused=states[TrialStatus.PAUSED],
            failed=states[TrialStatus.FAILED] + states[TrialStatus.DIVERGED],
            confirmations_done=sum(one.status.is_final for one in repeats),
            confirmations_planned=repetitions,
            finished=step is None and not waiting,
        )

    def leaders(self) -> list[RankedConfig]:
        """Configurations that were trained to the end, best first.

        Where leaders were repeated, those that were come first. All are ordered by the lower confidence bound of what
        is expected of them (`LOWER` deviations below), then by their mean; among equals, scratch comes last and an
        earlier trial first.
        """
        return self._read().leaders()

    def summary(self) -> StudySummary:
        """What has been found so far."""
        found = summarise(self.experiment, self._read().leaders(SUMMARY_LEADERS), self.told.facts)
        harmful = [one for one in self._trials.search if one.stopped == "negative transfer"]
        return replace(
            found,
            methods=self.methods,
            excluded=self.told.excluded,
            left_out=self.told.left_out,
            progress=self.progress(),
            spent=self.spending.as_dict(),
            negative_transfer=tuple(HarmfulTrial(one.number, one.method, one.reached) for one in harmful),
        )

    # --- what comes next

    def _next_step(self) -> Step:
        """Decided by the trials alone: asking changes nothing."""
        is_busy = bool(self._running or self._unfinished)
        if not self.spending.fits(len(self._running), self._underway()):
            # What runs may end early, and leave room.
            return "wait" if is_busy and not self.spending.is_exhausted() else None
        start = self._next_start()
        is_over = self._search_is_over()
        if not is_over and self._search_has_room():
            return "sample" if start is None else start
        if self.experiment.search.confirm_leaders is not None:
            return self._next_fixed(is_over)
        repetition = next_repetition(self._trials, self._read(), self._capacity(), self._front())
        if repetition is not None:
            return repetition
        if not is_over:
            # Nothing that was found needs to be looked at again: what is left may find something better.
            return "sample" if start is None else start
        return "wait" if is_busy and self._capacity() else None

    def _next_fixed(self, is_over: bool) -> Step:
        """The repetitions of a fixed number of leaders, who are known once the search is over."""
        settings = self.experiment.search
        if not settings.confirm_leaders or not settings.confirm_seeds:
            return None if is_over else "sample"
        if any(one.is_running for one in self._trials.search):
            return "wait"
        return next(iter(fixed_repetitions(self._trials, self._read())), None)

    def _search_is_over(self) -> bool:
        """Whether no more start or sample is wanted; some may still run."""
        if len(self._trials.search) >= self.experiment.search.trials:
            return True
        return self._next_start() is None and (not self._spaces or self._trials.known_in_a_row >= STOP_AFTER)

    def _search_has_room(self) -> bool:
        """Whether one more training of the search leaves enough of a budget for repetitions."""
        total = self.spending.total(self._underway())
        if total is None:
            return True
        running = sum(self._trials[number].origin != "confirm" for number in self._running)
        return self.spending.search + running + 1 <= total - self._reserve(total) + 1e-9

    def _reserve(self, total: float) -> float:
        """Full trainings of a budget that are kept for repetitions."""
        settings = self.experiment.search
        if settings.confirm_leaders is None:
            return total * share(self.experiment, total, is_warm=self._is_warm)
        configurations = settings.confirm_leaders + (BASELINE in self.methods if settings.confirm_leaders else 0)
        return min(float(configurations * settings.confirm_seeds), total / 2)

    def _capacity(self) -> int:
        """Repetitions that there is room for in all."""
        total = self.spending.total(self._underway())
        if total is not None:
            part = share(self.experiment, total, is_warm=self._is_warm)
        else:
            searched = self.spending.search + sum(self._trials[number].origin != "confirm" for number in self._running)
            part = share_after(self.experiment, searched, is_warm=self._is_warm)
            total = searched / (1 - part)
        # Rounded up: what the search has left of its own part is too little for a training.
        return math.ceil(part * total)

    @property
    def _is_warm(self) -> bool:
        """Whether the search began at settings that are known to be good."""
        return bool(self.told.warm.samples)

    def _front(self) -> list[str]:
        """Students on the Pareto front so far; empty where the metric alone counts."""
        if not self.experiment.by_student:
            return []
        return [
            one.student for one in pareto_front(self._read().leaders(1), self.told.facts, self.experiment.search.costs)
        ]

    def _list_starts(self, methods: Sequence[str]) -> list[tuple[Origin, dict[str, Scalar]]]:
        """Scratch, what led in other studies, every other teacher once, each method's published settings."""
        published = published_starts(self.experiment, methods, self.told.excluded)
        matched = matched_samples(self.experiment, self.folder, self.methods)
        published += [sample for sample in matched if self._exists(sample)]
        first = sum(sample["method"] == BASELINE for sample in published)
        starts: list[tuple[Origin, dict[str, Scalar]]] = [("published", sample) for sample in published]
        warm = [sample for sample in self.told.warm.samples if self._exists(sample)]
        return [*starts[:first], *(("warm", sample) for sample in warm), *starts[first:]]

    def _exists(self, sample: Mapping[str, Scalar]) -> bool:
        """Whether a sample that others propose can be trained here."""
        method, teacher = str(sample["method"]), sample.get(TEACHER)
        known = teachers_of(self.experiment, method, self.told.excluded)
        return method in self.methods and (teacher is None or teacher in known)

    def _next_start(self) -> tuple[Origin, dict[str, Scalar]] | None:
        """The next start that has not been tried."""
        if not self._starts:
            return None
        tried = Counter((one.origin, one.method) for one in self._trials.search)
        for origin, sample in self._starts:
            if not tried[origin, str(sample["method"])]:
                if self.experiment.recipe(sample).hash not in self._numbers:
                    return origin, sample
                continue  # another start has the same values
            tried[origin, str(sample["method"])] -= 1
        self._starts = []  # trials are only added: there will be none again
        return None

    def _chosen(self) -> dict[str, Scalar]:
        """Where size counts, students take turns: the sampler would look for the most accurate one alone."""
        if not self.experiment.by_student:
            return {}
        counts = Counter(one.student for one in self._trials.search)
        return {"student.network": min(self.experiment.student.networks, key=lambda network: counts[network])}

    def _prior(self, sampled: int) -> Prior:
        """What the tables choose, with its probability; of several teachers each in turn, by its own pair's ranks."""
        teachers = self.experiment.teacher.networks
        teacher = teachers[sampled % len(teachers)]
        known = [
            method
            for method in self._spaces
            if teacher in (teachers_of(self.experiment, method, self.told.excluded) or teachers)
        ]
        likely = method_prior(self.experiment.for_teacher(teacher), known, sampled, self.told.warm.ranks)
        chosen = {TEACHER: teacher}
        return [
            ({"method": method, **(chosen if TEACHER in self._spaces[method] else {})}, probability)
            for method, probability in likely.items()
        ]

    def _sample(self) -> Assignment | None:
        """Ask the sampler; None when the study knows its answer already, which costs no budget."""
        # The starts tell methods apart and little else; a few uniform samples tell parameters apart.
        startup = max(10, len(self.methods) + 5)
        prior = self._prior(self._trials.sampled)
        seed = self.experiment.search.seed
        trial, sample = propose(self._trials, self._spaces, seed, startup, prior, self._chosen())
        recipe = self.experiment.recipe(sample)
        known = self._numbers.setdefault(recipe.hash, trial.number)
        is_new = known == trial.number
        attrs = assignment_attrs(sample, "sampled", recipe, duplicate_of=None if is_new else known)
        trial.set_user_attr("assignment", attrs)
        if not is_new:
            end_like(self._trials, trial, self._trials[known])
        training = self._trials.store()
        return self._begin(training) if is_new else None

    def _hand_out(
        self, origin: Origin, sample: dict[str, Scalar], *, confirms: int | None = None, seed: int | None = None
    ) -> Assignment:
        """A trial whose values are not the sampler's choice."""
        recipe = self.experiment.recipe(sample, seed=seed)
        learned = distributions(self._spaces, str(sample["method"]))
        training = self._trials.add(
            create_trial(
                state=TrialState.RUNNING,
                params={key: sample[key] for key in learned},
                distributions=learned,
                user_attrs={"assignment": assignment_attrs(sample, origin, recipe, confirms=confirms)},
            )
        )
        if origin != "confirm":
            self._numbers[recipe.hash] = training.number
        return self._begin(training)

    def _begin(self, training: TrialRecord) -> Assignment:
        self._running.add(training.number)
        self._halted.discard(training.number)
        self.spending.begun = len(self._trials.search) + sum(map(len, self._trials.confirmations.values()))
        recipe = self.experiment.recipe(training.sample, seed=None if training.confirms is None else training.seed)
        return Assignment(
            training.number,
            recipe,
            training.sample,
            training.origin,
            training.confirms,
            pruner.rungs(self.experiment, training.epochs),
            self.experiment.search.budget.is_timed,
            self.told.facts.get(training.student, {}),
        )

    # --- what it costs

    def _pass_time(self) -> None:
        now = self._clock()
        if self._running:
            self.spending.pass_time(max(now - self._last, 0.0), len(self._running))
        self._last = now

    def _underway(self) -> float:
        """Full trainings that those which run have done so far, by their last report."""
        return math.fsum(
            training.reached / training.epochs for training in map(self._trials.__getitem__, self._running)
        )

    def _trained(self, training: TrialRecord, status: TrialStatus, metrics: Mapping[str, float]) -> float:
        """Epochs that a training took. One that failed at once is not free, or nothing would end such a search."""
        if status == TrialStatus.COMPLETE:
            return float(training.epochs)
        epochs = max(float(metrics.get("epoch", 0)), float(training.reached))
        return max(epochs, self.experiment.search.first_rung * training.epochs)

    def _pay(self, training: TrialRecord) -> None:
        part = training.trained / training.epochs
        if training.origin == "confirm":
            self.spending.confirmation += part
        else:
            self.spending.search += part

    def _account(
        self, training: TrialRecord, status: TrialStatus, metrics: Mapping[str, float]
    ) -> dict[str, float | str]:
        """What the database keeps of the costs with a trial that ends: its own epochs, and all time so far."""
        return {
            "status": str(status),
            "trained": self._trained(training, status, metrics),
            "seconds": self.spending.seconds,
            "device_seconds": self.spending.device_seconds,
        }

    def _spent(self, devices: float) -> Spending:
        """What the study had cost when it was last open."""
        spending = self.spending = Spending(self.experiment.search.budget, devices)
        for training in (
            *self._trials.search,
            *(one for group in self._trials.confirmations.values() for one in group),
        ):
            spending.begun += 1
            if training.status.is_final:
                self._pay(training)
            ended = self._trials.attr(training.number, "ended") or {}
            spending.seconds = max(spending.seconds, ended.get("seconds", 0.0))
            spending.device_seconds = max(spending.device_seconds, ended.get("device_seconds", 0.0))
        return spending

    def _planned(self, step: Step) -> tuple[int, int]:
        """Trainings of the search, and repetitions, that there will have been at the end."""
        settings = self.experiment.search
        begun = len(self._trials.search)
        repeats = sum(map(len, self._trials.confirmations.values()))
        is_over = self._search_is_over() or step is None
        planned = begun if is_over else settings.trials
        total = self.spending.total(self._underway())
        if not is_over and total is not None:
            left = total - self._reserve(total) - self.spending.search
            each = self.spending.search / max(1, sum(one.status.is_final for one in self._trials.search)) or 1.0
            planned = min(planned, begun + max(0, math.floor(left / each) - len(self._running)))
        if settings.confirm_leaders is None:
            if step is None:
                return planned, repeats
            if total is None and not is_over:
                guess = settings.trials if settings.trials < MOST_TRIALS else begun
                part = share_after(self.experiment, float(guess), is_warm=self._is_warm)
                return planned, max(repeats, math.ceil(part / (1 - part) * guess))
            return planned, max(repeats, self._capacity())
        if is_over and not any(one.is_running for one in self._trials.search):
            missing = fixed_repetitions(self._trials, self._read()) if step is not None else []
            return planned, repeats + len(missing)
        configurations = settings.confirm_leaders + (BASELINE in self.methods if settings.confirm_leaders else 0)
        return planned, max(repeats, configurations * settings.confirm_seeds)

    # --- what is known

    def _read(self) -> Standings:
        if self._standings is None:
            self._standings = Standings(self._trials, self.experiment)
        return self._standings

    def _recover(self) -> None:
        """Settle what a dead process left running: adopt what its folder says, hand out the rest again."""
        for number in self._trials.strangers():
            # Not of this module's making (`study.ask` by hand): there is nothing to run.
            self._trials.end(number, TrialStatus.FAILED)
        for training in [one for one in self._trials if one.is_running]:
            files = self.folder.trial(training.number)
            snapshot = files.snapshot
            if snapshot.status.is_final:
                error = (files.error or "").strip().splitlines()[-1:]
                metrics = snapshot.metrics or (files.metrics() or [{}])[-1]
                self.finish(training.number, snapshot.status, metrics, error[0] if error else None)
            else:
                self._unfinished.append(training.number)

    def _value(self, metrics: Mapping[str, float]) -> float:
        value = float(metrics.get(self.experiment.metric, math.nan))
        return value if math.isfinite(value) else (-math.inf if self.experiment.maximise else math.inf)
