"""Spending: what a search has cost, and whether another training fits its budget.

All limits are converted to the same unit, the full training: the total that a limit allows is the number of trainings
so far, divided by the share of the limit that they used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from heterokd.config.search import BudgetSettings

HOUR = 3600.0

TOLERANCE = 1e-9
"""Rounding error of sums of shares of a training."""

LEAST_KNOWN = 0.5
"""Minimum of full trainings before a limit of time is converted to trainings."""


@dataclass
class Spending:
    """What has been spent; the caller of `pass_time` measures the time.

    Attributes:
        budget: limits.
        devices: GPUs of a training, which may be a fraction.
        search: full trainings of starts and samples that have ended.
        confirmation: full trainings of repetitions that have ended.
        begun: number of trainings that have started.
        seconds: wall-clock time during which trainings ran.
        device_seconds: device time of trainings.
    """

    budget: BudgetSettings
    devices: float = 1.0
    search: float = 0.0
    confirmation: float = 0.0
    begun: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0

    @property
    def trainings(self) -> float:
        """Full trainings that have ended, of all kinds."""
        return self.search + self.confirmation

    @property
    def money(self) -> float | None:
        """Cost in the price's currency; None without a price."""
        price = self.budget.price
        return None if price is None else price * self.device_seconds / HOUR

    def pass_time(self, seconds: float, running: int) -> None:
        """Add a time during which `running` trainings ran."""
        self.seconds += seconds
        self.device_seconds += seconds * running * self.devices

    def is_exhausted(self) -> bool:
        """Return whether a limit of time or of trainings is reached; running trials then end at their next report."""
        if self.budget.trainings is not None and self.trainings >= self.budget.trainings - TOLERANCE:
            return True
        return any(spent >= limit for spent, limit in self._times())

    def fits(self, running: int, underway: float) -> bool:
        """Return whether another full training can end within all limits.

        `underway` are the full trainings that the `running` trials, each of which may become full, have done so far.
        """
        budget = self.budget
        if self.is_exhausted() or (budget.trials is not None and self.begun >= budget.trials):
            return False
        if budget.trainings is not None and self.trainings + running + 1 > budget.trainings + TOLERANCE:
            return False
        if self.trainings + underway < LEAST_KNOWN:
            return True  # the cost of a training is unknown yet
        each = self.device_seconds / (self.trainings + underway)
        if budget.hours is not None and self.seconds + each / self.devices > HOUR * budget.hours:
            return False
        needed = self.device_seconds + each * (running - underway + 1)
        return all(needed <= limit for _, limit in self._device_times())

    def total(self, underway: float) -> float | None:
        """Return the total number of full trainings within all limits; None: no limit, or not known yet."""
        found = [] if self.budget.trainings is None else [self.budget.trainings]
        done = self.trainings + underway
        if done >= LEAST_KNOWN:
            used = [spent / limit for spent, limit in self._times()]
            if self.budget.trials is not None:
                used.append(self.begun / self.budget.trials)
            found += [done / share for share in used if share > 0]
        return min(found, default=None)

    def as_dict(self) -> dict[str, float | None]:
        """Return what was spent, by the keys of `search.budget`."""
        return {
            "trials": self.begun,
            "trainings": round(self.trainings, 3),
            "hours": self.seconds / HOUR,
            "gpu_hours": self.device_seconds / HOUR,
            "money": self.money,
        }

    def _times(self) -> Iterator[tuple[float, float]]:
        if self.budget.hours is not None:
            yield self.seconds, HOUR * self.budget.hours
        yield from self._device_times()

    def _device_times(self) -> Iterator[tuple[float, float]]:
        if self.budget.gpu_hours is not None:
            yield self.device_seconds, HOUR * self.budget.gpu_hours
        if self.budget.money is not None and self.budget.price is not None:
            yield self.device_seconds, HOUR * self.budget.money / self.budget.price
