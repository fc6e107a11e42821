"""Draw the compared students on one axis, the trials of every method, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heterokd.formatting import format_score
from heterokd.methods import BASELINE
from heterokd.report.figures.history import Dot, Level, draw_levels, scale, scatter
from heterokd.report.figures.palette import SCRATCH, STUDENT
from heterokd.report.figures.svg import INK, LOOKS, SOFT, Look, Vector, add_legend, new_axes
from heterokd.storage.trial_status import TrialStatus


@dataclass(frozen=True)
class Row:
    """A student, or the teacher.

    Attributes:
        label: name.
        look: key of `LOOKS`.
        mean: mean of the metric.
        low: lower end of the mean's interval; None if unknown.
        high: upper end.
    """

    label: str
    look: str
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Strip:
    """A method.

    Attributes:
        method: name.
        dots: its trials.
        mean: mean of its best confirmed configuration on fresh seeds; None if none was confirmed.
        low: lower end of the interval.
        high: upper end.
        published: value of its published setting; None if unknown.
        is_winner: whether the winner is distilled by it.
    """

    method: str
    dots: Sequence[Dot]
    mean: float | None
    low: float | None
    high: float | None
    published: float | None
    is_winner: bool


@dataclass(frozen=True)
class Member:
    """A network that is compared by accuracy and cost.

    Attributes:
        label: name.
        cost: value of the cost.
        value: value of the metric.
        is_front: whether it is on the Pareto front.
        is_teacher: whether it is the teacher.
    """

    label: str
    cost: float
    value: float
    is_front: bool
    is_teacher: bool = False


def draw_glance(made: Vector, rows: Sequence[Row], label: str) -> None:
    """Draw winner, references and teacher on one axis, with intervals and numbers; `label` is the axis's."""
    values = [value for row in rows for value in (row.mean, row.low, row.high) if value is not None]
    shown, bottom = scale(values), len(rows) - 0.5
    with made.drawing(0.75 + 0.36 * len(rows)) as figure:
        axes = new_axes(figure, "x")
        for place, row in enumerate(rows):
            look = LOOKS[row.look]
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=look.color, linewidth=4, alpha=0.35,
                          solid_capstyle="butt")  # fmt: skip
            axes.plot([row.mean], [place], color=look.color, marker=look.marker, markersize=7,
                      markeredgecolor="#FFFFFF", markeredgewidth=0.6)  # fmt: skip
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        for text, row in zip(axes.get_yticklabels(), rows, strict=True):
            text.set_fontweight("bold" if row.look == "winner" else "normal")
        right = axes.twinx()
        right.set_ylim(bottom, -0.5)
        right.set_yticks(range(len(rows)), [format_score(row.mean) for row in rows])
        for each in (axes, right):
            each.tick_params(axis="y", length=0)
            each.spines["left"].set_visible(False)
        axes.set(xlim=(shown.low, shown.high), ylim=(bottom, -0.5), xlabel=label)


def draw_strips(made: Vector, strips: Sequence[Strip], levels: Sequence[Level], label: str) -> None:
    """Draw each method's trials as dots, its confirmed mean with interval, and its published setting.

    `strips` are the methods from the top, `label` is that of the metric's axis.
    """
    dots = [dot for strip in strips for dot in strip.dots]
    values = [dot.value for dot in dots if dot.mark == TrialStatus.COMPLETE and dot.value is not None]
    values += [end for strip in strips for end in (strip.low, strip.high, strip.mean) if end is not None]
    others = [dot.value for dot in dots if dot.value is not None]
    shown = scale(values + [level.value for level in levels], others)
    with made.drawing(1.0 + 0.25 * len(strips)) as figure:
        axes = new_axes(figure, "x")
        places = {dot.number: place + 0.14 for place, strip in enumerate(strips) for dot in strip.dots}
        scatter(made, axes, dots, shown, places, upright=False)
        for place, strip in enumerate(strips):
            if strip.published is not None:
                axes.scatter(
                    [shown.clip(strip.published)], [place + 0.14], marker="s", s=42, facecolors="none", edgecolors=INK,
                    linewidths=0.7, label="published setting", zorder=3,
                )  # fmt: skip
        for place, strip in enumerate(strips):
            if strip.mean is None:
                continue
            colour = STUDENT if strip.is_winner else SCRATCH if strip.method == BASELINE else INK
            if strip.low is not None and strip.high is not None:
                axes.plot([strip.low, strip.high], [place - 0.2] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([strip.mean], [place - 0.2], color=colour, marker="D", markersize=4.5, linestyle="none",
                      label="mean on fresh seeds", zorder=4)  # fmt: skip
        draw_levels(axes, levels, upright=False)
        axes.set_yticks(range(len(strips)), [strip.method for strip in strips])
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(shown.low, shown.high), ylim=(len(strips) - 0.5, -0.6), xlabel=label)
        add_legend(figure)


def draw_front(made: Vector, members: Sequence[Member], cost: str, metric: str) -> None:
    """Draw students by cost and metric; the Pareto front is a step line, upper left is better.

    `cost` and `metric` label the axes; `members` include the teacher if its cost is known.
    """
    with made.drawing(2.7) as figure:
        axes = new_axes(figure, "both")
        front = sorted((member.cost, member.value) for member in members if member.is_front)
        if len(front) > 1:
            axes.step(*zip(*front, strict=True), where="post", color=STUDENT, linewidth=1, alpha=0.6, zorder=2)
        for member in members:
            look = LOOKS["teacher"] if member.is_teacher else Look(STUDENT if member.is_front else SOFT, "o", "none")
            axes.plot(
                [member.cost], [member.value], linestyle="none", marker=look.marker, markersize=6, color=look.color,
                markerfacecolor=look.color if member.is_front else "#FFFFFF", zorder=3,
            )  # fmt: skip
            axes.annotate(member.label, (member.cost, member.value), xytext=(4, 5), textcoords="offset points",
                          fontsize=7, annotation_clip=False)  # fmt: skip
        costs = [member.cost for member in members]
        if min(costs) > 0 and max(costs) / min(costs) > 20:
            axes.set_xscale("log")
        axes.margins(x=0.25, y=0.18)
        axes.set(xlabel=cost, ylabel=metric)
