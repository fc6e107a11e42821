"""StudyProgress: number of trials in each state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StudyProgress:
    """Number of trials in each state; `planned` is the sum of all ended, running and future trials of the search.

    Attributes:
        planned: trials of the search, without confirmations; an estimate if a budget decides.
        running: running trials, including confirmations.
        complete: complete trials of the search.
        pruned: pruned trials of the search.
        diverged: trials of the search that were pruned or failed because a metric or a loss was not finite.
        negative_transfer: pruned trials that were clearly worse than the same student without a teacher.
        paused: trials of the search that the budget ended at their last report; a larger budget continues them.
        failed: failed trials of the search.
        confirmations_done: finished confirmations, whether complete or not.
        confirmations_planned: exact after the search, a maximum before.
        finished: whether nothing runs and nothing is left, or the budget is spent.
    """

    planned: int = 0
    running: int = 0
    complete: int = 0
    pruned: int = 0
    diverged: int = 0
    negative_transfer: int = 0
    paused: int = 0
    failed: int = 0
    confirmations_done: int = 0
    confirmations_planned: int = 0
    finished: bool = False

    @property
    def done(self) -> int:
        """Number of trials that have ended, including confirmations."""
        return self.complete + self.pruned + self.failed + self.confirmations_done

    @property
    def total(self) -> int:
        """Total number of trials, including confirmations."""
        return self.planned + self.confirmations_planned
