"""Search algorithm and scheduler of Ray Tune that follow the study."""

from __future__ import annotations

from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.parallel import Parallelism, TrialConfig
from heterokd.execution.ray_settings import Trial, TuneController, ray, tune
from heterokd.execution.trial_deaths import TrialDeaths


def trial_name(trial: Trial) -> str:
    """Return a trial's id as its name; Tune's default names contain the whole configuration."""
    return str(trial.trial_id)


class StudySearcher(tune.search.Searcher):  # type: ignore[misc]  # Ray is not fully typed
    """Suggests the trials that the study chooses: samples, repetitions, trials to resume or to run elsewhere."""

    def __init__(
        self, actor: ray.actor.ActorHandle, failures: FailureLimit, deaths: TrialDeaths, plan: Parallelism
    ) -> None:
        super().__init__()
        self.actor = actor
        self.failures = failures
        self.deaths = deaths
        self.plan = plan
        self.numbers: dict[str, int] = {}

    @property
    def running(self) -> list[int]:
        """Numbers of the trials that Tune runs."""
        return list(self.numbers.values())

    def forget(self, number: int) -> None:
        """Forget a trial that runs again on another node, before Tune ends it."""
        self.numbers = {trial: known for trial, known in self.numbers.items() if known != number}

    def suggest(self, trial_id: str) -> TrialConfig | str | None:
        """Return the next trial's config; None to wait; FINISHED at the end of the search."""
        if len(self.numbers) >= self.plan.cluster.parallel:
            return None
        assignment = ray.get(self.actor.next.remote(self.running))
        if assignment is None:
            return str(tune.search.Searcher.FINISHED)
        if assignment == "wait":
            return None
        self.numbers[trial_id] = assignment.number
        self.failures.begin(assignment.number)
        self.deaths.begin(assignment.number)
        # No more, since Tune copies and keeps configurations; the trial gets the rest from the actor.
        avoided: list[str] = ray.get(self.actor.avoided.remote())
        config = TrialConfig(number=assignment.number, cluster=self.plan.cluster)
        return {**config, "avoid": avoided} if avoided else config

    def on_trial_complete(self, trial_id: str, result: dict[str, object] | None = None, error: bool = False) -> None:
        """Forget a trial, and count the death of its process; `TuneCallback` decides what becomes of the trial."""
        number = self.numbers.pop(trial_id, None)
        if error and number is not None:
            self.failures.add(number)

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
