"""RankedConfig: a configuration that was trained to the end, and the Pareto front of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterokd.domains import Scalar


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
