"""Deaths of trials' processes, and when they say that no trial will ever get anywhere."""

from __future__ import annotations

from heterokd.execution.ray_settings import tune
from heterokd.storage.study_dir import StudyFolder

FEWEST = 3
"""Processes that died, before they say anything about those to come."""

EACH = 2
"""Processes for each trial that runs at a time: a node that dies takes all of its trials, but not twice."""


class FailureLimit(tune.Stopper):  # type: ignore[misc]  # Ray is not fully typed
    """Ends a search whose trials all die before they have reported a single epoch.

    Each of them would otherwise be started again `search.max_failures` times, to the last trial of the search. One
    epoch of one trial is enough to see that trials can run here: from then on, deaths are the trials' own.

    Attributes:
        count: processes that died before that.
    """

    def __init__(self, folder: StudyFolder, parallel: int) -> None:
        """For a search in `folder` with so many trials at a time."""
        self._folder = folder
        self._limit = max(FEWEST, EACH * parallel)
        self._reported: dict[int, int] = {}  # epochs of the trials that began here, when they did
        self._is_proven = False
        self.count = 0

    @property
    def are_hopeless(self) -> bool:
        """Whether the search ends."""
        return not self._is_proven and self.count >= self._limit

    def begin(self, number: int) -> None:
        """A trial is handed out; what it reported in an earlier search proves nothing of this one."""
        if not self._has_proof():
            self._reported[number] = self._epochs(number)

    def add(self) -> None:
        """A trial's process died, and its node had given no warning."""
        if not self._has_proof():
            self.count += 1

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        """Tune asks at each report whether the trial ends: never because of this."""
        return False

    def stop_all(self) -> bool:
        """Tune asks whether all end."""
        return self.are_hopeless

    @property
    def sentence(self) -> str:
        """What happened, where, and what to do."""
        return (
            f"{self._folder.path}: {self.count} trial processes died in a row (killed, or out of memory) before any "
            "trial had reported an epoch, so the search has stopped; see Ray's logs (/tmp/ray/session_latest/logs of "
            "the node), make room or train less at a time (search.parallel, training.batch_size), and go on with "
            "--resume"
        )

    def _has_proof(self) -> bool:
        self._is_proven = self._is_proven or any(self._epochs(one) > before for one, before in self._reported.items())
        return self._is_proven

    def _epochs(self, number: int) -> int:
        return len(self._folder.trial(number).metrics())
