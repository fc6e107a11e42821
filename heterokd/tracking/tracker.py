"""Tracker: what shows a study elsewhere, from its folders. Ours is MLflow (`StudyRuns`); `tracking.also` adds others.

    class Printer:
        def __init__(self, experiment, folder): ...
        def sync(self, trial): print(trial.number, trial.metrics()[-1:]); return True
        def finish(self, summary, status="FINISHED"): return True

The folders are the truth, and a tracker copies them: what it missed, it finds there at its next call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from heterokd.config.experiment import Experiment
from heterokd.errors import ConfigError
from heterokd.extensions import load_named
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.study.summary import StudySummary

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

SHIPPED = {"csv": "heterokd.tracking.csv:CsvTracker"}
"""Trackers that `tracking.also` names shortly."""


class Tracker(Protocol):
    """Copies a study's folders to a service or a file. The driver alone calls it, from one thread at a time.

    Called again with what it has seen, after a resume also by a new object: it writes nothing twice.
    """

    def sync(self, trial: TrialFolder) -> bool:
        """Copy what is new of a trial, which started, reported or ended; whether all of it was taken."""
        ...

    def finish(self, summary: StudySummary | None, status: Status = "FINISHED") -> bool:
        """Copy what is new of all trials, then close the study; whether all of it was taken."""
        ...


class Trackers:
    """Several trackers as one: MLflow, whose answers count, and others, which cannot disturb it or a trial.

    Args:
        first: whose answers are returned.
        others: by name, trackers of anybody: what they raise is logged, once until they work again.
    """

    def __init__(self, first: Tracker, others: Mapping[str, Tracker]) -> None:
        self.first, self.others = first, others
        self.failing: set[str] = set()

    def sync(self, trial: TrialFolder) -> bool:
        """See `Tracker`."""
        if (trial.path / "recipe.yaml").exists():  # its process may be just making the folder
            self._try_others(lambda tracker: tracker.sync(trial))
        return self.first.sync(trial)

    def finish(self, summary: StudySummary | None, status: Status = "FINISHED") -> bool:
        """See `Tracker`."""
        self._try_others(lambda tracker: tracker.finish(summary, status))
        return self.first.finish(summary, status)

    def _try_others(self, call: Callable[[Tracker], bool]) -> None:
        for name, tracker in self.others.items():
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001  no fault of a tracker may cost a trial
                if name not in self.failing:
                    logger.warning("tracking.also: %s failed (%s: %s)", name, type(error).__name__, error)
                self.failing.add(name)
            else:
                self.failing.discard(name)


def with_others(first: Tracker, experiment: Experiment, folder: StudyFolder) -> Trackers:
    """Add the trackers that an experiment names.

    Args:
        first: MLflow's.
        experiment: its `tracking.also` names classes that take an experiment and the folder of its study.
        folder: of the study.

    Raises:
        ConfigError: there is no such class, or it cannot be constructed.
    """
    return Trackers(first, {name: _construct(name, experiment, folder) for name in experiment.tracking.also})


def _construct(name: str, experiment: Experiment, folder: StudyFolder) -> Tracker:
    tracker_class = load_named(SHIPPED.get(name, name), "tracking.also", known=tuple(SHIPPED))
    try:
        tracker: Tracker = tracker_class(experiment, folder)
    except Exception as error:
        raise ConfigError(
            f"tracking.also: {name} cannot be constructed ({type(error).__name__}: {error}); mend it, or leave it out"
        ) from error
    return tracker
