"""The charts of a page: which trials each one shows, and the sentence that says what is to be seen in it.

A chart that cannot be drawn becomes a sentence: neither the page nor the search is lost to it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heterokd.formatting import format_sample, format_score, join_words, metric_name
from heterokd.methods import BASELINE
from heterokd.report.cards import default_side
from heterokd.report.figures.comparison import Row, Strip, draw_glance, draw_strips
from heterokd.report.figures.history import Curve, Dot, Level, Metric, draw_curves, draw_history
from heterokd.report.study_data import StudyReport
from heterokd.report.tables import describe, methods_in_order
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.pruner import checkpoint_epochs
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.trial_view import TrialView

MOST_CURVES = 150
"""Curves of a chart; of more trials those trained to the end are shown, and of the others every so many."""

MOST_SETTINGS = 500
"""Trials of a chart up to which the tip of each tells its values: of thousands they would be most of the page."""


@dataclass(frozen=True)
class Chart:
    """One figure of the page.

    Attributes:
        name: its id.
        title: what it shows.
        svg: the drawing; "" where there is none.
        caption: what is to be seen, or why there is nothing.
    """

    name: str
    title: str
    svg: str
    caption: str


class NothingToShow(Exception):
    """Why a chart has nothing to show, in one sentence."""


def chart(name: str, title: str, draw: Callable[[], tuple[str, str]]) -> Chart:
    """A chart from a function that returns its SVG and its caption; whatever that raises becomes the caption."""
    try:
        svg, caption = draw()
    except NothingToShow as reason:
        return Chart(name, title, "", str(reason))
    except Exception as error:  # noqa: BLE001  one chart is no reason to lose the page
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return Chart(name, title, "", f"This chart could not be drawn ({first}).")
    return Chart(name, title, svg, caption)


def glance(report: StudyReport) -> Chart:
    """Winner, default settings, scratch and teacher on one axis."""

    def draw() -> tuple[str, str]:
        winner, metric = report.winner, metric_name(report.summary.metric)
        if winner is None or winner.mean is None:
            raise NothingToShow("No student was trained to the end, so there is nothing to compare.")
        rows = [_leader_row(winner, winner.mean, f"winner: {winner.method}", "winner")]
        found = default_side(report, winner)
        if found is not None:
            default, side = found
            low, high = (None, None) if side.half is None else (side.mean - side.half, side.mean + side.half)
            rows.append(Row(f"{default.method}, defaults", side.mean, low, high, "default", format_score(side.mean)))
        scratch = report.scratch
        if scratch is not None and scratch.mean is not None:
            rows.append(_leader_row(scratch, scratch.mean, "labels alone", BASELINE))
        if "teacher" in report.levels:
            level = report.levels["teacher"]
            rows.append(Row("teacher", level, None, None, "teacher", format_score(level)))
        rows.sort(key=lambda row: -row.mean if report.summary.maximise else row.mean)
        caption = f"{metric} on val. Bars are 95 % intervals of a mean over seeds; the teacher is one network."
        if not winner.confirmed:
            caption = f"{metric} on val. One seed each: nothing says how far these values scatter."
        title = "The winner and what it is compared with"
        said = "; ".join(f"{row.label} {row.note}" for row in rows)
        return draw_glance(title, said, rows, f"{metric} on val"), caption

    return chart("glance", "The winner and what it is compared with", draw)


def _leader_row(leader: RankedConfig, mean: float, label: str, look: str) -> Row:
    low, high = (leader.low, leader.high) if leader.half_width is not None else (None, None)
    return Row(label, mean, low, high, look, format_score(mean))


def methods(report: StudyReport) -> Chart:
    """Every trial of every method."""

    def draw() -> tuple[str, str]:
        if not any(one.value is not None for one in report.search):
            raise NothingToShow("No trial has reported a value yet.")
        winner = report.winner
        strips = []
        for method in methods_in_order(report):
            own = [one for one in report.search if one.method == method]
            best = next((one for one in report.summary.leaders if one.method == method and one.confirmed), None)
            published = next((one.value for one in own if one.origin == "published" and one.is_complete), None)
            look = "winner" if winner is not None and method == winner.method else method
            strips.append(
                Strip(
                    method=method,
                    dots=[_dot(one, report) for one in own],
                    mean=None if best is None else best.mean,
                    low=None if best is None else best.low,
                    high=None if best is None else best.high,
                    published=published,
                    look=look,
                )
            )
        metric = metric_name(report.summary.metric)
        caption = _method_sentence(report, strips)
        title = "Every trial of every method"
        return draw_strips(title, caption, strips, _levels(report, ("teacher",)), f"{metric} on val"), caption

    return chart("methods", "Every trial of every method", draw)


def _method_sentence(report: StudyReport, strips: Sequence[Strip]) -> str:
    complete = [(strip, [dot.value for dot in strip.dots if dot.mark == TrialStatus.COMPLETE]) for strip in strips]
    tried = [(strip, [value for value in values if value is not None]) for strip, values in complete]
    tried = [(strip, values) for strip, values in tried if values]
    if not tried:
        return "No trial was trained to the end."
    pick = max if report.summary.maximise else min
    strip, values = pick(tried, key=lambda one: pick(one[1]))
    confirmed = [strip for strip in strips if strip.mean is not None]
    said = f"The best single value, {format_score(pick(values))}, is {strip.method}'s"
    if confirmed:
        first = pick(confirmed, key=lambda one: one.mean or 0.0)
        said += f"; the best mean over fresh seeds, {format_score(first.mean)}, is {first.method}'s"
    none = [strip.method for strip in strips if not any(dot.mark == TrialStatus.COMPLETE for dot in strip.dots)]
    if none:
        said += f"; nothing of {', '.join(none)} was trained to the end"
    if not confirmed:
        return f"{said}. Nothing was repeated: the more trials a method has, the luckier is its best one."
    return f"{said}. Dots of the search are the luckier, the more there are: compare diamonds."


def history(report: StudyReport) -> Chart:
    """Trials in their order, and the best so far."""

    def draw() -> tuple[str, str]:
        dots = [_dot(one, report) for one in report.search if one.status != TrialStatus.RUNNING]
        complete = [dot for dot in dots if dot.mark == TrialStatus.COMPLETE and dot.value is not None]
        if not dots:
            raise NothingToShow("No trial has ended yet.")
        counts = Counter(dot.mark for dot in dots)
        caption = (
            f"{counts[TrialStatus.COMPLETE]} trained to the end, {counts[TrialStatus.PRUNED]} stopped early, "
            f"{counts[TrialStatus.FAILED]} failed."
        )
        if complete:
            pick = max if report.summary.maximise else min
            best = pick(complete, key=lambda dot: dot.value or 0.0)
            rank = 1 + sum(dot.number < best.number for dot in dots)
            first = f"The best value of the search, {format_score(best.value)}, came with trial {best.number}"
            caption = f"{first}, the {_th(rank)} of {len(dots)}. {caption}"
        metric = f"{metric_name(report.summary.metric)} on val"
        title = "Best value so far"
        drawn = draw_history(title, caption, dots, _levels(report), Metric(metric, report.summary.maximise))
        return drawn, caption

    return chart("history", "Best value so far", draw)


def curves(report: StudyReport) -> Chart:
    """The metric of every trial over its epochs."""

    def draw() -> tuple[str, str]:
        trials = [one for one in report.trials if len(one.curve) > 0]
        if not trials:
            raise NothingToShow("No trial has reported an epoch yet.")
        pointed = _pointed_out(report)
        others = [one for one in trials if one.number not in pointed]
        shown = _some(others)
        lines = [
            Curve(
                one.epochs,
                one.curve,
                "complete" if one.status == TrialStatus.COMPLETE else "pruned",
                tip=tip(one, len(shown)),
            )
            for one in shown
        ]
        for one in trials:
            if one.number in pointed:
                look, label = pointed[one.number]
                lines.append(Curve(one.epochs, one.curve, look, label, tip(one, 1)))
        stopped = sum(one.status in (TrialStatus.PRUNED, TrialStatus.PAUSED) for one in trials)
        settings, epochs = report.experiment.search, report.experiment.training.epochs
        at = checkpoint_epochs(report.experiment, epochs) if settings.prune and settings.pruner is None else ()
        caption = f"{stopped} of {len(trials)} trainings were stopped early"
        if settings.pruner is not None:
            caption += f" by {settings.pruner.name.rpartition(':')[2]}"
        if at:
            caption += f", at rungs after epoch {join_words(list(map(str, at)))}"
        names = [label for _, label in pointed.values()]
        caption += f"; {join_words(names)} stand{'s' if len(names) == 1 else ''} out." if names else "."
        if len(shown) < len(others):
            caption += f" {len(others) - len(shown)} of {len(trials)} curves are left out."
        metric = f"{metric_name(report.summary.metric)} on val"
        title, levels = "Learning curves", _levels(report, ("teacher",))
        return draw_curves(title, caption, lines, levels, at, Metric(metric, report.summary.maximise)), caption

    return chart("curves", "Learning curves", draw)


def _pointed_out(report: StudyReport) -> dict[int, tuple[str, str]]:
    """By number, look and label of the trials that are spoken of."""
    found: dict[int, tuple[str, str]] = {}
    default = report.default
    if default is not None:
        found[default.number] = ("default", f"{default.method}, defaults")
    if report.scratch is not None:
        found[report.scratch.number] = (BASELINE, "labels alone")
    if report.winner is not None:
        found[report.winner.number] = ("winner", f"winner: {report.winner.method}")
    return found


def _some(trials: Sequence[TrialView]) -> list[TrialView]:
    """At most `MOST_CURVES` of them, those trained to the end first."""
    ordered = sorted(trials, key=lambda one: (one.status != TrialStatus.COMPLETE, one.number))
    if len(ordered) <= MOST_CURVES:
        return ordered
    complete = [one for one in ordered if one.status == TrialStatus.COMPLETE]
    rest = ordered[len(complete) :]
    kept = complete[:: max(1, math.ceil(len(complete) / MOST_CURVES))]
    room = MOST_CURVES - len(kept)
    return kept + (rest[:: math.ceil(len(rest) / room)] if room > 0 and rest else [])


def _dot(one: TrialView, report: StudyReport) -> Dot:
    mark = TrialStatus.FAILED if one.status.is_failure else TrialStatus.PRUNED
    if one.is_complete:
        mark = TrialStatus.COMPLETE
    return Dot(one.number, mark, None if one.status.is_failure else one.value, tip(one, len(report.trials)))


def tip(one: TrialView, count: int) -> str:
    """What is said of a trial that is pointed at: its values too, unless `count` trials of a chart are too many."""
    value = "no value" if one.value is None else format_score(one.value)
    values = f" {format_sample(one.sample)}" if count <= MOST_SETTINGS else ""
    return f"trial {one.number}, {one.method}: {value} ({describe(one)}){values}"


def _levels(report: StudyReport, names: Sequence[str] = ("teacher", BASELINE)) -> list[Level]:
    labels = {"teacher": "teacher", BASELINE: "labels alone"}
    return [Level(labels[name], value, name) for name, value in report.levels.items() if name in names]


def _th(rank: int) -> str:
    ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending}"
