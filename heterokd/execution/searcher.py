"""Ray Tune's view of a study: what runs next, in which order."""

from __future__ import annotations

from typing import Any

from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.ray_settings import ray, tune
from heterokd.storage.trial_status import TrialStatus


def _name_trial(trial: Any) -> str:
    """Tune's own names hold the whole configuration, which makes unusable folders."""
    return str(trial.trial_id)


class StudySearcher(tune.search.Searcher):  # type: ignore[misc]  # Ray is not fully typed
    """Tune's view of the study: whatever runs next is its suggestion."""

    def __init__(self, judge: Any, deaths: FailureLimit) -> None:
        super().__init__()
        self.judge = judge
        self.deaths = deaths
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next assignment, nothing for the moment, or the end."""
        assignment = ray.get(self.judge.next.remote())
        if assignment is None:
            return str(tune.search.Searcher.FINISHED)
        if assignment == "wait":
            return None
        self.numbers[trial_id] = assignment.number
        self.deaths.begin(assignment.number)
        # Its number alone: Tune copies and keeps what it is given; the trial asks the judge for the rest.
        return {"number": assignment.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial whose process died more often than `search.max_failures` never told the judge itself."""
        number = self.numbers.pop(trial_id, None)
        if error and number is not None:
            self.deaths.add()
        # Where none can live it is not the trial that failed: it is kept for another start of the search.
        if error and number is not None and not self.deaths.are_hopeless:
            message = "the trial's process died (killed, or out of memory); see Ray's logs of its node"
            ray.get(self.judge.finish.remote(number, TrialStatus.FAILED, {}, message))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study's database is the state."""


class _InOrder(tune.schedulers.FIFOScheduler):  # type: ignore[misc]
    """Tune's own order, without looking through the trials that have ended."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """A trial that waits for its place, if there is one."""
        waiting = (trial for trial in tune_controller.get_live_trials() if trial.status == "PENDING")
        return next(waiting, None)
