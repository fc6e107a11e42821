"""How far a study is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is. `planned = complete + pruned + failed + paused +` those still running or to come.

    Attributes:
        planned: trainings of the search, confirmations apart; an estimate where a budget decides.
        running: handed out and not finished, confirmations included.
        complete: of the search, trained to the end.
        pruned: of the search, stopped at a rung.
        diverged: of the search, pruned or failed because a metric or a loss was no number.
        negative_transfer: of those pruned, clearly worse than the same student trained on labels alone.
        paused: of the search, ended by the budget at their last report; a larger budget goes on with them.
        failed: of the search.
        confirmations_done: finished, in whatever way.
        confirmations_planned: exact once the search is over, the most that can be before.
        finished: nothing runs and nothing is left, or the budget is spent.
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
        """Trainings that have ended, confirmations included."""
        return self.complete + self.pruned + self.failed + self.confirmations_done

    @property
    def total(self) -> int:
        """Trainings in all, confirmations included."""
        return self.planned + self.confirmations_planned
