"""Tracker: interface of MLflow (`StudyRuns`) and of the other trackers that `tracking.also` names.

    class Printer:
        def __init__(self, experiment, folder): ...
        def sync(self, trial): print(trial.number, trial.metrics()[-1:]); return True
        def finish(self, summary, status="FINISHED"): return True

A tracker copies the study's folders: whatever it missed is still there at its next call.
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
"""Short names in `tracking.also`."""


class Tracker(Protocol):
    """Copies a study's folders to a service or a file; only the driver calls it, from a single thread at a time.

    Calls are repeated, after a resume on a new object: an implementation must not log anything twice.
    """

    def sync(self, trial: TrialFolder) -> bool:
        """Copy what is new of a trial that started, reported or ended; return whether everything was stored."""
        ...

    def finish(self, summary: StudySummary | None, status: Status = "FINISHED") -> bool:
        """Copy what is new of all trials, then close the study; return whether everything was stored."""
        ...


class Trackers:
    """Calls MLflow and additional trackers, whose errors disturb neither MLflow nor a trial.

    Args:
        first: tracker whose results are returned.
        others: additional trackers by name; an error is logged once until the tracker works again.
    """

    def __init__(self, first: Tracker, others: Mapping[str, Tracker]) -> None:
        self.first, self.others = first, others
        self.failing: set[str] = set()

    def sync(self, trial: TrialFolder) -> bool:
        """See `Tracker`."""
        if (trial.path / "recipe.yaml").exists():  # its process may be creating the folder
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
    """Combine MLflow's tracker with the classes that `tracking.also` names.

    Args:
        first: MLflow's tracker.
        experiment: the experiment; each class is called with it and the study's folder.
        folder: the study's folder.

    Raises:
        ConfigError: there is no such class, or it cannot be constructed.
    """
    return Trackers(first, {name: _construct(name, experiment, folder) for name in experiment.tracking.also})


def check_trackers(experiment: Experiment) -> None:
    """Import the classes that `tracking.also` names, before work begins.

    Raises:
        ConfigError: there is no such class.
    """
    for name in experiment.tracking.also:
        _tracker_class(name)


def _construct(name: str, experiment: Experiment, folder: StudyFolder) -> Tracker:
    tracker_class = _tracker_class(name)
    try:
        tracker: Tracker = tracker_class(experiment, folder)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"tracking.also: {name} cannot be constructed ({reason}); fix it, or leave it out") from error
    return tracker


def _tracker_class(name: str) -> Callable[[Experiment, StudyFolder], Tracker]:
    found: Callable[[Experiment, StudyFolder], Tracker] = load_named(
        SHIPPED.get(name, name), "tracking.also", known=tuple(SHIPPED)
    )
    if not callable(found):
        raise ConfigError(f"tracking.also: {name} is not a class; give the name of a tracker's class")
    return found
