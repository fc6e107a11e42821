"""Deadlines: which running trials exceed `search.trial_timeout`, or do not end although the budget is spent.

A trial that hangs reports nothing, so no report can stop it. All times are of a clock that the caller gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from heterokd.formatting import format_duration
from heterokd.storage.machine_load import under_load
from heterokd.storage.trial_status import TIMED_OUT
from heterokd.study.assignment import BUDGET
from heterokd.study.options import StudyOptions

FACTOR = 10.0
"""Default limit in units of the time that a whole training should take."""

LEAST_SECONDS = 600.0
"""Minimum of the default limit: a machine under load, or a cache that a trial builds first, delays short trainings.
Longer on a busy machine."""

GRACE_SECONDS = 60.0
"""Minimum time between the end of the budget and the end of a trial that does not report; longer on a busy machine."""

GAPS = 2.0
"""Time between the end of the budget and the end of a trial, in units of the longest time between its epochs."""

Timeout = float | Literal["auto"] | None
"""Maximum seconds of a trial; auto: `FACTOR` times the expected time; None: no limit."""


@dataclass(frozen=True)
class Expired:
    """A trial that is to be stopped.

    Attributes:
        number: number of the trial.
        reason: `TIMED_OUT` or `BUDGET`.
        sentence: what happened, and what to do.
    """

    number: int
    reason: str
    sentence: str


@dataclass
class _Running:
    """Times of a running trial: its start, its last sign of life, and the longest time between two of these.

    `has_started`: whether its process has begun, which may wait for resources.
    """

    method: str
    began: float
    seen: float
    gap: float = 0.0
    has_started: bool = False


class Deadlines:
    """Times of the running trials.

    Args:
        timeout: `search.trial_timeout`.
        options: clock, planned seconds of the longest training, and the load of the machine.
    """

    def __init__(self, timeout: Timeout, options: StudyOptions) -> None:
        self._timeout, self._expected = timeout, options.trial_seconds
        self._clock, self._load = options.clock, options.load
        self._running: dict[int, _Running] = {}
        self._took: dict[str, float] = {}
        self._spent_at: float | None = None

    def begin(self, number: int, method: str) -> None:
        """Register a trial; its time limit starts with its process, see `started`."""
        now = self._clock()
        self._running[number] = _Running(method, began=now, seen=now)

    def started(self, number: int) -> None:
        """Start the time of a running trial again: its process has begun."""
        if number in self._running:
            self.begin(number, self._running[number].method)
            self._running[number].has_started = True

    def seen(self, number: int) -> None:
        """Record a sign of life: an epoch has ended."""
        trial, now = self._running.get(number), self._clock()
        if trial is not None:
            trial.gap, trial.seen = max(trial.gap, now - trial.seen), now

    def end(self, number: int, *, complete: bool) -> None:
        """Forget a trial that has ended; a complete one shows how long trainings of its method take."""
        trial = self._running.pop(number, None)
        if trial is not None and complete:
            self._took[trial.method] = max(self._took.get(trial.method, 0.0), self._clock() - trial.began)

    def limit(self, method: str) -> float | None:
        """Return the maximum seconds of a trial; None if there is no limit, or nothing is known."""
        if self._timeout != "auto":
            return self._timeout
        known = [each for each in (self._expected, self._took.get(method)) if each is not None]
        return max(under_load(LEAST_SECONDS, self._load), FACTOR * max(known)) if known else None

    def expired(self, *, is_spent: bool) -> Iterator[Expired]:
        """Return the trials to stop; `is_spent`: whether the search's budget is spent."""
        now = self._clock()
        if not is_spent:
            self._spent_at = None
        elif self._spent_at is None:
            self._spent_at = now
        for number, trial in self._running.items():
            limit = self.limit(trial.method)
            # The default limit ends no trial that goes on, however slowly.
            since = trial.seen if self._timeout == "auto" else trial.began
            if limit is not None and trial.has_started and now - since > limit:
                what = "no epoch ended" if self._timeout == "auto" else "the trial did not end"
                sentence = (
                    f"TrialTimeout: {what} in {format_duration(limit)}, so it was stopped; raise search.trial_timeout"
                )
                yield Expired(number, TIMED_OUT, f"{sentence} if it needs longer")
            elif self._spent_at is not None:
                grace = max(under_load(GRACE_SECONDS, self._load), GAPS * trial.gap)
                if now - max(self._spent_at, trial.seen) > grace:
                    yield Expired(number, BUDGET, "the budget was spent, and the trial did not report")
