"""Search algorithm and scheduler of Ray Tune that follow the study."""

from __future__ import annotations

from collections.abc import Callable

from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.oom_kills import oom_kills
from heterokd.execution.ray_settings import Trial, TuneController, ray, tune
from heterokd.storage.trial_status import OUT_OF_MEMORY


def trial_name(trial: Trial) -> str:
    """Return a trial's id as its name; Tune's default names contain the whole configuration."""
    return str(trial.trial_id)


class StudySearcher(tune.search.Searcher):  # type: ignore[misc]  # Ray is not fully typed
    """Suggests the trials that the study chooses: samples, repetitions, trials to resume."""

    def __init__(
        self, actor: ray.actor.ActorHandle, failures: FailureLimit, count_kills: Callable[[], int] = oom_kills
    ) -> None:
        super().__init__()
        self._count_kills, self._kills = count_kills, count_kills()
        self.actor = actor
        self.failures = failures
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, int] | str | None:
        """Return the next trial's number; None to wait; FINISHED at the end of the search."""
        assignment = ray.get(self.actor.next.remote())
        if assignment is None:
            return str(tune.search.Searcher.FINISHED)
        if assignment == "wait":
            return None
        self.numbers[trial_id] = assignment.number
        self.failures.begin(assignment.number)
        # Only the number, since Tune copies and keeps configurations; the trial gets the rest from the actor.
        return {"number": assignment.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, object] | None = None, error: bool = False) -> None:
        """Record the failure of a trial whose process died more often than `search.max_failures`."""
        number = self.numbers.pop(trial_id, None)
        if error and number is not None:
            self.failures.add(number)
        # Where no trial can run, the trial is not at fault: it is kept for the next start of the search.
        if error and number is not None and not self.failures.is_reached:
            ray.get(self.actor.died.remote(number, self._cause()))

    def _cause(self) -> str:
        """Describe the death of a trial's process, which left no exception."""
        kills = self._count_kills()
        if kills > self._kills:
            self._kills = kills
            return (
                f"{OUT_OF_MEMORY}: the kernel killed the trial's process; free memory, or train less at a time "
                "(search.parallel, training.batch_size)"
            )
        return "the trial's process died (killed, or out of memory); see Ray's logs of its node"

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study's database is the state."""


class InOrder(tune.schedulers.FIFOScheduler):  # type: ignore[misc]
    """First in, first out, without looping over the trials that have ended."""

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """Return a pending trial, or None."""
        waiting = (trial for trial in tune_controller.get_live_trials() if trial.status == "PENDING")
        return next(waiting, None)
