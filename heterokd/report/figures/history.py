"""Draw the values of a search's trials in order, and their learning curves, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from heterokd.report.figures.palette import STUDENT
from heterokd.report.figures.svg import FAILED, FAINT, INK, LOOKS, SOFT, Vector
from heterokd.storage.trial_status import TrialStatus

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Metric:
    """What the vertical axis shows.

    Attributes:
        label: of the axis.
        maximise: whether larger is better.
    """

    label: str
    maximise: bool


@dataclass(frozen=True)
class Dot:
    """One trial.

    Attributes:
        number: of the trial.
        mark: complete, pruned (whatever stopped it early) or failed.
        value: of the metric at its end; None where there is none.
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
        label: its name.
        value: of the metric.
        look: key of `LOOKS`.
    """

    label: str
    value: float
    look: str


@dataclass(frozen=True)
class Curve:
    """The metric of one trial over its epochs.

    Attributes:
        epochs: finished epochs, counted from 1.
        values: of the metric.
        look: key of `LOOKS` for highlighted trials, `complete` or `pruned` for the others.
        label: in the legend; "" for the others.
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

    Attributes:
        low: its lower end.
        high: its upper end.
    """

    low: float
    high: float

    def held(self, value: float) -> float:
        """Clip a value to the axis."""
        return min(max(value, self.low), self.high)

    def inside(self, value: float) -> float:
        """Clip a value so far inside the axis that its mark is fully visible."""
        edge = 0.02 * (self.high - self.low)
        return min(max(value, self.low + edge), self.high - edge)


def scale(values: Sequence[float], others: Sequence[float] = ()) -> Scale:
    """Make a scale for `values` with a margin; `others` count if there are no values."""
    finite = [v for v in values if math.isfinite(v)] or [v for v in others if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = 0.07 * (high - low) or 0.02 * abs(high) or 0.01
    return Scale(low - margin, high + margin)


@dataclass
class _Marks:
    places: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    tips: list[str] = field(default_factory=list)

    def add(self, place: float, value: float, tip: str) -> None:
        self.places.append(place)
        self.values.append(value)
        self.tips.append(tip)


_BEYOND: dict[str, Any] = {"facecolors": "#A8A8A8", "edgecolors": "none", "s": 13, "label": "stopped, off scale"}


def scatter(
    made: Vector, axis: Axes, dots: Sequence[Dot], shown: Scale, places: Mapping[int, float], *, upright: bool = True
) -> None:
    """Draw trials: complete ones filled, pruned ones hollow, failed ones as a cross.

    Args:
        made: the chart, for the tips.
        axis: to draw on.
        dots: the trials.
        shown: range of the metric's axis; a value outside is a triangle at its edge.
        places: position of each trial on the other axis.
        upright: whether the metric's axis is vertical.
    """
    kinds: dict[str, _Marks] = {}
    for dot in dots:
        value = shown.low if dot.value is None or not math.isfinite(dot.value) else shown.held(dot.value)
        mark: str = dot.mark
        if dot.mark == TrialStatus.PRUNED and value != dot.value:
            mark = "below" if value == shown.low else "above"
        kinds.setdefault(mark, _Marks()).add(places[dot.number], shown.inside(value), dot.tip)
    looks: dict[str, dict[str, Any]] = {
        "below": {"marker": "v" if upright else "<", **_BEYOND},
        "above": {"marker": "^" if upright else ">", **_BEYOND},
        TrialStatus.PRUNED: {
            "marker": "o",
            "facecolors": "#FFFFFF",
            "edgecolors": "#8C8C8C",
            "s": 13,
            "label": "stopped early",
        },
        TrialStatus.COMPLETE: {
            "marker": "o",
            "facecolors": SOFT,
            "edgecolors": "#FFFFFF",
            "s": 20,
            "label": "to the end",
        },
        TrialStatus.FAILED: {"marker": "x", "color": FAILED, "s": 22, "label": "failed"},
    }
    for kind, look in looks.items():
        if kind in kinds:
            marks = kinds[kind]
            pairs = (marks.places, marks.values) if upright else (marks.values, marks.places)
            gid = f"dots-{kind}"
            axis.scatter(*pairs, gid=gid, linewidths=0.9, zorder=3, clip_on=False, **look)
            made.tips[gid] = marks.tips


def draw_history(title: str, description: str, dots: Sequence[Dot], levels: Sequence[Level], metric: Metric) -> str:
    """Draw the trials of a search in order of their start, and the best value so far."""
    from matplotlib.ticker import MaxNLocator

    complete = [dot for dot in dots if dot.mark == TrialStatus.COMPLETE and dot.value is not None]
    shown = scale(
        [dot.value for dot in complete if dot.value is not None] + [level.value for level in levels],
        [dot.value for dot in dots if dot.value is not None],
    )
    with Vector("history", title, description, 2.7) as made:
        axis = made.axis()
        best: list[float] = []
        for dot in complete:
            assert dot.value is not None
            better = max if metric.maximise else min
            best.append(better(best[-1], dot.value) if best else dot.value)
        if best:
            last = max(dot.number for dot in dots)
            axis.step([*(dot.number for dot in complete), last], [*best, best[-1]], where="post", color=STUDENT,
                      label="best so far", zorder=2)  # fmt: skip
        scatter(made, axis, dots, shown, {dot.number: dot.number for dot in dots})
        _levels(axis, levels)
        axis.set(xlabel="trial", ylabel=metric.label, ylim=(shown.low, shown.high))
        locator = axis.xaxis.get_major_locator()
        assert isinstance(locator, MaxNLocator)
        locator.set_params(integer=True)
        _legend(made)
    return made.text


def draw_curves(
    title: str,
    description: str,
    curves: Sequence[Curve],
    levels: Sequence[Level],
    rungs: Sequence[int],
    metric: Metric,
) -> str:
    """Draw the metric of every trial over its epochs; pruned trials are faint."""
    from matplotlib.collections import LineCollection

    ends = [curve.values[-1] for curve in curves if curve.look != "pruned"] + [level.value for level in levels]
    every = sorted(value for curve in curves for value in curve.values if math.isfinite(value))
    # First epochs and bad trials would hide the differences between leaders: a tenth of the values may lie outside.
    below, above = (len(every) // 10, len(every) // 50) if metric.maximise else (len(every) // 50, len(every) // 10)
    low, high = (every[below], every[-1 - above]) if every else (0.0, 1.0)
    shown = scale([low, high, *ends])
    with Vector("curves", title, description, 2.9) as made:
        axis = made.axis()
        for rung in rungs:
            axis.axvline(rung, color=FAINT, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        if rungs:
            axis.plot([], [], color=FAINT, linewidth=0.7, linestyle=(0, (1, 2)), label="rung")
        for look, colour, width, label in (
            ("pruned", "#DADADA", 0.7, "stopped early"),
            ("complete", "#A3A3A3", 0.7, "to the end"),
        ):
            some = [curve for curve in curves if curve.look == look]
            if some:
                lines = [list(zip(curve.epochs, curve.values, strict=True)) for curve in some]
                gid = f"curves-{look}"
                axis.add_collection(
                    LineCollection(lines, colors=colour, linewidths=width, label=label, gid=gid, zorder=2)
                )
                made.tips[gid] = [curve.tip for curve in some]
        for curve in curves:
            if curve.look in LOOKS:
                look_of = LOOKS[curve.look]
                axis.plot(
                    curve.epochs,
                    curve.values,
                    **look_of,
                    linewidth=1.6,
                    markersize=3.5,
                    markevery=[len(curve.values) - 1],
                    label=curve.label,
                    zorder=4,
                )
        _levels(axis, levels)
        last = max((curve.epochs[-1] for curve in curves), default=1)
        axis.set(xlabel="epoch", ylabel=metric.label, ylim=(shown.low, shown.high), xlim=(0, last * 1.02))
        _legend(made)
    return made.text


def _levels(axis: Axes, levels: Sequence[Level]) -> None:
    for level in levels:
        look = LOOKS[level.look]
        axis.axhline(level.value, color=look["color"], linestyle=look["linestyle"], linewidth=1, label=level.label)


def _legend(made: Vector) -> None:
    handles, labels = made.figure.axes[0].get_legend_handles_labels()
    if handles:
        made.figure.legend(
            handles, labels, loc="outside upper left", ncols=3, columnspacing=1.0, handlelength=1.8, handletextpad=0.5,
            borderaxespad=0.2, labelcolor=INK,
        )  # fmt: skip
