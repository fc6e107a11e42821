"""What becomes of a trial whose process ended without recording its end: failed, resumed, or interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from heterokd.execution.failure_cause import Cause, cause_of, first_line_of
from heterokd.execution.oom_kills import oom_kills
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import OUT_OF_MEMORY

LOW_MEMORY = "running low on memory"
"""Part of the message of Ray, which kills processes before the kernel has to."""


@dataclass(frozen=True)
class Ending:
    """What becomes of a trial.

    Attributes:
        kind: `failed`; `resumed` by this search; `interrupted`, which leaves it to the next search.
        reason: a line.
    """

    kind: Literal["failed", "resumed", "interrupted"]
    reason: str


class TrialDeaths:
    """Judges trials whose process died once more than `search.max_failures` allows.

    A trial that has finished an epoch since its process last died is healthy, whatever kills its processes: it is
    resumed. Otherwise a fault of the machine or of Ray interrupts it, and all else is its failure.
    """

    def __init__(self, folder: StudyFolder, count_kills: Callable[[], int] = oom_kills) -> None:
        """Judge the trials of the study in `folder`; `count_kills` counts the processes that the kernel killed."""
        self._folder = folder
        self._count_kills, self._kills = count_kills, count_kills()
        self._epochs: dict[int, int] = {}

    def begin(self, number: int) -> None:
        """Register a trial that starts, or whose process has died and is restarted."""
        self._epochs[number] = self._folder.trial(number).reported_epochs()

    def judge(self, number: int, error: BaseException | None) -> Ending:
        """Return what becomes of a trial.

        Args:
            number: number of the trial.
            error: Ray's exception for the last death; None if it is unknown.
        """
        kills, self._kills = self._kills, self._count_kills()
        cause = Cause.PROCESS if error is None else cause_of(error)
        if cause == Cause.PROCESS and (self._kills > kills or LOW_MEMORY in str(error)):
            return Ending(
                "failed",
                f"{OUT_OF_MEMORY}: the trial's process was killed; free memory, or train less at a time "
                "(search.parallel, training.batch_size)",
            )
        if cause == Cause.PROCESS:
            reason = "the trial's process died (killed, or out of memory); see Ray's logs of its node"
        else:
            reason = first_line_of(error) if error is not None else ""
        if cause != Cause.TRIAL and self._folder.trial(number).reported_epochs() > self._epochs.get(number, 0):
            return Ending("resumed", reason)
        return Ending("interrupted" if cause.is_fault else "failed", reason)
