"""RankedConfig: a configuration that was trained to the end, and the Pareto front of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterokd.domains import Scalar
from heterokd.formatting import format_classes, format_interval, format_score
from heterokd.methods import BASELINE


@dataclass(frozen=True)
class RankedConfig:
    """A configuration: the trial that found it and its confirmations. A value that is not finite is None.

    Attributes:
        number: number of the trial that found it.
        method: name of the method.
        sample: values of its parameters.
        origin: origin of the sample, see `Assignment`.
        search_value: metric of the trial that found it. The best of many noisy values is biased, so the mean of a
            confirmed configuration excludes it.
        values: metric on each fresh seed; the search value alone if it is not confirmed.
        seeds: seeds of `values`.
        numbers: trials of `values`.
        mean: mean of `values`; None if a value is None.
        low: lower end of the mean's 95 % interval; None if no configuration has two confirmations.
        high: upper end.
        expected: posterior mean: all values, shrunk towards those of the study's better configurations (with similar
            first epochs), more with a larger variance over seeds. Unlike the best of several means, it is not biased.
            Studies of the first versions do not have it.
        expected_deviation: posterior standard deviation, or None.
        confirmed: whether `values` are from fresh seeds.
        iou_classes: distinct numbers of classes in the mean that an mIoU of `values` is, ascending; empty for other
            metrics and in studies of earlier versions.
        student: name of the network; studies of the first versions do not have it.
    """

    number: int
    method: str
    sample: dict[str, Scalar]
    origin: str
    search_value: float | None
    values: tuple[float | None, ...]
    seeds: tuple[int, ...]
    numbers: tuple[int, ...]
    mean: float | None
    low: float | None = None
    high: float | None = None
    expected: float | None = None
    expected_deviation: float | None = None
    confirmed: bool = False
    student: str = ""
    iou_classes: tuple[int, ...] = ()

    @property
    def half_width(self) -> float | None:
        """Half width of the 95 % interval, the larger side if it is clipped to the metric's range; None without it."""
        if self.low is None or self.high is None or self.mean is None:
            return None
        return max(self.mean - self.low, self.high - self.mean)

    @property
    def score(self) -> str:
        """The mean as text, for an mIoU with its number of classes: `0.4312 (8 classes)`."""
        return f"{format_score(self.mean)}{format_classes(self.iou_classes)}"

    @property
    def interval(self) -> str:
        """The 95 % interval as text: `0.9462 to 0.9792`; "" without it."""
        return "" if self.low is None or self.high is None else format_interval(self.low, self.high)

    @property
    def evidence(self) -> str:
        """The trainings of `mean`: `2 fresh seeds`, or `one seed` for the value of the search."""
        count = len(self.seeds)
        return f"{count} fresh seed{'' if count == 1 else 's'}" if self.confirmed else "one seed"

    @property
    def bounds(self) -> str:
        """Interval and trainings, as in a table: `0.9462 to 0.9792, 2 fresh seeds`."""
        return ", ".join(filter(None, (self.interval, self.evidence)))

    @property
    def estimate(self) -> str:
        """Mean, interval and trainings: `0.9627 (95 % interval 0.9462 to 0.9792, 2 fresh seeds)`.

        The page, MLflow, the registry and the model card contain this text; the terminal has no place for its words.
        """
        return f"{self.score} ({'95 % interval ' if self.interval else ''}{self.bounds})"


def scratch_of(ranked: Sequence[RankedConfig], *, by_student: bool) -> RankedConfig | None:
    """Return the best configuration without a teacher.

    Args:
        ranked: configurations, best first.
        by_student: costs are objectives, so students are not compared with each other: it is that of the winner's
            student, if there is one.
    """
    found = [config for config in ranked if config.method == BASELINE]
    same = [config for config in found if by_student and config.student == ranked[0].student]
    return next(iter([*same, *found]), None)


def pareto_front(
    ranked: Sequence[RankedConfig], students: Mapping[str, Mapping[str, float]], objectives: Sequence[str]
) -> list[RankedConfig]:
    """Return the best configuration of each student that no other dominates, best metric first.

    `ranked` are configurations, best first; `students` their students' costs, of which `objectives` count.
    """

    def costs_of(config: RankedConfig) -> list[float]:
        known = students.get(config.student, {})
        return [known.get(key, math.inf) for key in objectives]

    front: list[RankedConfig] = []
    for config in ranked:
        # A later configuration has no better metric: each earlier one must exceed it in some cost.
        costs = costs_of(config)
        if config.student not in [member.student for member in front] and all(
            any(mine < other for mine, other in zip(costs, costs_of(member), strict=True)) for member in front
        ):
            front.append(config)
    return front
