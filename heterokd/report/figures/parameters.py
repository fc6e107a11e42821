"""Draw parameter importances, and parallel coordinates of a search's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heterokd.report.figures.palette import STUDENT
from heterokd.report.figures.svg import INK, SOFT, Vector


@dataclass(frozen=True)
class Bar:
    """Importance of a parameter.

    Attributes:
        label: its name.
        mean: share of the variance that it explains, in [0, 1].
        low: smallest of several estimates.
        high: largest.
    """

    label: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """A parameter as a vertical axis.

    Attributes:
        label: its name.
        ticks: positions in [0, 1] and their labels.
    """

    label: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """A trial across all axes.

    Attributes:
        places: on each axis, in [0, 1]; the last is the objective's, 1 is best. None if the trial has no value.
        value: of the objective; None if the trial was pruned.
        is_best: whether it is highlighted.
        tip: tooltip.
    """

    places: Sequence[float | None]
    value: float | None
    is_best: bool
    tip: str


def draw_importance(name: str, title: str, description: str, bars: Sequence[Bar]) -> str:
    """Draw bars with the range of several estimates, the largest on top; `name`: see `Vector`."""
    with Vector(name, title, description, 0.62 + 0.22 * len(bars)) as made:
        axis = made.axis(grid="x")
        for place, bar in enumerate(bars):
            axis.barh(place, bar.mean, 0.62, color=STUDENT)
            axis.plot([bar.low, bar.high], [place, place], color=INK, linewidth=0.9, marker="|", markersize=5)
            axis.annotate(f"{100 * bar.mean:.0f} %", (max(bar.high, bar.mean), place), xytext=(5, 0),
                          textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
        axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axis.tick_params(axis="y", length=0)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axis.set(xlim=(0, 1.12), ylim=(len(bars) - 0.5, -0.5), xlabel="share of the variance that it explains")
    return made.text


def draw_parallel(name: str, title: str, description: str, axes: Sequence[Axis], lines: Sequence[Line]) -> str:
    """Draw trials as lines across the axes of their parameters, objective last; darker is better.

    Pruned trials are faint and end before the objective.

    Args:
        name: of the chart: a page has one per method.
        title: see `Vector`.
        description: see `Vector`.
        axes: of the parameters, then of the objective.
        lines: the trials.
    """
    import matplotlib as mpl

    colours = mpl.colormaps["cividis"]
    with Vector(name, title, description, 3.0) as made:
        axis = made.figure.subplots()
        for number, line in enumerate(lines):
            known = [(at, place) for at, place in enumerate(line.places) if place is not None]
            reached = line.places[-1]
            look: dict[str, Any] = {"color": "#D8D8D8", "linewidth": 0.7, "zorder": 1}
            if line.value is not None and reached is not None:
                look = {"color": colours(0.85 * (1 - reached)), "linewidth": 1.0, "zorder": 2}
            if line.is_best:
                look |= {"linewidth": 2.6, "zorder": 4}
            axis.plot([at for at, _ in known], [place for _, place in known], gid=f"line-{number}", **look)
            made.tips[f"line-{number}"] = [line.tip]
        for at, one in enumerate(axes):
            axis.axvline(at, color=SOFT, linewidth=0.7, zorder=3)
            for place, text in one.ticks:
                axis.plot([at - 0.03, at + 0.03], [place, place], color=SOFT, linewidth=0.7, zorder=3)
                axis.annotate(
                    text, (at, place), xytext=(3, 0), textcoords="offset points", fontsize=6.5, va="center", zorder=5,
                    bbox={"boxstyle": "square,pad=0.12", "facecolor": "#FFFFFF", "edgecolor": "none", "alpha": 0.8},
                )  # fmt: skip
        axis.set_xticks(range(len(axes)), [one.label for one in axes], rotation=22, ha="right", rotation_mode="anchor")
        axis.get_xticklabels()[-1].set_fontweight("bold")
        axis.tick_params(length=0)
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set(xlim=(-0.1, len(axes) - 1 + 0.45), ylim=(-0.05, 1.05))
    return made.text
