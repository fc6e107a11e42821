"""StudyActor: the Ray actor that holds a search's study.

When its process dies, Ray starts it again and repeats the calls that were not answered: the study is opened from its
folder and database, and the trials that run on are adopted. So each method can be called twice.

A separate module that imports neither torch nor Ray Tune, which would take half a gigabyte until the search ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from heterokd.config.experiment import Experiment
from heterokd.execution.node_faults import NodeFault, NodeFaults
from heterokd.storage.study_dir import StudyFolder, TrialEnd
from heterokd.storage.trial_status import TIMED_OUT, TrialStatus
from heterokd.study.assignment import BUDGET, Assignment
from heterokd.study.options import StudyOptions
from heterokd.study.search_space import SearchSpace
from heterokd.study.study import Study
from heterokd.study.summary import StudySummary


class StudyActor:
    """Decides for a search; trials and Ray Tune call it."""

    def __init__(
        self,
        experiment: str,
        folder: Path,
        space: SearchSpace,
        devices: float = 1.0,
        trial_seconds: float | None = None,
    ) -> None:
        """Open the study, which exists.

        Args:
            experiment: the experiment, as JSON.
            folder: the study's folder.
            space: the study's search space.
            devices: number of devices per trial.
            trial_seconds: see `StudyOptions`.
        """
        self.study = Study.open(
            Experiment.model_validate_json(experiment),
            StudyFolder(folder),
            StudyOptions(devices=devices, space=space, trial_seconds=trial_seconds),
        )
        self.running: dict[int, Assignment] = {}
        self.nodes = NodeFaults()
        self._moved: set[int] = set()  # trials that wait for another node
        self._places: dict[int, str] = {}  # nodes of the running trials whose processes have begun
        self._reported: dict[int, int] = {}  # bytes of metrics.jsonl of the running trials

    def spent(self, seconds: float) -> None:
        """Add the time that this search has already taken on a device (its teacher's fit)."""
        self.study.spending.pass_time(seconds, running=1)

    def next(self, running: Sequence[int] = ()) -> Assignment | Literal["wait"] | None:
        """Return the next training to run; `running`: numbers of the trials that run."""
        self._adopt(running)
        following = self.study.next()
        if isinstance(following, Assignment):
            self.running[following.number] = following
            self._places.pop(following.number, None)
            self._moved.discard(following.number)
        return following

    def assignment(self, number: int, node: str) -> Assignment | None:
        """Return the assignment of a trial whose process begins on a node; None if the trial has already finished."""
        self._adopt([number])
        self.study.started(number)
        self._places[number] = node
        return self.running.get(number)

    def report(self, number: int, epoch: int, metrics: dict[str, float], curve: list[dict[str, float]]) -> bool:
        """Record a trial's metrics at a rung; return whether it continues."""
        self._adopt([number])
        if self._places.get(number):
            self.nodes.proved(self._places[number])
        return self.study.report(number, epoch, metrics, curve)

    def why(self, number: int) -> str | None:
        """Return why a trial was stopped."""
        return self.study.why(number)

    def finish(self, number: int, status: TrialStatus, metrics: dict[str, float], error: str | None) -> None:
        """Record the end of a trial."""
        self.study.finish(number, status, metrics, error)
        self.running.pop(number, None)

    def died(self, number: int, message: str) -> None:
        """Record the failure of a trial whose process died, also in its folder, since nothing else has written it.

        A trial whose process died before it began is not at fault: it runs again.
        """
        if number in self.running and number not in self._places and self.nodes.starts_again(number):
            self._put_back(number, message)
            return
        TrialEnd(TrialStatus.FAILED, None, message).write(self.study.folder.trial(number))
        self.finish(number, TrialStatus.FAILED, {}, message)

    def interrupt(self, number: int, reason: str, again: bool) -> None:
        """Record that a trial was interrupted, see `Study.interrupt`."""
        self.study.interrupt(number, reason, again=again)
        self.running.pop(number, None)

    def interrupted(self) -> dict[int, str]:
        """Return the reasons of the interrupted trials that are left to the next search."""
        return self.study.interrupted

    def expire(self, running: Sequence[int] = ()) -> list[int]:
        """End the trials that exceed their limit, see `Study.expire`; return their numbers, to end their processes."""
        self._adopt(running)
        for number in self.running:
            size = self.study.folder.trial(number).metrics_size
            if size > self._reported.setdefault(number, size):
                self._reported[number] = size
                self.study.seen(number)
        expired = self.study.expire()
        for trial in expired:
            status = TrialStatus.FAILED if trial.reason == TIMED_OUT else TrialStatus.PAUSED
            TrialEnd(status, trial.reason, trial.sentence).write(self.study.folder.trial(trial.number))
            self.running.pop(trial.number, None)
        return [trial.number for trial in expired]

    def end(self, number: int) -> TrialEnd | None:
        """Return the end of a trial that was ended without its process, or None."""
        files = self.study.folder.trial(number)
        snapshot = files.snapshot
        if snapshot.reason not in (TIMED_OUT, BUDGET):
            return None
        return TrialEnd(snapshot.status, snapshot.reason, files.error_line or "")

    def summary(self, running: Sequence[int] = ()) -> StudySummary:
        """Summarise the study so far."""
        self._adopt(running)
        return replace(self.study.summary(), failing_nodes=self.nodes.reasons)

    def move(self, number: int, fault: NodeFault, candidates: Collection[str]) -> bool:
        """Run a trial that met a fault again on another node, see `NodeFaults.moves`; False if the trial has failed."""
        if not self.nodes.moves(number, fault, candidates):
            return False
        self._put_back(number, fault.reason)
        return True

    def avoided(self) -> list[str]:
        """Return the ids of the nodes that trials avoid."""
        return self.nodes.avoided

    def is_checked(self, node: str) -> bool:
        """Whether a node has passed its checks."""
        return self.nodes.is_checked(node)

    def node_passed(self, node: str) -> None:
        """Record that a node has passed its checks."""
        self.nodes.passed(node)

    def node_failed(self, fault: NodeFault) -> None:
        """Avoid a node."""
        self.nodes.add(fault)

    def node_reasons(self) -> Mapping[str, str]:
        """Return why nodes are avoided, by address."""
        return self.nodes.reasons

    def node_limit(self, candidates: Collection[str], may_grow: bool) -> str | None:
        """Return why the search stops, see `NodeFaults.limit`, or None."""
        return self.nodes.limit(candidates, may_grow=may_grow)

    def _put_back(self, number: int, reason: str) -> None:
        """Let `next` return a trial again that has not failed."""
        self._moved.add(number)
        self.interrupt(number, reason, again=True)

    def _adopt(self, numbers: Sequence[int]) -> None:
        """Adopt the trials that were running before this study was opened again."""
        for number in numbers:
            if number in self._moved or number in self.running:
                continue
            if (assignment := self.study.adopt(number)) is not None:
                self.running[number] = assignment
                self.study.started(number)
                self._places.setdefault(number, "")  # its process has begun, on a node that is not known any more
