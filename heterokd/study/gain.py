"""Gain of a configuration over another, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from heterokd.study.ranked_config import RankedConfig

Grade = Literal["significant", "likely", "tie", "likely worse", "worse", "unknown"]

LIKELY = 0.65
"""Half width of an 80 % interval divided by that of a 95 % interval."""


@dataclass(frozen=True)
class Gain:
    """Difference of two means, positive if the first is better.

    Attributes:
        difference: the difference.
        half_width: half width of its 95 % interval; None if the variance over seeds is unknown.
        is_fresh: whether both means are over fresh seeds; the value of the search is biased by its selection.
    """

    difference: float
    half_width: float | None
    is_fresh: bool

    @property
    def grade(self) -> Grade:
        """How sure the difference is.

        `significant` and `worse`: 0 is outside of the 95 % interval, and both means are over fresh seeds; `likely` and
        `likely worse`: 0 is outside of the 80 % interval; `tie`: it is inside; `unknown`: there is no interval.
        """
        if self.half_width is None:
            return "unknown"
        distance = abs(self.difference)
        if distance <= LIKELY * self.half_width:
            return "tie"
        if distance <= self.half_width or not self.is_fresh:
            return "likely" if self.difference > 0 else "likely worse"
        return "significant" if self.difference > 0 else "worse"

    @property
    def interval(self) -> str:
        """The 95 % interval in words, or "" if it is unknown."""
        if self.half_width is None:
            return ""
        low, high = self.difference - self.half_width, self.difference + self.half_width
        return f"95 % interval {low:+.4f} to {high:+.4f}"

    @property
    def verdict(self) -> str:
        """Difference, grade and interval: `+0.0345 (significant, 95 % interval +0.0112 to +0.0578)`."""
        grade = "noise unknown" if self.grade == "unknown" else self.grade
        parts = (grade, self.interval, "" if self.is_fresh else "from single seeds")
        return f"{self.difference:+.4f} ({', '.join(filter(None, parts))})"


def gain(first: RankedConfig, second: RankedConfig, *, maximise: bool) -> Gain | None:
    """Return the gain of the first configuration over the second; None if a mean is unknown.

    Both intervals come from the same pooled deviation and quantile, so the difference has the interval of two
    independent means.
    """
    if first.mean is None or second.mean is None:
        return None
    difference = first.mean - second.mean
    halves = first.half_width, second.half_width
    half = None if halves[0] is None or halves[1] is None else math.hypot(halves[0], halves[1])
    return Gain(difference if maximise else -difference, half, first.confirmed and second.confirmed)
