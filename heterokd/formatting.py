"""Format metric names, scores, durations, sizes and parameter values.

The terminal, the report and the registry use the same wording. No heavy module is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from heterokd import __version__

METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "macro_f1": "macro F1", "auroc": "AUROC"} | {
    "dice": "Dice",
    "mean_accuracy": "mean accuracy of classes",
    "boundary_iou": "mIoU at boundaries",
    "iou_classes": "classes in the mean",
}
"""Printed names of metrics, where they differ from the key."""

SCORES = ("top1", "miou")
"""Metrics that an epoch is reported by, in order of preference."""

IOU_CLASSES = "val/iou_classes"
"""Metric key of the number of classes in the mean of mIoU."""

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""Bytes per unit."""


class Estimate(Protocol):
    """An expected value with its 90 % interval."""

    @property
    def expected(self) -> float:
        """Most likely value."""
        ...

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        ...

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        ...


def metric_name(metric: str) -> str:
    """Name a metric without its split.

    >>> metric_name("val/miou"), metric_name("test/pixel_accuracy")
    ('mIoU', 'pixel accuracy')
    """
    key = metric.rsplit("/", 1)[-1]
    return METRIC_NAMES.get(key, key.replace("_", " "))


def epoch_score(metrics: Mapping[str, float]) -> str:
    """Format the score of an epoch on val: `top-1 0.9123` or `mIoU 0.4312 (8 classes)`."""
    key = next(key for score in SCORES if (key := f"val/{score}") in metrics)
    return f"{metric_name(key)} {format_score(metrics[key])}{classes_in_mean(key, metrics)}"


def classes_in_mean(metric: str, metrics: Mapping[str, float]) -> str:
    """Return ` (8 classes)` if the metric is an mIoU on val, whose mean is over that many classes; else nothing."""
    return format_classes(classes_of(metric, metrics))


def classes_of(metric: str, metrics: Mapping[str, float]) -> tuple[int, ...]:
    """Return the number of classes in the mean of an mIoU on val; nothing for other metrics."""
    counted = metrics.get(IOU_CLASSES) if metric == "val/miou" else None
    return () if counted is None else (round(counted),)


def format_classes(counts: Sequence[int]) -> str:
    """Format the numbers of classes in one or several means of IoU.

    >>> [format_classes(counts) for counts in ((11,), (9, 11), ())]
    [' (11 classes)', ' (9 to 11 classes)', '']
    """
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f" ({low} classes)" if low == high else f" ({low} to {high} classes)"


def format_score(value: float | None) -> str:
    """Format a metric with four digits; None, as after a diverged repetition, is `none`."""
    return "none" if value is None else f"{value:.4f}"


def format_interval(low: float | None, high: float | None) -> str:
    """Format the two ends of a metric's interval."""
    return f"{format_score(low)} to {format_score(high)}"


def format_estimate(value: Estimate, show: Callable[[float], str]) -> str:
    """Format an estimate with its interval: `12 min 3 s (9 min 0 s to 16 min 2 s)`."""
    return f"{show(value.expected)} ({show(value.low)} to {show(value.high)})"


def format_percent(value: float) -> str:
    """Format a share in per cent."""
    return f"{100 * value:.2f} %"


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units.

    >>> [format_duration(value) for value in (4.24, 90, 3900, 205_000)]
    ['4.2 s', '1 min 30 s', '1 h 5 min', '2 d 8 h']
    """
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, spare = divmod(hours, 24)
    if days > 1:
        return f"{days} d {spare} h" if days < 7 else f"{days} d"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_hours(value: float) -> str:
    """Format hours with two significant digits; above ten, as an integer."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def format_size(count: float) -> str:
    """Format a number of bytes in decimal units.

    >>> format_size(12_300_000)
    '12.3 MB'
    """
    for unit, bytes_ in reversed(SIZES.items()):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count:.0f} B"


def format_sample(sample: Mapping[str, object]) -> str:
    """Format a sample's values in a line, without the method and the sections, except that of a network.

    >>> format_sample({"method": "kd", "kd.temperature": 4.0, "student.network": "resnet18"})
    'temperature 4, student resnet18'
    """
    parts = []
    for key, value in sample.items():
        if key != "method":
            shown = f"{value:.4g}" if isinstance(value, float) else value
            section, _, name = key.rpartition(".")
            parts.append(f"{section if name == 'network' else name} {shown}")
    return ", ".join(parts)


def join_words(words: Sequence[str]) -> str:
    """Join words with commas and `and`.

    >>> join_words(["kd", "dkd", "dist"])
    'kd, dkd and dist'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def package_version() -> str:
    """Version of the code that runs, which may differ from the installed version in a submitted job."""
    return __version__
