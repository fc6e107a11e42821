"""Draw the values of a search's trials in order, and their learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypedDict

from heterokd.report.figures.palette import STUDENT
from heterokd.report.figures.svg import FAILED, FAINT, LOOKS, SOFT, Vector, add_legend, new_axes
from heterokd.storage.trial_status import TrialStatus

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOTTED = (0, (1, 2))


@dataclass(frozen=True)
class Dot:
    """A trial.

    Attributes:
        number: number of the trial.
        mark: complete, pruned (whatever stopped it early) or failed.
        value: final value of the metric, or None.
        tip: tooltip.
    """

    number: int
    mark: TrialStatus
    value: float | None
    tip: str


@dataclass(frozen=True)
class Level:
    """A reference value.

    Attributes:
        label: name in the legend.
        value: value of the metric.
        look: key of `LOOKS`.
    """

    label: str
    value: float
    look: str


@dataclass(frozen=True)
class Curve:
    """The metric of a trial over its epochs.

    Attributes:
        epochs: finished epochs, counted from 1.
        values: metric after each of them.
        look: key of `LOOKS` for highlighted trials, `complete` or `pruned` for the others.
        label: name in the legend; "" for the others.
        tip: tooltip.
    """

    epochs: Sequence[float]
    values: Sequence[float]
    look: str
    label: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Scale:
    """Range of an axis: all complete trials and all references.

    Pruned trials do not widen it; those outside are drawn at its edge.
    """

    low: float
    high: float

    def clip(self, value: float, margin: float = 0.0) -> float:
        """Clip a value to the axis, `margin` (a share of its length) away from the ends."""
        edge = margin * (self.high - self.low)
        return min(max(value, self.low + edge), self.high - edge)


def scale(values: Sequence[float], others: Sequence[float] = ()) -> Scale:
    """Make a scale for `values` with a margin; `others` count if there are no values."""
    finite = [v for v in values if math.isfinite(v)] or [v for v in others if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = 0.07 * (high - low) or 0.02 * abs(high) or 0.01
    return Scale(low - margin, high + margin)


class _Mark(TypedDict, total=False):
    """Arguments of `Axes.scatter`."""

    marker: str
    s: float
    color: str
    facecolors: str
    edgecolors: str
    label: str


_BEYOND: _Mark = {"facecolors": "#A8A8A8", "edgecolors": "none", "s": 13, "label": "stopped early, off scale"}
_MARKS: dict[str, _Mark] = {
    "below": _BEYOND,
    "above": _BEYOND,
    TrialStatus.PRUNED: {"facecolors": "#FFFFFF", "edgecolors": "#8C8C8C", "s": 13, "label": "stopped early"},
    TrialStatus.COMPLETE: {"facecolors": SOFT, "edgecolors": "#FFFFFF", "s": 20, "label": "complete"},
    TrialStatus.FAILED: {"color": FAILED, "s": 22, "label": "failed", "marker": "x"},
}


def scatter(
    made: Vector, axes: Axes, dots: Sequence[Dot], shown: Scale, places: Mapping[int, float], *, upright: bool = True
) -> None:
    """Draw trials: complete ones filled, pruned ones hollow, failed ones as a cross.

    Args:
        made: the chart, for the tooltips.
        axes: to draw on.
        dots: the trials.
        shown: range of the metric's axis; a value outside is a triangle at its edge.
        places: position of each trial on the other axis, by its number.
        upright: whether the metric's axis is vertical.
    """
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for dot in dots:
        value = shown.low if dot.value is None or not math.isfinite(dot.value) else shown.clip(dot.value)
        kind: str = dot.mark
        if dot.mark == TrialStatus.PRUNED and value != dot.value:
            kind = "below" if value == shown.low else "above"
        # Two per cent inside the axis, so that the mark is fully visible.
        kinds.setdefault(kind, []).append((places[dot.number], shown.clip(value, 0.02), dot.tip))
    shapes = {"below": "v" if upright else "<", "above": "^" if upright else ">"}
    for kind, mark in _MARKS.items():
        if kind in kinds:
            across, along, tips = zip(*kinds[kind], strict=True)
            pair = (across, along) if upright else (along, across)
            look: _Mark = {"marker": shapes.get(kind, "o"), **mark}
            axes.scatter(*pair, gid=f"dots-{kind}", linewidths=0.9, zorder=3, clip_on=False, **look)
            made.tips[f"dots-{kind}"] = tips


def draw_history(made: Vector, dots: Sequence[Dot], levels: Sequence[Level], label: str, *, maximise: bool) -> None:
    """Draw the trials of a search in order of their start, and the best value so far.

    `label` is that of the metric's axis; `maximise`: whether larger is better.
    """
    from matplotlib.ticker import MaxNLocator

    known = [(dot.number, dot.value) for dot in dots if dot.value is not None]
    complete = [(dot.number, dot.value) for dot in dots if dot.mark == TrialStatus.COMPLETE and dot.value is not None]
    values = [value for _, value in complete]
    shown = scale(values + [level.value for level in levels], [value for _, value in known])
    with made.drawing(2.7) as figure:
        axes = new_axes(figure)
        if complete:
            best = list(accumulate(values, max if maximise else min))
            last = max(dot.number for dot in dots)
            axes.step([*(number for number, _ in complete), last], [*best, best[-1]], where="post", color=STUDENT,
                      label="best so far", zorder=2)  # fmt: skip
        scatter(made, axes, dots, shown, {dot.number: dot.number for dot in dots})
        draw_levels(axes, levels)
        axes.set(xlabel="trial", ylabel=label, ylim=(shown.low, shown.high))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        add_legend(figure)


def draw_curves(
    made: Vector, curves: Sequence[Curve], levels: Sequence[Level], rungs: Sequence[int], label: str, *, maximise: bool
) -> None:
    """Draw the metric of every trial over its epochs; pruned trials are faint.

    `label` is that of the metric's axis; `maximise`: whether larger is better.
    """
    from matplotlib.collections import LineCollection

    ends = [curve.values[-1] for curve in curves if curve.look != "pruned"] + [level.value for level in levels]
    every = sorted(value for curve in curves for value in curve.values if math.isfinite(value))
    # First epochs and bad trials would hide the differences between leaders: a tenth of the values may lie outside.
    below, above = (len(every) // 10, len(every) // 50) if maximise else (len(every) // 50, len(every) // 10)
    low, high = (every[below], every[-1 - above]) if every else (0.0, 1.0)
    shown = scale([low, high, *ends])
    with made.drawing(2.9) as figure:
        axes = new_axes(figure)
        for rung in rungs:
            axes.axvline(rung, color=FAINT, linewidth=0.7, linestyle=_DOTTED, zorder=1)
        if rungs:
            axes.plot([], [], color=FAINT, linewidth=0.7, linestyle=_DOTTED, label="rung")
        for kind, colour, name in (("pruned", "#DADADA", "stopped early"), ("complete", "#A3A3A3", "complete")):
            some = [curve for curve in curves if curve.look == kind]
            if some:
                lines = [list(zip(curve.epochs, curve.values, strict=True)) for curve in some]
                gid = f"curves-{kind}"
                axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.7, label=name, gid=gid, zorder=2))
                made.tips[gid] = [curve.tip for curve in some]
        for curve in curves:
            if curve.look in LOOKS:
                look = LOOKS[curve.look]
                axes.plot(
                    curve.epochs, curve.values, color=look.color, marker=look.marker, linestyle=look.line,
                    linewidth=1.6, markersize=3.5, markevery=[len(curve.values) - 1], label=curve.label, zorder=4,
                )  # fmt: skip
        draw_levels(axes, levels)
        last = max((curve.epochs[-1] for curve in curves), default=1)
        axes.set(xlabel="epoch", ylabel=label, ylim=(shown.low, shown.high), xlim=(0, last * 1.02))
        add_legend(figure)


def draw_levels(axes: Axes, levels: Sequence[Level], *, upright: bool = True) -> None:
    """Draw reference values as lines across the axes; `upright`: whether the metric's axis is vertical."""
    for level in levels:
        look = LOOKS[level.look]
        line = axes.axhline if upright else axes.axvline
        line(level.value, color=look.color, linestyle=look.line, linewidth=1, label=level.label)
