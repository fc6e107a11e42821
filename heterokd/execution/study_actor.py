"""StudyActor: the Ray actor that holds a search's study.

A separate module that imports neither torch nor Ray Tune, which would take half a gigabyte until the search ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from heterokd.config.experiment import Experiment
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import Assignment
from heterokd.study.search_space import SearchSpace
from heterokd.study.study import Study, StudyOptions
from heterokd.study.summary import StudySummary


class StudyActor:
    """Decides for a search; trials and Ray Tune call it."""

    def __init__(
        self, experiment: str, folder: Path, space: SearchSpace, devices: float = 1.0, before: float = 0.0
    ) -> None:
        """Open the study, which exists.

        Args:
            experiment: the experiment, as JSON.
            folder: the study's folder.
            space: the study's search space.
            devices: number of devices per trial.
            before: seconds that this search has already taken on a device (its teacher's fit).
        """
        self.study = Study.open(
            Experiment.model_validate_json(experiment),
            StudyFolder(folder),
            StudyOptions(devices=devices, space=space),
        )
        self.study.spending.pass_time(before, running=1)
        self.running: dict[int, Assignment] = {}

    def next(self) -> Assignment | Literal["wait"] | None:
        """Return the next training to run."""
        following = self.study.next()
        if isinstance(following, Assignment):
            self.running[following.number] = following
        return following

    def assignment(self, number: int) -> Assignment | None:
        """Return the assignment of a running trial; None if the trial has already finished."""
        return self.running.get(number)

    def report(self, number: int, epoch: int, metrics: dict[str, float], curve: list[dict[str, float]]) -> bool:
        """Record a trial's metrics at a rung; return whether it continues."""
        return self.study.report(number, epoch, metrics, curve)

    def why(self, number: int) -> str | None:
        """Return why a trial was stopped."""
        return self.study.why(number)

    def finish(self, number: int, status: TrialStatus, metrics: dict[str, float], error: str | None) -> None:
        """Record the end of a trial."""
        self.study.finish(number, status, metrics, error)
        self.running.pop(number, None)

    def summary(self) -> StudySummary:
        """Summarise the study so far."""
        return self.study.summary()
