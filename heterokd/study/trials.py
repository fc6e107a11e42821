"""The trials of a study, read from memory and written to the database as well."""

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
"""Optuna's state of a trial; a paused one is running there."""


@dataclass
class TrialRecord:
    """One trial as the study's decisions read it.

    Attributes:
        number: of the trial.
        sample: what was proposed.
        origin: how it came up.
        seed: of weights, order and views.
        epochs: of its recipe, trained to the end.
        student: its network.
        confirms: number of the trial that it repeats.
        duplicate_of: number of an earlier trial with the same recipe; then nothing is trained.
        status: where it stands.
        value: the searched metric of the end.
        reports: by rung, the mean of the searched metric over the newest epochs; see `Study.report`.
        stopped: why it was told to stop at a rung; None: it was not.
        trained: epochs that it took, once it has ended.
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

    @cached_property
    def method(self) -> str:
        """The method that is distilled with."""
        return str(self.sample["method"])

    @property
    def is_running(self) -> bool:
        """Whether it was handed out and has neither ended nor been paused."""
        return self.status == TrialStatus.RUNNING

    @property
    def is_complete(self) -> bool:
        """Whether it was trained to the end."""
        return self.status == TrialStatus.COMPLETE

    @property
    def early(self) -> float:
        """The report of the last rung; no number before the first."""
        return self.reports[self.reached] if self.reports else math.nan

    @property
    def reached(self) -> int:
        """The last rung with a report; 0 before the first."""
        return max(self.reports, default=0)


class Trials:
    """All trials of a study, by number.

    Attributes:
        database: the study on disk; for a study that is not kept, the same as `memory`.
        memory: a working copy. Sampling reads all trials many times and writes in small steps, which would be dozens
            of transactions for each sample; a trial enters the database in one, with all that it holds.
        every_epoch: whether Optuna's intermediate values are those of every epoch, which its pruners read; otherwise
            those of rungs.
        search: starts and samples that are (or were) trained, by number.
        numbers: of these, by what decides their training, see `SearchSpace.identity`.
        confirmations: by the number of the trial that they repeat, what is trained on fresh seeds.
        baselines: by epoch, those of the search without a teacher that have reported there.
        counts: how many of the search have each status, and why they were stopped.
        sampled: how many samples have ended.
        known_in_a_row: how many of the last samples an earlier trial had already.
    """

    def __init__(
        self,
        database: optuna.Study,
        *,
        is_kept: bool,
        every_epoch: bool = False,
        identity: Callable[[Mapping[str, Scalar]], Hashable] = lambda sample: tuple(sorted(sample.items())),
    ) -> None:
        """Read them all."""
        self._identity = identity
        self.database = database
        self.memory = database
        self.every_epoch = every_epoch
        if is_kept:
            self.memory = optuna.create_study(direction=database.direction)
            self.memory.add_trials(map(_as_learned, database.get_trials(deepcopy=False)))
            for key, value in database._storage.get_study_system_attrs(database._study_id).items():
                self.memory._storage.set_study_system_attr(self.memory._study_id, key, value)
        self._attrs = self._study_attrs()
        self.search: list[TrialRecord] = []
        self.numbers: dict[Hashable, int] = {}
        self.confirmations: dict[int, list[TrialRecord]] = {}
        self.baselines: dict[int, list[TrialRecord]] = {}
        self.counts: Counter[tuple[TrialStatus, str | None]] = Counter()
        self._arrived: dict[tuple[int, int, str], list[float]] = {}
        self.sampled = self.known_in_a_row = 0
        self._all: dict[int, TrialRecord] = {}
        self._count = 0
        for trial in self.memory.get_trials(deepcopy=False):
            self._count += 1
            if "assignment" in trial.user_attrs:
                self._enter(trial)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[TrialRecord]:
        """Those of the study's own making, by number."""
        return iter(self._all.values())

    def __getitem__(self, number: int) -> TrialRecord:
        return self._all[number]

    def repetitions(self) -> Iterator[TrialRecord]:
        """Trials that repeat another one on a fresh seed."""
        for group in self.confirmations.values():
            yield from group

    def strangers(self) -> list[int]:
        """Running trials that this module did not make (`study.ask` by hand)."""
        running = self.memory.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial.number for trial in running if trial.number not in self._all]

    def cost(self, number: int, key: str) -> float:
        """What the study had cost when a trial ended; 0 before."""
        ended = self.memory._storage.get_trial(self._memory_id(number)).user_attrs.get("ended", {})
        return float(ended.get(key, 0.0))

    def add(self, trial: FrozenTrial) -> TrialRecord:
        """Append a trial."""
        if self.database is not self.memory:
            self.database.add_trial(trial)
        self.memory.add_trial(trial)
        return self._enter(self._newest())

    def store(self) -> TrialRecord:
        """Append to the database the trial that was last made in memory."""
        trial = self._newest()
        if self.database is not self.memory:
            self.database.add_trial(trial)
            self._store_study_attrs()
        return self._enter(trial)

    def report(self, number: int, epoch: int, value: float) -> None:
        """Record what a rung compares of a running trial, once."""
        record = self[number]
        if epoch in record.reports:
            return
        record.reports[epoch] = value
        self._arrive(record, epoch)
        if self.every_epoch:
            self.set_attr(number, "rungs", {str(rung): value for rung, value in record.reports.items()})
        else:
            self._report_to_optuna(number, epoch, value)

    def report_epochs(self, number: int, values: Mapping[int, float]) -> None:
        """Record the metric of a running trial's epochs, each once."""
        known = self.epochs_of(number)
        for epoch, value in values.items():
            if epoch not in known:
                self._report_to_optuna(number, epoch, value)

    def epochs_of(self, number: int) -> Mapping[int, float]:
        """What Optuna knows of a trial by epoch: every one, or the rungs alone."""
        return self.memory._storage.get_trial(self._memory_id(number)).intermediate_values

    def should_prune(self, number: int, pruner: optuna.pruners.BasePruner) -> bool:
        """Answer as `optuna.Trial.should_prune` of a study with this pruner does."""
        self.database.pruner = pruner
        storage = self.database._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(self.database._study_id, number)
        return pruner.prune(self.database, storage.get_trial(trial_id))

    def arrived(self, epoch: int, epochs: int, student: str = "") -> Sequence[float]:
        """Reports of the search at a rung, smallest first.

        Args:
            epoch: the rung.
            epochs: of the trainings that count.
            student: whose trainings count; all where it is empty.
        """
        return self._arrived.get((epoch, epochs, student), ())

    def set_attr(self, number: int, key: str, value: object) -> None:
        """Note something about a running trial, also about one that another process asked for."""
        for study, trial_id in self._both(number):
            study._storage.set_trial_user_attr(trial_id, key, value)

    def stop(self, number: int, epoch: int, reason: str) -> None:
        """Note that a running trial was told to stop."""
        with self._changing(self[number]) as record:
            record.stopped = reason
        self.set_attr(number, "stopped", {"at": epoch, "reason": reason})

    def end(self, number: int, status: TrialStatus, value: float | None = None) -> None:
        """End a trial."""
        if self.database is not self.memory:
            self.database.tell(number, value, _OPTUNA[status])
        self.memory.tell(number, value, _LEARNED.get(status, _OPTUNA[status]))
        if number in self._all:
            self.mark(number, status, value)

    def mark(self, number: int, status: TrialStatus, value: float | None = None) -> None:
        """Change where a trial stands, in memory alone."""
        with self._changing(self[number]) as record:
            record.status, record.value = status, value

    @property
    def _studies(self) -> tuple[optuna.Study, ...]:
        return (self.memory,) if self.database is self.memory else (self.database, self.memory)

    def _study_attrs(self) -> dict[str, Any]:
        """What samplers keep with a study, such as the place in a sequence of points."""
        return dict(self.memory._storage.get_study_system_attrs(self.memory._study_id))

    def _store_study_attrs(self) -> None:
        """Write to the database what has changed in memory."""
        attrs = self._study_attrs()
        for key, value in attrs.items():
            if self._attrs.get(key) != value:
                self.database._storage.set_study_system_attr(self.database._study_id, key, value)
        self._attrs = attrs

    def _newest(self) -> FrozenTrial:
        self._count += 1
        return self.memory._storage.get_trial(self._memory_id(self._count - 1))

    def _memory_id(self, number: int) -> int:
        storage = self.memory._storage
        return storage.get_trial_id_from_study_id_trial_number(self.memory._study_id, number)

    def _enter(self, trial: FrozenTrial) -> TrialRecord:
        attrs = trial.user_attrs["assignment"]
        ended = trial.user_attrs.get("ended", {})
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
            reports=_reports(trial) if self.every_epoch else dict(trial.intermediate_values),
            stopped=trial.user_attrs.get("stopped", {}).get("reason"),
            trained=ended.get("trained", 0.0),
        )
        self._all[trial.number] = record
        if record.confirms is not None:
            self.confirmations.setdefault(record.confirms, []).append(record)
        elif record.duplicate_of is None:
            self.search.append(record)
            self.numbers[self._identity(record.sample)] = record.number
            self.known_in_a_row = 0
            self._tally(record, 1)
            for epoch in record.reports:
                self._arrive(record, epoch)
        else:
            self.known_in_a_row += 1
        return record

    @contextmanager
    def _changing(self, record: TrialRecord) -> Iterator[TrialRecord]:
        """Count a trial again after a change."""
        self._tally(record, -1)
        yield record
        self._tally(record, 1)

    def _tally(self, record: TrialRecord, times: int) -> None:
        if record.confirms is None and record.duplicate_of is None:
            self.counts[record.status, record.stopped] += times
            self.sampled += times * (record.origin == "sampled" and record.status.is_final)

    def _arrive(self, record: TrialRecord, epoch: int) -> None:
        if record.confirms is not None or record.duplicate_of is not None:
            return
        for student in {"", record.student}:
            insort(self._arrived.setdefault((epoch, record.epochs, student), []), record.reports[epoch])
        if record.method == BASELINE:
            self.baselines.setdefault(epoch, []).append(record)

    def _report_to_optuna(self, number: int, epoch: int, value: float) -> None:
        for study, trial_id in self._both(number):
            study._storage.set_trial_intermediate_value(trial_id, epoch, value)

    def _both(self, number: int) -> list[tuple[optuna.Study, int]]:
        """A trial in the database and in memory, by Optuna's identifiers."""
        return [
            (study, study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number))
            for study in self._studies
        ]


_LEARNED = {TrialStatus.DIVERGED: TrialState.PRUNED}
"""What the sampler learns from. It overlooks failures, but one that diverged says where not to look again."""


def _as_learned(trial: FrozenTrial) -> FrozenTrial:
    state = _LEARNED.get(_status(trial), trial.state)
    if state != trial.state:
        trial = copy(trial)
        trial.state = state
    return trial


def _reports(trial: FrozenTrial) -> dict[int, float]:
    """By rung, where Optuna's intermediate values are those of every epoch."""
    return {int(epoch): value for epoch, value in trial.user_attrs.get("rungs", {}).items()}


def _status(trial: FrozenTrial) -> TrialStatus:
    """Where a trial of the database stands; one that is paused there goes on, so it is running."""
    if not trial.state.is_finished():
        return TrialStatus.RUNNING
    attrs = trial.user_attrs
    failed = "error" in attrs or trial.state == TrialState.FAIL  # in memory one that diverged is pruned
    by_state = TrialStatus.FAILED if failed else trial.state.name.lower()
    written = attrs.get("ended", {}).get("status", by_state)
    return read_status(by_state if written == TrialStatus.PAUSED else written, attrs.get("stopped", {}).get("reason"))
