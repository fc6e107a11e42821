"""StudyActor: the Ray actor that holds a search's study.

When its process dies, Ray starts it again and repeats the calls that were not answered: the study is opened from its
folder and database, and the trials that run on are adopted. So each method can be called twice.

A separate module that imports neither torch nor Ray Tune, which would take half a gigabyte until the search ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from heterokd.config.experiment import Experiment
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
        return following

    def assignment(self, number: int) -> Assignment | None:
        """Return the assignment of a trial whose process begins; None if the trial has already finished."""
        self._adopt([number])
        self.study.started(number)
        return self.running.get(number)

    def report(self, number: int, epoch: int, metrics: dict[str, float], curve: list[dict[str, float]]) -> bool:
        """Record a trial's metrics at a rung; return whether it continues."""
        self._adopt([number])
        return self.study.report(number, epoch, metrics, curve)

    def why(self, number: int) -> str | None:
        """Return why a trial was stopped."""
        return self.study.why(number)

    def finish(self, number: int, status: TrialStatus, metrics: dict[str, float], error: str | None) -> None:
        """Record the end of a trial."""
        self.study.finish(number, status, metrics, error)
        self.running.pop(number, None)

    def died(self, number: int, message: str) -> None:
        """Record the failure of a trial whose process died, also in its folder, since nothing else has written it."""
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
        return self.study.summary()

    def _adopt(self, numbers: Sequence[int]) -> None:
        """Adopt the trials that were running before this study was opened again."""
        for number in numbers:
            if number not in self.running and (assignment := self.study.adopt(number)) is not None:
                self.running[number] = assignment
