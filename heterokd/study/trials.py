"""Trials of a study, read from memory and also written to the database."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from heterokd.domains import Scalar
from heterokd.methods import BASELINE
from heterokd.storage.trial_status import TrialStatus, read_status
from heterokd.study.assignment import Origin

_OPTUNA = {
    TrialStatus.RUNNING: TrialState.RUNNING,
    TrialStatus.COMPLETE: TrialState.COMPLETE,
    TrialStatus.PRUNED: TrialState.PRUNED,
    TrialStatus.DIVERGED: TrialState.FAIL,
    TrialStatus.FAILED: TrialState.FAIL,
}
"""Optuna's state of a trial in the database, where a paused trial is running."""

_LEARNED = {**_OPTUNA, TrialStatus.DIVERGED: TrialState.PRUNED}
"""State in memory, from which the sampler learns; of failures see also `sampler.counts_as_worst`."""


@dataclass
class TrialRecord:
    """A trial as the decisions of a study read it.

    Attributes:
        number: number of the trial.
        sample: values of its parameters.
        origin: origin of the sample, see `Assignment`.
        seed: seed of weights, order and views.
        epochs: epochs of a complete training.
        student: name of the student's network.
        confirms: number of the trial that it repeats.
        duplicate_of: number of an earlier trial with the same recipe; then nothing is trained.
        status: status of the trial.
        value: final value of the searched metric.
        reports: mean of the searched metric over the newest epochs, by rung; see `Study.report`.
        stopped: reason to stop it at a rung, or None.
        trained: number of trained epochs, once it has ended.
        iou_classes: number of classes in the mean that its value is; empty unless an mIoU is searched.
        error: type and message of a failure; None if there was none, or if it is unknown.
    """

    number: int
    sample: dict[str, Scalar]
    origin: Origin
    seed: int
    epochs: int
    student: str
    confirms: int | None
    duplicate_of: int | None
    status: TrialStatus
    value: float | None = None
    reports: dict[int, float] = field(default_factory=dict)
    stopped: str | None = None
    trained: float = 0.0
    iou_classes: tuple[int, ...] = ()
    error: str | None = None

    @cached_property
    def method(self) -> str:
        """Name of the method."""
        return str(self.sample["method"])

    @property
    def is_search(self) -> bool:
        """Whether it is a start or a sample that is trained, not a repetition or a duplicate."""
        return self.confirms is None and self.duplicate_of is None

    @property
    def is_running(self) -> bool:
        """Whether it has started and has neither ended nor been paused."""
        return self.status == TrialStatus.RUNNING

    @property
    def is_complete(self) -> bool:
        """Whether it is complete."""
        return self.status == TrialStatus.COMPLETE

    @property
    def early(self) -> float:
        """Report at the last rung; NaN before the first."""
        return self.reports[self.reached] if self.reports else math.nan

    @property
    def reached(self) -> int:
        """Last rung with a report; 0 before the first."""
        return max(self.reports, default=0)


class Trials:
    """Trials of a study, by number.

    Attributes:
        database: the study on disk; the same as `memory` for a study that is not kept.
        memory: a working copy: sampling would be dozens of transactions, and a trial is written in a single one.
        every_epoch: whether Optuna's intermediate values are those of every epoch (for its pruners), or of rungs.
        search: starts and samples that are (or were) trained, by number.
        numbers: numbers of these by the identity of their training, see `SearchSpace.identity`.
        confirmations: trainings on fresh seeds, by the number of the trial that they repeat.
        baselines: trials of the search without a teacher that have reported at an epoch, by epoch.
        counts: number of trials of the search by status and reason of a stop.
        sampled: number of samples that have ended.
        known_in_a_row: number of the last samples of this search space that equal an earlier trial.
    """

    def __init__(
        self,
        database: optuna.Study,
        *,
        is_kept: bool,
        every_epoch: bool = False,
        identity: Callable[[Mapping[str, Scalar]], Hashable] = lambda sample: tuple(sorted(sample.items())),
        since: int = 0,
    ) -> None:
        self._identity, self._since = identity, since
        self.database = self.memory = database
        self.every_epoch = every_epoch
        if is_kept:
            self.memory = optuna.create_study(direction=database.direction)
            self.memory.add_trials(map(_as_learned, database.get_trials(deepcopy=False)))
            for key, value in _study_attrs(database).items():
                self.memory._storage.set_study_system_attr(self.memory._study_id, key, value)
        self._attrs = _study_attrs(self.memory)
        self.search: list[TrialRecord] = []
        self.numbers: dict[Hashable, int] = {}
        self.confirmations: dict[int, list[TrialRecord]] = {}
        self.baselines: dict[int, list[TrialRecord]] = {}
        self.counts: Counter[tuple[TrialStatus, str | None]] = Counter()
        self._sorted_reports: dict[tuple[int, int, str], list[float]] = {}
        self.sampled = self.known_in_a_row = self._count = 0
        self._all: dict[int, TrialRecord] = {}
        for trial in self.memory.get_trials(deepcopy=False):
            self._count += 1
            if "assignment" in trial.user_attrs:
                self._register(trial)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[TrialRecord]:
        """Iterate over the trials that this class added, by number."""
        return iter(self._all.values())

    def __getitem__(self, number: int) -> TrialRecord:
        return self._all[number]

    def repetitions(self) -> Iterator[TrialRecord]:
        """Iterate over the trials that repeat others on fresh seeds."""
        for group in self.confirmations.values():
            yield from group

    def foreign(self) -> list[int]:
        """List the running trials that were not added here (`study.ask` by hand)."""
        running = self.memory.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial.number for trial in running if trial.number not in self._all]

    def cost(self, number: int, key: str) -> float:
        """Return the costs of the study at the end of a trial; 0 before."""
        return float(self._frozen(number).user_attrs.get("ended", {}).get(key, 0.0))

    def add(self, trial: FrozenTrial) -> TrialRecord:
        """Append a trial."""
        if self.database is not self.memory:
            self.database.add_trial(trial)
        self.memory.add_trial(trial)
        return self._register_newest()

    def store(self) -> TrialRecord:
        """Append to the database the newest trial in memory."""
        if self.database is not self.memory:
            self.database.add_trial(self._frozen(self._count))
            attrs = _study_attrs(self.memory)
            for key, value in attrs.items():
                if self._attrs.get(key) != value:
                    self.database._storage.set_study_system_attr(self.database._study_id, key, value)
            self._attrs = attrs
        return self._register_newest()

    def report(self, number: int, epoch: int, value: float) -> None:
        """Record a running trial's report at a rung, unless it is known."""
        record = self[number]
        if epoch in record.reports:
            return
        record.reports[epoch] = value
        self._add_report(record, epoch)
        if self.every_epoch:
            self.set_attr(number, "rungs", {str(rung): value for rung, value in record.reports.items()})
        else:
            self._report_to_optuna(number, epoch, value)

    def report_epochs(self, number: int, values: Mapping[int, float]) -> None:
        """Record the metric of a running trial's epochs, unless it is known."""
        known = self.epochs_of(number)
        for epoch, value in values.items():
            if epoch not in known:
                self._report_to_optuna(number, epoch, value)

    def epochs_of(self, number: int) -> Mapping[int, float]:
        """Return Optuna's intermediate values of a trial by epoch: all epochs, or rungs."""
        return self._frozen(number).intermediate_values

    def should_prune(self, number: int, pruner: optuna.pruners.BasePruner) -> bool:
        """Return the result of `optuna.Trial.should_prune` in a study with this pruner."""
        self.database.pruner = pruner
        return pruner.prune(self.database, self.database._storage.get_trial(_trial_id(self.database, number)))

    def sorted_reports(self, epoch: int, epochs: int, student: str = "") -> Sequence[float]:
        """Return the reports of the search at a rung, smallest first.

        Only trainings of `epochs` epochs count, and of `student` if it is not empty.
        """
        return self._sorted_reports.get((epoch, epochs, student), ())

    def set_attr(self, number: int, key: str, value: object) -> None:
        """Set a user attribute of a running trial, also of a trial that another process has asked for."""
        for study in self._studies:
            study._storage.set_trial_user_attr(_trial_id(study, number), key, value)

    def stop(self, number: int, epoch: int, reason: str) -> None:
        """Record the decision to stop a running trial."""
        with self._counted_again(self[number]) as record:
            record.stopped = reason
        self.set_attr(number, "stopped", {"at": epoch, "reason": reason})

    def end(self, number: int, status: TrialStatus, value: float | None = None) -> None:
        """End a trial."""
        if self.database is not self.memory:
            self.database.tell(number, value, _OPTUNA[status])
        self.memory.tell(number, value, _LEARNED[status])
        if number in self._all:
            self.set_status(number, status, value)

    def set_status(self, number: int, status: TrialStatus, value: float | None = None) -> None:
        """Change the status of a trial, in memory alone."""
        with self._counted_again(self[number]) as record:
            record.status, record.value = status, value

    @property
    def _studies(self) -> tuple[optuna.Study, ...]:
        return (self.memory,) if self.database is self.memory else (self.database, self.memory)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.memory._storage.get_trial(_trial_id(self.memory, number))

    def _register_newest(self) -> TrialRecord:
        self._count += 1
        return self._register(self._frozen(self._count - 1))

    def _register(self, trial: FrozenTrial) -> TrialRecord:
        attrs = trial.user_attrs["assignment"]
        reports = dict(trial.intermediate_values)
        if self.every_epoch:
            reports = {int(epoch): value for epoch, value in trial.user_attrs.get("rungs", {}).items()}
        record = TrialRecord(
            number=trial.number,
            sample=dict(attrs["sample"]),
            origin=attrs["origin"],
            seed=attrs["seed"],
            epochs=attrs["epochs"],
            student=attrs["student"],
            confirms=attrs["confirms"],
            duplicate_of=attrs["duplicate_of"],
            status=_status(trial),
            value=trial.value,
            reports=reports,
            stopped=trial.user_attrs.get("stopped", {}).get("reason"),
            trained=trial.user_attrs.get("ended", {}).get("trained", 0.0),
            iou_classes=tuple(trial.user_attrs.get("ended", {}).get("iou_classes", ())),
            error=trial.user_attrs.get("error"),
        )
        self._all[trial.number] = record
        if record.confirms is not None:
            self.confirmations.setdefault(record.confirms, []).append(record)
        elif record.duplicate_of is None:
            self.search.append(record)
            self.numbers[self._identity(record.sample)] = record.number
            self.known_in_a_row = 0
            self._count_status(record, 1)
            for epoch in record.reports:
                self._add_report(record, epoch)
        elif record.number >= self._since:
            self.known_in_a_row += 1
        return record

    @contextmanager
    def _counted_again(self, record: TrialRecord) -> Iterator[TrialRecord]:
        """Update the counts for a change of a record."""
        self._count_status(record, -1)
        yield record
        self._count_status(record, 1)

    def _count_status(self, record: TrialRecord, times: int) -> None:
        if record.is_search:
            self.counts[record.status, record.stopped] += times
            self.sampled += times * (record.origin == "sampled" and record.status.is_final)

    def _add_report(self, record: TrialRecord, epoch: int) -> None:
        if not record.is_search:
            return
        for student in {"", record.student}:
            insort(self._sorted_reports.setdefault((epoch, record.epochs, student), []), record.reports[epoch])
        if record.method == BASELINE:
            self.baselines.setdefault(epoch, []).append(record)

    def _report_to_optuna(self, number: int, epoch: int, value: float) -> None:
        for study in self._studies:
            study._storage.set_trial_intermediate_value(_trial_id(study, number), epoch, value)


def _trial_id(study: optuna.Study, number: int) -> int:
    """Return the identifier of a trial in a study's storage."""
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)


def _study_attrs(study: optuna.Study) -> dict[str, Any]:
    """Return the state that samplers keep with a study, such as the position in a sequence."""
    return dict(study._storage.get_study_system_attrs(study._study_id))


def _as_learned(trial: FrozenTrial) -> FrozenTrial:
    if _status(trial) == TrialStatus.DIVERGED:
        trial = copy(trial)
        trial.state = _LEARNED[TrialStatus.DIVERGED]
    return trial


def _status(trial: FrozenTrial) -> TrialStatus:
    """Return the status of a trial of the database; a paused trial continues, so it is running."""
    if not trial.state.is_finished():
        return TrialStatus.RUNNING
    attrs = trial.user_attrs
    failed = "error" in attrs or trial.state == TrialState.FAIL  # in memory a diverged trial is pruned
    by_state = TrialStatus.FAILED if failed else trial.state.name.lower()
    written = attrs.get("ended", {}).get("status", by_state)
    return read_status(by_state if written == TrialStatus.PAUSED else written, attrs.get("stopped", {}).get("reason"))
