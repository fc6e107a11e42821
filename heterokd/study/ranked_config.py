"""RankedConfig: one configuration that was trained to the end, and the Pareto front of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterokd.domains import Scalar


@dataclass(frozen=True)
class RankedConfig:
    """One configuration: the trial that found it and its confirmations. A value that is not finite is None.

    Attributes:
        number: the trial that found it.
        method: its method.
        sample: its values.
        origin: how it came up.
        search_value: the metric of the trial that found it. The best of many noisy values overstates its
            configuration, so the mean of a confirmed one leaves it out.
        values: the metric on each fresh seed; the search value alone as long as it is not confirmed.
        seeds: of `values`.
        numbers: trials of `values`.
        mean: of `values`; None where one of them is.
        low: lower end of the mean's 95 % interval; None without two confirmations of any one configuration.
        high: upper end.
        expected: the value to expect of one more training: all values, shrunk towards what the better configurations
            of the study reach (those whose first epochs were like its own) by as much as seeds scatter. The best of
            several means overstates it; this does not. Studies of the first versions do not have it.
        expected_deviation: how sure that is; None when nothing can be said.
        confirmed: whether `values` are fresh.
        student: the network; studies of the first versions do not name it.
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

    @property
    def half_width(self) -> float | None:
        """Half width of the 95 % interval, the larger side where the metric's range cuts it; None without one."""
        if self.low is None or self.high is None or self.mean is None:
            return None
        return max(self.mean - self.low, self.high - self.mean)


def pareto_front(
    ranked: Sequence[RankedConfig], facts: Mapping[str, Mapping[str, float]], costs: Sequence[str]
) -> list[RankedConfig]:
    """The best of each student, without those that another one beats or equals in everything; best metric first.

    Args:
        ranked: best first.
        facts: by student, what it costs.
        costs: keys of the facts that count.
    """
    members: list[RankedConfig] = []
    for config in ranked:
        # Whoever comes later has no better metric: it must cost less of something than each who came before.
        mine = facts.get(config.student, {})
        if config.student not in [member.student for member in members] and all(
            any(mine.get(cost, math.inf) < facts.get(member.student, {}).get(cost, math.inf) for cost in costs)
            for member in members
        ):
            members.append(config)
    return members
