"""Study: the Optuna study of a search behind `next`, `report`, `why` and `finish`; see `heterokd.study`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import optuna

from heterokd.config.experiment import Experiment
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import NOT_FINITE, TIMED_OUT, TrialStatus, read_status
from heterokd.study.assignment import BUDGET, NEGATIVE_TRANSFER, Assignment
from heterokd.study.budget import Spending
from heterokd.study.confirmation import Repetition
from heterokd.study.deadlines import Deadlines, Expired
from heterokd.study.failures import distillation_failure, failing_methods
from heterokd.study.initial_trials import Start
from heterokd.study.ledger import Ledger
from heterokd.study.options import StudyOptions
from heterokd.study.plugins import make_pruner, make_sampler
from heterokd.study.progress import StudyProgress
from heterokd.study.proposer import Proposer
from heterokd.study.pruner import checkpoint_epochs, compared, evaluated_epochs
from heterokd.study.ranked_config import RankedConfig, pareto_front, scratch_of
from heterokd.study.recovery import recover, requeue
from heterokd.study.schedule import Schedule
from heterokd.study.search_space import SearchSpace
from heterokd.study.storage import open_database, read_facts
from heterokd.study.summary import SUMMARY_LEADERS, HarmfulTrial, StudySummary
from heterokd.study.trials import TrialRecord, Trials


class Study:
    """A search in progress, which is not thread-safe (in a search, it lives in an actor).

    Attributes:
        experiment: experiment of the study, without the students that are left out.
        folder: folder of study.db and of the trials.
        facts: facts that the study was created with.
        interrupted: reasons of the trials that were interrupted and are left to the next search, by number.
    """

    def __init__(
        self, experiment: Experiment, folder: StudyFolder, database: optuna.Study, options: StudyOptions
    ) -> None:
        """Read a study from its database; `open` opens it.

        Raises:
            ConfigError: the experiment names a pruner or a sampler that cannot be constructed.
        """
        self.folder, self.facts = folder, read_facts(database)
        self.experiment = experiment = experiment.without(self.facts.left_out)
        space = options.space or SearchSpace.of(experiment, self.facts, folder)
        self._pruner = options.pruner or make_pruner(experiment)
        is_kept, every_epoch = options.storage == "disk", self._pruner.every_epoch
        self._trials = trials = Trials(
            database, is_kept=is_kept, every_epoch=every_epoch, identity=space.identity, since=self.facts.since
        )
        sampler = options.sampler or make_sampler(experiment, self.facts.methods, len(trials))
        self._proposer = Proposer(experiment, space, trials, sampler, self.facts.warm.ranks)
        self._ledger = Ledger(experiment, trials, options.clock, options.devices)
        self._schedule = Schedule(
            experiment, self.facts, trials, self._ledger, space, has_samples=lambda: self._proposer.has_samples
        )
        self._deadlines = Deadlines(experiment.search.trial_timeout, options)
        self._halted: set[int] = set()  # trials that the budget stops
        self.interrupted: dict[int, str] = {}

    @classmethod
    def open(cls, experiment: Experiment, folder: StudyFolder, options: StudyOptions | None = None) -> Study:
        """Open the study in `folder`, or create it, and recover the trials that were running in a dead process.

        Raises:
            StudyError: the study belongs to another experiment, its database is damaged, or no method is left.
            ConfigError: the experiment names a pruner or a sampler that cannot be constructed.
        """
        options = options or StudyOptions()
        is_kept = options.storage == "disk"
        # The space was made after comparing the experiment with the study, which needs the methods' classes.
        is_compared = options.space is not None
        database = open_database(experiment, folder, options.facts, is_kept=is_kept, is_compared=is_compared)
        study = cls(experiment, folder, database, options)
        if is_kept:
            recover(study._trials, folder, study._schedule, study.spending, study.finish)
        return study

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that are searched."""
        return self.facts.methods

    @property
    def spending(self) -> Spending:
        """Costs of the search so far."""
        return self._ledger.spending

    def next(self) -> Assignment | Literal["wait"] | None:
        """Choose the next training.

        Returns:
            An assignment; "wait" if the next trial depends on running trials; None if nothing is left.
        """
        self._ledger.pass_time()
        if self._schedule.unfinished and not self.spending.is_exhausted():
            return self._begin(self._trials[self._schedule.unfinished.popleft()])
        while True:
            step = self._schedule.next()
            is_new = step == "sample" or isinstance(step, Start)
            if self._schedule.stalled and not is_new and not self.spending.is_exhausted():
                return self._begin(self._trials[self._schedule.stalled.popleft()])
            if step == "wait" and not self._ledger.running:
                return None  # it depends on trials that were interrupted
            if step is None or step == "wait":
                return step
            if step == "sample":
                record = self._proposer.sample()
            elif isinstance(step, Repetition):
                record = self._proposer.repeat(step)
            else:
                record = self._proposer.start(step)
            if record is not None:
                return self._begin(record)

    def report(
        self, number: int, epoch: int, metrics: Mapping[str, float], curve: Sequence[Mapping[str, float]] = ()
    ) -> bool:
        """Record a running trial's metrics, and decide whether it continues.

        Rungs compare the mean of the metric over the newest epochs, a third of the training (`pruner.COMPARED`): in the
        middle of a schedule, where the learning rate is high, a single epoch predicts the final value badly
        (benchmarks/RESULTS.md has figures), and the first epochs predict it worse.

        Args:
            number: number of the trial.
            epoch: finished epochs, counted from 1; unless the pruner reads every epoch, only rungs are recorded.
            metrics: has the searched metric; if it is missing or not finite, a trial of the search is stopped.
            curve: metrics of all epochs so far, `metrics` last; if empty, only `metrics` are used.

        Returns:
            Whether to continue (`why` returns the reason to stop). The decision to stop a trial is final, also after a
            restart.
        """
        self._ledger.pass_time()
        record = self._trials[number]
        if record.status.is_final or record.stopped is not None:
            return False
        self._deadlines.seen(number)
        every_epoch = self._pruner.every_epoch
        is_rung = epoch in checkpoint_epochs(self.experiment, record.epochs)
        if is_rung or every_epoch:
            values = [self._value(each) for each in curve or [metrics]]
            if every_epoch:
                self._trials.report_epochs(number, dict(enumerate(values, start=epoch + 1 - len(values))))
            if is_rung:
                newest = values[-compared(record.epochs) :] if self.facts.averages else values[-1:]
                self._trials.report(number, epoch, math.fsum(newest) / len(newest))
            reason = self._stop_reason(record, epoch, values[-1])
            if reason is not None:
                self._trials.stop(number, epoch, reason)
                return False
        if epoch < record.epochs and self.spending.is_exhausted():
            self._halted.add(number)
            return False
        return True

    def why(self, number: int) -> str | None:
        """Return the reason to stop a trial, or None."""
        return self._trials[number].stopped or (BUDGET if number in self._halted else None)

    def finish(self, number: int, status: TrialStatus, metrics: Mapping[str, float], error: str | None = None) -> None:
        """Record the end of a trial; a second call for the same trial changes nothing.

        Args:
            number: number of the trial.
            status: final status; a trial that the budget stopped is paused, even if it is reported as pruned.
            metrics: final metrics; a missing or infinite metric of a complete trial counts as the worst value.
            error: a line, for a failed or diverged trial.
        """
        self._ledger.pass_time()
        self._schedule.unqueue(number)
        self._deadlines.end(number, complete=status == TrialStatus.COMPLETE)
        record = self._trials[number]
        self._ledger.running.discard(number)
        if record.status.is_final:
            return
        status = read_status(status, record.stopped)
        if status == TrialStatus.PRUNED and record.stopped is None and number in self._halted:
            status = TrialStatus.PAUSED
        if status not in (TrialStatus.PRUNED, TrialStatus.PAUSED) or record.confirms is not None:
            self._schedule.refresh()  # a trial of the search that is not complete does not change the ranking
        if status.is_failure:
            record.error = error or None
            self._trials.set_attr(number, "error", error or "")
        if status == TrialStatus.DIVERGED and record.stopped is None:
            self._trials.stop(number, int(metrics.get("epoch", record.reached)), NOT_FINITE)
        self._ledger.end(record, status, metrics)
        if status == TrialStatus.PAUSED:
            self._trials.set_status(number, status)
        else:
            # Without a value for a pruned trial: Optuna uses its last report, from which the sampler learns.
            self._trials.end(number, status, self._value(metrics) if status == TrialStatus.COMPLETE else None)

    def adopt(self, number: int) -> Assignment | None:
        """Return the assignment of a trial whose process outlived the study's; None if it has ended or been begun."""
        record = self._trials[number]
        if not record.is_running or number in self._ledger.running:
            return None
        self._schedule.unqueue(number)
        return self._begin(record)

    def interrupt(self, number: int, reason: str, *, again: bool) -> None:
        """Record that a running trial was interrupted by a fault that is not its own: it stays unfinished.

        Args:
            number: number of the trial.
            reason: what happened.
            again: `next` returns it again; otherwise the next search of this study does.
        """
        self._ledger.pass_time()
        self._deadlines.end(number, complete=False)
        self._ledger.running.discard(number)
        self._schedule.unqueue(number)
        if not self._trials[number].is_running:
            return
        if again:
            requeue(self._trials[number], self.folder, self._schedule)
        else:
            self.interrupted[number] = reason

    def started(self, number: int) -> None:
        """Start the time limit of a trial that `next` returned: its process has begun, perhaps again."""
        self._deadlines.started(number)

    def seen(self, number: int) -> None:
        """Record that a running trial has finished an epoch, which need not be reported."""
        self._deadlines.seen(number)

    def expire(self) -> list[Expired]:
        """End the running trials that exceed their time limit, or do not report although the budget is spent.

        The former have failed, the latter are paused. The caller ends their processes.
        """
        self._ledger.pass_time()
        expired = list(self._deadlines.expired(is_spent=self.spending.is_exhausted()))
        for trial in expired:
            if trial.reason == TIMED_OUT:
                self._trials.stop(trial.number, self._trials[trial.number].reached, TIMED_OUT)
                self.finish(trial.number, TrialStatus.FAILED, {}, trial.sentence)
            else:
                self._halted.add(trial.number)
                self.finish(trial.number, TrialStatus.PAUSED, {})
        return expired

    def progress(self) -> StudyProgress:
        """Count the trials in each state."""
        repeats = list(self._trials.repetitions())
        states, stopped = Counter[TrialStatus](), Counter[str | None]()
        for (state, reason), count in self._trials.counts.items():
            states[state] += count
            stopped[reason] += count
        waiting = states[TrialStatus.RUNNING] + sum(record.is_running for record in repeats)
        step = self._schedule.next()
        planned, repetitions = self._schedule.planned(step)
        return StudyProgress(
            planned=planned,
            running=waiting,
            complete=states[TrialStatus.COMPLETE],
            pruned=states[TrialStatus.PRUNED],
            diverged=stopped[NOT_FINITE],
            negative_transfer=stopped[NEGATIVE_TRANSFER],
            paused=states[TrialStatus.PAUSED],
            failed=states[TrialStatus.FAILED] + states[TrialStatus.DIVERGED],
            confirmations_done=sum(record.status.is_final for record in repeats),
            confirmations_planned=repetitions,
            finished=step is None and not waiting,
        )

    def leaders(self) -> list[RankedConfig]:
        """Rank the configurations that were trained to the end, best first.

        If leaders were repeated, repeated configurations come first. The order is that of the lower confidence bound
        (`LOWER` standard deviations below the expected value), then of the mean; among equals, scratch comes last and
        an earlier trial first.
        """
        return self._schedule.leaderboard.leaders()

    def summary(self) -> StudySummary:
        """Summarise the results so far."""
        experiment, facts, costs = self.experiment, self.facts, self.experiment.search.cost_objectives
        ranked = self._schedule.leaderboard.leaders(SUMMARY_LEADERS)
        harmful = [record for record in self._trials.search if record.stopped == NEGATIVE_TRANSFER]
        return StudySummary(
            name=experiment.name,
            metric=experiment.metric,
            maximise=experiment.maximise,
            methods=facts.methods,
            excluded=facts.excluded,
            left_out=facts.left_out,
            students=facts.costs,
            cost_conditions=experiment.cost_conditions,
            val_images=facts.prior.val_images,
            objectives=tuple(experiment.search.objectives),
            progress=self.progress(),
            budget=experiment.search.budget.model_dump(),
            spent=self.spending.as_dict(),
            changes=facts.changes,
            warm_studies=facts.warm.studies,
            failing=failing_methods(self._trials),
            distillation_failure=distillation_failure(self._trials),
            negative_transfer=tuple(HarmfulTrial(each.number, each.method, each.reached) for each in harmful),
            winner=ranked[0] if ranked else None,
            scratch=scratch_of(ranked, by_student=experiment.by_student),
            front=tuple(pareto_front(ranked, facts.costs, costs)) if costs else (),
            leaders=tuple(ranked[:SUMMARY_LEADERS]),
        )

    def _begin(self, record: TrialRecord) -> Assignment:
        """Return the assignment of a trial that starts or is resumed."""
        self._ledger.begin(record.number)
        self._deadlines.begin(record.number, record.method)
        self._halted.discard(record.number)
        return Assignment(
            number=record.number,
            experiment=self.experiment,
            sample=record.sample,
            origin=record.origin,
            rungs=checkpoint_epochs(self.experiment, record.epochs),
            confirms=record.confirms,
            seed=None if record.confirms is None else record.seed,
            is_timed=self.experiment.search.budget.is_timed or self._pruner.every_epoch,
            costs=self.facts.costs.get(record.student, {}),
            evaluated=evaluated_epochs(self.experiment, record.epochs),
        )

    def _stop_reason(self, record: TrialRecord, epoch: int, value: float) -> str | None:
        """Return the reason to stop a trial at an epoch with this value, or None; repetitions are not stopped."""
        if record.origin == "confirm" or epoch >= record.epochs:
            return None
        if not math.isfinite(record.reports.get(epoch, value)):
            return NOT_FINITE
        return self._pruner.decide(self._trials, record, epoch)

    def _value(self, metrics: Mapping[str, float]) -> float:
        """Return the searched metric, or the worst value if it is missing or not finite."""
        value = float(metrics.get(self.experiment.metric, math.nan))
        return value if math.isfinite(value) else (-math.inf if self.experiment.maximise else math.inf)
