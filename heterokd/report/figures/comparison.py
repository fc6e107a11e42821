"""Draw the compared students on one axis, the trials of every method, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heterokd.report.figures.history import Dot, Level, scale, scatter
from heterokd.report.figures.palette import STUDENT
from heterokd.report.figures.svg import INK, LOOKS, SOFT, Vector
from heterokd.storage.trial_status import TrialStatus


@dataclass(frozen=True)
class Row:
    """One student, or the teacher.

    Attributes:
        label: its name.
        mean: of its metric.
        low: lower end of the mean's interval; None if unknown.
        high: upper end.
        look: key of `LOOKS`.
        note: text at the right.
    """

    label: str
    mean: float
    low: float | None
    high: float | None
    look: str
    note: str


@dataclass(frozen=True)
class Strip:
    """One method.

    Attributes:
        method: its name.
        dots: its trials.
        mean: of its best confirmed configuration on fresh seeds; None if none was confirmed.
        low: lower end of the interval.
        high: upper end.
        published: value of its published setting; None if unknown.
        look: key of `LOOKS`.
    """

    method: str
    dots: Sequence[Dot]
    mean: float | None
    low: float | None
    high: float | None
    published: float | None
    look: str


@dataclass(frozen=True)
class Member:
    """A student that is compared by accuracy and cost.

    Attributes:
        label: its name.
        cost: parameters or latency.
        value: of the metric.
        is_front: whether it is on the Pareto front.
        look: key of `LOOKS`.
    """

    label: str
    cost: float
    value: float
    is_front: bool
    look: str


def draw_glance(title: str, description: str, rows: Sequence[Row], metric: str) -> str:
    """Draw winner, references and teacher on one axis, with intervals and numbers."""
    values = [value for row in rows for value in (row.mean, row.low, row.high) if value is not None]
    shown = scale(values)
    with Vector("glance", title, description, 0.75 + 0.36 * len(rows)) as made:
        axis = made.axis(grid="x")
        for place, row in enumerate(rows):
            look = LOOKS[row.look]
            if row.low is not None and row.high is not None:
                axis.plot([row.low, row.high], [place, place], color=look["color"], linewidth=4, alpha=0.35,
                          solid_capstyle="butt")  # fmt: skip
            axis.plot([row.mean], [place], color=look["color"], marker=look["marker"], markersize=7,
                      markeredgecolor="#FFFFFF", markeredgewidth=0.6)  # fmt: skip
        axis.set_yticks(range(len(rows)), [row.label for row in rows])
        for text, row in zip(axis.get_yticklabels(), rows, strict=True):
            text.set_fontweight("bold" if row.look == "winner" else "normal")
        other = axis.twinx()
        other.set_ylim(len(rows) - 0.5, -0.5)
        other.set_yticks(range(len(rows)), [row.note for row in rows])
        for each in (axis, other):
            each.tick_params(axis="y", length=0)
            each.spines["left"].set_visible(False)
        axis.set(xlim=(shown.low, shown.high), ylim=(len(rows) - 0.5, -0.5), xlabel=metric)
    return made.text


def draw_strips(title: str, description: str, strips: Sequence[Strip], levels: Sequence[Level], metric: str) -> str:
    """Draw each method's trials as dots, its confirmed mean with interval, and its published setting."""
    values = [
        dot.value
        for strip in strips
        for dot in strip.dots
        if dot.mark == TrialStatus.COMPLETE and dot.value is not None
    ]
    values += [end for strip in strips for end in (strip.low, strip.high, strip.mean) if end is not None]
    rest = [dot.value for strip in strips for dot in strip.dots if dot.value is not None]
    shown = scale(values + [level.value for level in levels], rest)
    with Vector("methods", title, description, 1.0 + 0.25 * len(strips)) as made:
        axis = made.axis(grid="x")
        places = {dot.number: place + 0.14 for place, strip in enumerate(strips) for dot in strip.dots}
        dots = [dot for strip in strips for dot in strip.dots]
        scatter(made, axis, dots, shown, places, upright=False)
        published = [
            (strip.published, place + 0.14) for place, strip in enumerate(strips) if strip.published is not None
        ]
        if published:
            axis.scatter(
                [shown.held(value) for value, _ in published], [place for _, place in published], marker="s", s=42,
                facecolors="none", edgecolors=INK, linewidths=0.7, label="published setting", zorder=3,
            )  # fmt: skip
        named = False
        for place, strip in enumerate(strips):
            if strip.mean is None:
                continue
            colour = LOOKS[strip.look]["color"] if strip.look in LOOKS else INK
            if strip.low is not None and strip.high is not None:
                axis.plot([strip.low, strip.high], [place - 0.2] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axis.plot([strip.mean], [place - 0.2], color=colour, marker="D", markersize=4.5, linestyle="none",
                      label=None if named else "mean on fresh seeds", zorder=4)  # fmt: skip
            named = True
        for level in levels:
            look = LOOKS[level.look]
            axis.axvline(level.value, color=look["color"], linestyle=look["linestyle"], linewidth=1, label=level.label)
        axis.set_yticks(range(len(strips)), [strip.method for strip in strips])
        axis.tick_params(axis="y", length=0)
        axis.set(xlim=(shown.low, shown.high), ylim=(len(strips) - 0.5, -0.6), xlabel=metric)
        handles, labels = axis.get_legend_handles_labels()
        made.figure.legend(
            handles, labels, loc="outside upper left", ncols=3, columnspacing=1.0, handlelength=1.6, handletextpad=0.4,
            borderaxespad=0.2,
        )  # fmt: skip
    return made.text


def draw_front(name: str, title: str, description: str, members: Sequence[Member], cost: str, metric: str) -> str:
    """Draw students by cost and metric; the Pareto front is a step line, upper left is better.

    Args:
        name: of the chart: a page has one per cost.
        title: see `Vector`.
        description: see `Vector`.
        members: the students.
        cost: label of the horizontal axis.
        metric: label of the vertical axis.
    """
    with Vector(name, title, description, 2.7) as made:
        axis = made.axis(grid="both")
        front = sorted((member for member in members if member.is_front), key=lambda member: member.cost)
        if len(front) > 1:
            steps = zip(*((member.cost, member.value) for member in front), strict=True)
            axis.step(*steps, where="post", color=STUDENT, linewidth=1, alpha=0.6, zorder=2)
        for member in members:
            look = LOOKS.get(member.look, {"color": STUDENT if member.is_front else SOFT, "marker": "o"})
            axis.plot(
                [member.cost], [member.value], linestyle="none", marker=look["marker"], markersize=6,
                color=look["color"], markerfacecolor=look["color"] if member.is_front else "#FFFFFF", zorder=3,
            )  # fmt: skip
            axis.annotate(member.label, (member.cost, member.value), xytext=(4, 5), textcoords="offset points",
                          fontsize=7, annotation_clip=False)  # fmt: skip
        costs = [member.cost for member in members]
        if min(costs) > 0 and max(costs) / min(costs) > 20:
            axis.set_xscale("log")
        axis.margins(x=0.25, y=0.18)
        axis.set(xlabel=cost, ylabel=metric)
    return made.text
