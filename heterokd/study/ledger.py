"""Ledger: the costs of a study's trainings so far, and which of them are running."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from heterokd.config.experiment import Experiment
from heterokd.formatting import classes_of
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.budget import Spending
from heterokd.study.trials import TrialRecord, Trials


class Ledger:
    """Costs of a study; those of earlier runs are read from its trials.

    Attributes:
        spending: what has been spent.
        running: numbers of the running trials.
    """

    def __init__(self, experiment: Experiment, trials: Trials, clock: Callable[[], float], devices: float) -> None:
        self.spending = Spending(experiment.search.budget, devices)
        self.running: set[int] = set()
        self._metric = experiment.metric
        self._trials, self._least = trials, experiment.search.first_rung
        self._clock, self._last = clock, clock()
        for record in (*trials.search, *trials.repetitions()):
            self.spending.begun += 1
            if record.status.is_final:
                self._pay(record)
            self.spending.seconds = max(self.spending.seconds, trials.cost(record.number, "seconds"))
            device_seconds = trials.cost(record.number, "device_seconds")
            self.spending.device_seconds = max(self.spending.device_seconds, device_seconds)

    def pass_time(self) -> None:
        """Add the time since the last call for all running trials."""
        now = self._clock()
        if self.running:
            self.spending.pass_time(max(now - self._last, 0.0), len(self.running))
        self._last = now

    def begin(self, number: int) -> None:
        """Add a trial that starts."""
        self.running.add(number)
        self.spending.begun = len(self._trials.search) + sum(1 for _ in self._trials.repetitions())

    def end(self, record: TrialRecord, status: TrialStatus, metrics: Mapping[str, float]) -> None:
        """Add the costs of a trial that has ended or was paused; write them and its classes to the database."""
        trained = self._trained(record, status, metrics)
        if status.is_final:
            record.trained = trained
            self._pay(record)
        costs = {"trained": trained, "seconds": self.spending.seconds, "device_seconds": self.spending.device_seconds}
        record.iou_classes = classes_of(self._metric, metrics)
        counted = {"iou_classes": list(record.iou_classes)} if record.iou_classes else {}
        self._trials.set_attr(record.number, "ended", {"status": str(status), **costs, **counted})

    def underway(self) -> float:
        """Return the full trainings that the running trials have done until their last report."""
        return math.fsum(record.reached / record.epochs for record in map(self._trials.__getitem__, self.running))

    def searched(self) -> float:
        """Return the full trainings of the search, counting each running trial as a full one."""
        return self.spending.search + sum(self._trials[number].origin != "confirm" for number in self.running)

    def fits(self) -> bool:
        """Return whether another full training can end within the budget."""
        return self.spending.fits(len(self.running), self.underway())

    def total(self) -> float | None:
        """Return the total number of full trainings within the budget; None: no limit, or not known yet."""
        return self.spending.total(self.underway())

    def _trained(self, record: TrialRecord, status: TrialStatus, metrics: Mapping[str, float]) -> float:
        """Return the epochs of a training; a failure at the start is not free, or such a search would not end."""
        if status == TrialStatus.COMPLETE:
            return float(record.epochs)
        epochs = max(float(metrics.get("epoch", 0)), float(record.reached))
        return max(epochs, self._least * record.epochs)

    def _pay(self, record: TrialRecord) -> None:
        part = record.trained / record.epochs
        if record.origin == "confirm":
            self.spending.confirmation += part
        else:
            self.spending.search += part
