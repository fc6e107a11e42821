"""What becomes of a trial whose process ended without recording its end: failed, resumed, or interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from heterokd.execution.crash_file import CRASH_FILE, Crashes
from heterokd.execution.failure_cause import Cause, cause_of, first_line_of
from heterokd.execution.oom_kills import oom_kills
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import OUT_OF_MEMORY

LOW_MEMORY = "running low on memory"
"""Part of the message of Ray, which kills processes before the kernel has to."""

MOST_DEATHS = 100
"""Deaths of a trial's processes in a search after which it is interrupted even if it makes progress."""


class Fate(StrEnum):
    """What becomes of a trial."""

    FAILED = "failed"
    """Its end is recorded."""
    RESUMED = "resumed"
    """This search runs it again, from its last checkpoint."""
    INTERRUPTED = "interrupted"
    """It is left to the next search."""

    @property
    def sentence(self) -> str:
        """A clause for the terminal."""
        return {
            Fate.FAILED: "it is recorded as failed",
            Fate.RESUMED: "it continues from its last checkpoint",
            Fate.INTERRUPTED: "the other trials continue, and --resume runs it again",
        }[self]


@dataclass(frozen=True)
class Ending:
    """What becomes of a trial, and the reason, a line."""

    kind: Fate
    reason: str


@dataclass
class _Deaths:
    """Deaths of a trial's processes.

    Attributes:
        crashes: the trial's file of crashes.
        total: number of deaths.
        in_vain: number of deaths in a row since the last new epoch.
        epochs: epochs at the last death.
        signal: name of the signal by which the last process crashed, or None.
    """

    crashes: Crashes
    total: int = 0
    in_vain: int = 0
    epochs: int = 0
    signal: str | None = None


class TrialDeaths:
    """Judges trials whose processes die.

    A trial that has finished an epoch since its process last died is healthy, whatever kills its processes: such a
    death does not count. After more than `search.max_failures` others in a row the trial is given up. It has failed if
    it raised an exception, crashed or took too much memory; if its processes were killed, or the machine or Ray failed,
    it is interrupted.
    """

    def __init__(self, folder: StudyFolder, max_failures: int, count_kills: Callable[[], int] = oom_kills) -> None:
        """Judge trials of a study.

        Args:
            folder: the study's folder.
            max_failures: maximum restarts in a row without a new epoch.
            count_kills: counts the processes that the kernel killed for their memory.
        """
        self._folder, self._max_failures = folder, max_failures
        self._count_kills, self._kills = count_kills, count_kills()
        self._deaths: dict[int, _Deaths] = {}

    def begin(self, number: int) -> None:
        """Register a trial that starts. Progress from an earlier run does not count."""
        files = self._folder.trial(number)
        deaths = self._deaths.setdefault(number, _Deaths(Crashes(files.path)))
        deaths.epochs = files.reported_epochs()
        deaths.crashes.skip()

    def restarted(self, number: int) -> None:
        """Count a death after which the process is started again at once."""
        self._kills = self._count_kills()
        self._count(number)

    def judge(self, number: int, error: BaseException | None) -> Ending:
        """Count a death, and return what becomes of the trial.

        Args:
            number: number of the trial.
            error: Ray's exception for the last death; None if it is unknown.
        """
        kills, self._kills = self._kills, self._count_kills()
        cause = Cause.PROCESS if error is None else cause_of(error)
        deaths = self._count(number)
        if cause == Cause.PROCESS and (self._kills > kills or LOW_MEMORY in str(error)):
            return Ending(
                Fate.FAILED,
                f"{OUT_OF_MEMORY}: the trial's process was killed; free memory, or train less at a time "
                "(search.parallel, training.batch_size)",
            )
        reason = what_failed(error)
        if cause == Cause.TRIAL:
            return Ending(Fate.FAILED, reason)
        if deaths.total >= MOST_DEATHS:
            return Ending(Fate.INTERRUPTED, f"{reason}, {deaths.total} times")
        if deaths.in_vain <= self._max_failures:
            return Ending(Fate.RESUMED, reason)
        if cause == Cause.PROCESS and deaths.signal is not None:
            return Ending(Fate.FAILED, f"the trial's process crashed ({deaths.signal}); its stack is in {CRASH_FILE}")
        often = "" if deaths.in_vain == 1 else f" {deaths.in_vain} times in a row"
        return Ending(Fate.INTERRUPTED, f"{reason}{often}, without a new epoch")

    def _count(self, number: int) -> _Deaths:
        files = self._folder.trial(number)
        deaths = self._deaths.setdefault(number, _Deaths(Crashes(files.path)))
        epochs, before = files.reported_epochs(), deaths.epochs
        deaths.total += 1
        deaths.in_vain = 0 if epochs > before else deaths.in_vain + 1
        deaths.epochs = epochs
        deaths.signal = deaths.crashes.new()
        return deaths


def what_failed(error: BaseException | None) -> str:
    """Return a clause that says how a trial's process ended; `error`: Ray's exception, None if it is unknown."""
    if error is None or cause_of(error) == Cause.PROCESS:
        return "its process died (killed, a crash, or out of memory)"
    return first_line_of(error)
