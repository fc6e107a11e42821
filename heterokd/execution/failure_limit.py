"""Stop a search in which every trial's process dies, or whose nodes are at fault."""

from __future__ import annotations

from heterokd.execution.ray_settings import tune
from heterokd.storage.study_dir import StudyFolder

FEWEST = 3
"""Minimum number of dead processes before the search is stopped."""

EACH = 2
"""Dead processes per parallel trial: a node that dies takes all of its trials with it, but not twice."""


class FailureLimit(tune.Stopper):  # type: ignore[misc]  # Ray is not fully typed
    """Stops a search whose trials' processes all die before any trial has reported an epoch.

    Otherwise each trial would be restarted `search.max_failures` times, up to the last trial of the search. A single
    reported epoch proves that trials can run here: from then on, a process that dies is its trial's fault.

    Attributes:
        count: number of processes that died before the first reported epoch.
    """

    def __init__(self, folder: StudyFolder, parallel: int) -> None:
        """Count failures of a search in `folder` that runs `parallel` trials at a time."""
        self._folder = folder
        self._limit = max(FEWEST, EACH * parallel)
        self._reported: dict[int, int] = {}  # epochs of the trials that began here, when they did
        self._excused: set[int] = set()
        self._is_proven = False
        self._nodes: str | None = None
        self.count = 0

    @property
    def is_reached(self) -> bool:
        """Whether the search stops."""
        return self._nodes is not None or (not self._is_proven and self.count >= self._limit)

    def begin(self, number: int) -> None:
        """Register a trial that starts. Progress from an earlier run does not count."""
        if not self._has_proof():
            self._reported[number] = self._epochs(number)

    def stop(self, sentence: str) -> None:
        """Stop the search because its nodes are at fault; `sentence`: see `sentence`."""
        self._nodes = sentence

    def excuse(self, number: int) -> None:
        """Do not count the end of a trial's process that the driver ends."""
        self._excused.add(number)

    def is_excused(self, number: int) -> bool:
        """Whether the driver ends the trial's process."""
        return number in self._excused

    def add(self, number: int) -> None:
        """Count a trial's process that died without a preemption notice."""
        if self.is_excused(number):
            return
        if not self._has_proof():
            self.count += 1

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        """Never stop a single trial (Tune asks at each report)."""
        return False

    def stop_all(self) -> bool:
        """Return whether Tune stops all trials."""
        return self.is_reached

    @property
    def sentence(self) -> str:
        """Error message: what happened, where, and what to do."""
        if self._nodes is not None:
            return f"{self._folder.path}: {self._nodes}"
        return (
            f"{self._folder.path}: {self.count} trial processes died in a row (killed, or out of memory) before any "
            "trial had reported an epoch, so the search has stopped; see Ray's logs (/tmp/ray/session_latest/logs of "
            "the node), free memory or train less at a time (search.parallel, training.batch_size), and continue with "
            "--resume"
        )

    def _has_proof(self) -> bool:
        self._is_proven = self._is_proven or any(
            self._epochs(number) > before for number, before in self._reported.items()
        )
        return self._is_proven

    def _epochs(self, number: int) -> int:
        return len(self._folder.trial(number).metrics())
