"""Charts of a search: the winner and its references, the trials of each method, their order and learning curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial

from heterokd.formatting import format_sample, format_score, join_words
from heterokd.methods import BASELINE
from heterokd.report.cards import default_side, reference_methods
from heterokd.report.chart import Chart, NothingToShow, draw_chart
from heterokd.report.figures.comparison import Row, Strip, draw_glance, draw_strips
from heterokd.report.figures.history import Curve, Dot, Level, draw_curves, draw_history
from heterokd.report.figures.svg import Vector
from heterokd.report.study_data import StudyReport
from heterokd.report.tables import describe_end, methods_in_order
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.pruner import checkpoint_epochs
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.trial_view import TrialView

MOST_CURVES = 150
"""Maximum number of learning curves: complete trials first, and an even selection of the others."""

MOST_SAMPLES = 500
"""Maximum number of trials in a chart with samples in the tooltips: of thousands they would be most of the page."""


def overview_charts(report: StudyReport) -> list[Chart]:
    """Draw the winner with its references, and the trials of every method."""
    return [
        draw_chart("glance", "Winner and references", partial(_glance, report)),
        draw_chart("methods", "Trials of every method", partial(_methods, report)),
    ]


def course_charts(report: StudyReport) -> list[Chart]:
    """Draw the best value so far, and the learning curves."""
    return [
        draw_chart("history", "Best value so far", partial(_history, report)),
        draw_chart("curves", "Learning curves", partial(_curves, report)),
    ]


def _glance(report: StudyReport, made: Vector) -> str:
    winner, scratch = report.winner, report.scratch
    if winner is None or winner.mean is None:
        raise NothingToShow("No trial is complete, so there is nothing to compare.")
    rows = [_leader_row(winner, winner.mean, f"{winner.method} (winner)", "winner")]
    for method in reference_methods(report):
        found = default_side(report, winner, method)
        if found is not None:
            default, side = found
            low, high = (None, None) if side.half is None else (side.mean - side.half, side.mean + side.half)
            rows.append(Row(f"{default.method} (defaults)", "default", side.mean, low, high))
    if scratch is not None and scratch.mean is not None:
        rows.append(_leader_row(scratch, scratch.mean, BASELINE, BASELINE))
    if "teacher" in report.levels:
        rows.append(Row("teacher", "teacher", report.levels["teacher"]))
    rows.sort(key=lambda row: -report.sign * row.mean)
    draw_glance(made, rows, report.axis)
    if not winner.confirmed:
        return f"{report.axis}. One seed each: a fresh seed will reach less than the best of a search."
    return f"{report.axis}. Bars are 95 % intervals of a mean over seeds; the teacher is a single network."


def _leader_row(leader: RankedConfig, mean: float, label: str, look: str) -> Row:
    return Row(label, look, mean, *((leader.low, leader.high) if leader.half_width is not None else (None, None)))


def _methods(report: StudyReport, made: Vector) -> str:
    if not any(trial.value is not None for trial in report.search):
        raise NothingToShow("No trial has reported a value yet.")
    strips = []
    for method in methods_in_order(report):
        trials = [trial for trial in report.search if trial.method == method]
        best = next((leader for leader in report.summary.leaders if leader.method == method and leader.confirmed), None)
        strips.append(
            Strip(
                method=method,
                dots=[_dot(trial, report) for trial in trials],
                mean=None if best is None else best.mean,
                low=None if best is None else best.low,
                high=None if best is None else best.high,
                published=next((t.value for t in trials if t.origin == "published" and t.is_complete), None),
                is_winner=report.winner is not None and method == report.winner.method,
            )
        )
    draw_strips(made, strips, _levels(report, ("teacher",)), report.axis)
    return _methods_caption(report, strips)


def _methods_caption(report: StudyReport, strips: Sequence[Strip]) -> str:
    complete = [
        (report.sign * dot.value, dot.value, strip.method)
        for strip in strips
        for dot in strip.dots
        if dot.mark == TrialStatus.COMPLETE and dot.value is not None
    ]
    if not complete:
        return "No trial is complete."
    _, value, method = max(complete, key=lambda found: found[0])
    caption = f"Best single value: {format_score(value)}, {method}"
    confirmed = [(report.sign * strip.mean, strip.mean, strip.method) for strip in strips if strip.mean is not None]
    if confirmed:
        _, mean, method = max(confirmed, key=lambda found: found[0])
        caption += f"; best mean over fresh seeds: {format_score(mean)}, {method}"
    missing = [strip.method for strip in strips if strip.method not in {method for _, _, method in complete}]
    if missing:
        caption += f"; no complete trial: {', '.join(missing)}"
    if confirmed:
        return f"{caption}. More trials give a luckier best dot: compare diamonds."
    return f"{caption}. No trial was repeated: more trials of a method give a luckier best value."


def _history(report: StudyReport, made: Vector) -> str:
    dots = [_dot(trial, report) for trial in report.search if trial.status != TrialStatus.RUNNING]
    if not dots:
        raise NothingToShow("No trial has ended yet.")
    draw_history(made, dots, _levels(report), report.axis, maximise=report.summary.maximise)
    counts = Counter(dot.mark for dot in dots)
    caption = (
        f"{counts[TrialStatus.COMPLETE]} complete, {counts[TrialStatus.PRUNED]} stopped early, "
        f"{counts[TrialStatus.FAILED]} failed."
    )
    complete = [
        (report.sign * dot.value, -dot.number)
        for dot in dots
        if dot.mark == TrialStatus.COMPLETE and dot.value is not None
    ]
    if not complete:
        return caption
    value, number = max(complete)
    rank = 1 + sum(dot.number < -number for dot in dots)
    best = f"Best value of the search: {format_score(report.sign * value)}, trial {-number} ({rank} of {len(dots)})"
    return f"{best}. {caption}"


def _curves(report: StudyReport, made: Vector) -> str:
    trials = [trial for trial in report.trials if len(trial.curve) > 0]
    if not trials:
        raise NothingToShow("No trial has reported an epoch yet.")
    highlighted = _highlighted(report)
    others = [trial for trial in trials if trial.number not in highlighted]
    shown = _selection(others)
    lines = [
        Curve(trial.epochs, trial.curve, "complete" if trial.is_complete else "pruned", tip=tooltip(trial, len(shown)))
        for trial in shown
    ]
    lines += [
        Curve(trial.epochs, trial.curve, *highlighted[trial.number], tooltip(trial, 1))
        for trial in trials
        if trial.number in highlighted
    ]
    settings, epochs = report.experiment.search, report.experiment.training.epochs
    rungs = checkpoint_epochs(report.experiment, epochs) if settings.prune and settings.pruner is None else ()
    draw_curves(made, lines, _levels(report, ("teacher",)), rungs, report.axis, maximise=report.summary.maximise)
    stopped = sum(trial.status in (TrialStatus.PRUNED, TrialStatus.PAUSED) for trial in trials)
    caption = f"{stopped} of {len(trials)} trainings were stopped early"
    if settings.pruner is not None:
        caption += f" by {settings.pruner.name.rpartition(':')[2]}"
    if rungs:
        caption += f", at rungs after epoch {join_words(list(map(str, rungs)))}"
    if highlighted:
        caption += f"; highlighted: {join_words([label for _, label in highlighted.values()])}"
    if len(shown) < len(others):
        caption += f"; {len(others) - len(shown)} of {len(trials)} curves are left out"
    return f"{caption}."


def _highlighted(report: StudyReport) -> dict[int, tuple[str, str]]:
    """Return look and label of the trials that the page compares, by number."""
    found: dict[int, tuple[str, str]] = {}
    for method in reference_methods(report):
        default = report.published(method)
        if default is not None:
            found[default.number] = ("default", f"{method} (defaults)")
    if report.scratch is not None:
        found[report.scratch.number] = (BASELINE, BASELINE)
    if report.winner is not None:
        found[report.winner.number] = ("winner", f"{report.winner.method} (winner)")
    return found


def _selection(trials: Sequence[TrialView]) -> list[TrialView]:
    """Select at most `MOST_CURVES` trials, complete ones first."""
    ordered = sorted(trials, key=lambda trial: (not trial.is_complete, trial.number))
    if len(ordered) <= MOST_CURVES:
        return ordered
    count = sum(trial.is_complete for trial in ordered)
    complete, rest = ordered[:count], ordered[count:]
    kept = complete[:: max(1, math.ceil(count / MOST_CURVES))]
    room = MOST_CURVES - len(kept)
    return kept + (rest[:: math.ceil(len(rest) / room)] if room > 0 and rest else [])


def _dot(trial: TrialView, report: StudyReport) -> Dot:
    mark = TrialStatus.COMPLETE if trial.is_complete else TrialStatus.PRUNED
    if trial.status.is_failure:
        mark = TrialStatus.FAILED
    value = None if trial.status.is_failure else trial.value
    return Dot(trial.number, mark, value, tooltip(trial, len(report.trials)))


def tooltip(trial: TrialView, count: int) -> str:
    """Describe a trial in a chart of `count` trials, with its sample unless there are too many."""
    value = "no value" if trial.value is None else format_score(trial.value)
    sample = f" {format_sample(trial.sample)}" if count <= MOST_SAMPLES else ""
    return f"trial {trial.number}, {trial.method}: {value} ({describe_end(trial)}){sample}"


def _levels(report: StudyReport, names: Sequence[str] = ("teacher", BASELINE)) -> list[Level]:
    return [Level(name, value, name) for name, value in report.levels.items() if name in names]
