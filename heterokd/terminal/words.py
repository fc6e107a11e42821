"""Numbers as people say them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from heterokd.plan import Range
from heterokd.report import metric_name, show
from heterokd.tasks import TASKS

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def score_text(metrics: Mapping[str, float]) -> str:
    """The score of an epoch with its name: `top-1 0.9123` or `mIoU 0.4312`."""
    key = next(key for task in TASKS.values() if (key := f"val/{task.score}") in metrics)
    return f"{metric_name(key)} {show(metrics[key])}"


def span(value: Range, show: Callable[[float], str]) -> str:
    """A number with its range."""
    return f"about {show(value.expected)} ({show(value.low)} to {show(value.high)})"


def hours(value: float) -> str:
    """Hours with two digits that mean something."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit, bytes_ in reversed(SIZES.items()):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count:.0f} B"


def clock(seconds: float) -> str:
    """A duration as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
