"""Draw parameter importances, and parallel coordinates of a search's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heterokd.report.figures.palette import STUDENT
from heterokd.report.figures.svg import INK, SOFT, Vector, new_axes


@dataclass(frozen=True)
class Bar:
    """Importance of a parameter.

    Attributes:
        label: name.
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
        label: name.
        ticks: positions in [0, 1] and their labels.
    """

    label: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """A trial across all axes.

    Attributes:
        places: position on each axis in [0, 1], None without a value; last the objective's, 1 is best, None for a
            pruned trial.
        is_best: whether it is highlighted.
        tip: tooltip.
    """

    places: Sequence[float | None]
    is_best: bool
    tip: str


def draw_importance(made: Vector, bars: Sequence[Bar]) -> None:
    """Draw bars with the range of several estimates, from the top."""
    with made.drawing(0.62 + 0.22 * len(bars)) as figure:
        axes = new_axes(figure, "x")
        for place, bar in enumerate(bars):
            axes.barh(place, bar.mean, 0.62, color=STUDENT)
            axes.plot([bar.low, bar.high], [place, place], color=INK, linewidth=0.9, marker="|", markersize=5)
            axes.annotate(f"{100 * bar.mean:.0f} %", (max(bar.high, bar.mean), place), xytext=(5, 0),
                          textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.set(xlim=(0, 1.12), ylim=(len(bars) - 0.5, -0.5), xlabel="explained share of the variance")


def draw_parallel(made: Vector, coordinates: Sequence[Axis], lines: Sequence[Line]) -> None:
    """Draw trials as lines across the axes of their parameters, objective last; darker is better.

    Pruned trials are faint and end before the objective.
    """
    import matplotlib as mpl

    colours = mpl.colormaps["cividis"]
    with made.drawing(3.0) as figure:
        axes = figure.subplots()
        for number, line in enumerate(lines):
            known = [(at, place) for at, place in enumerate(line.places) if place is not None]
            result, gid = line.places[-1], f"line-{number}"
            axes.plot(
                [at for at, _ in known], [place for _, place in known], gid=gid,
                color="#D8D8D8" if result is None else colours(0.85 * (1 - result)),
                linewidth=2.6 if line.is_best else 0.7 if result is None else 1.0,
                zorder=4 if line.is_best else 1 if result is None else 2,
            )  # fmt: skip
            made.tips[gid] = [line.tip]
        for at, coordinate in enumerate(coordinates):
            axes.axvline(at, color=SOFT, linewidth=0.7, zorder=3)
            for place, text in coordinate.ticks:
                axes.plot([at - 0.03, at + 0.03], [place, place], color=SOFT, linewidth=0.7, zorder=3)
                axes.annotate(
                    text, (at, place), xytext=(3, 0), textcoords="offset points", fontsize=6.5, va="center", zorder=5,
                    bbox={"boxstyle": "square,pad=0.12", "facecolor": "#FFFFFF", "edgecolor": "none", "alpha": 0.8},
                )  # fmt: skip
        labels = [coordinate.label for coordinate in coordinates]
        axes.set_xticks(range(len(labels)), labels, rotation=22, ha="right", rotation_mode="anchor")
        axes.get_xticklabels()[-1].set_fontweight("bold")
        axes.tick_params(length=0)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set(xlim=(-0.1, len(labels) - 1 + 0.45), ylim=(-0.05, 1.05))
