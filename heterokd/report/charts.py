"""The charts of a page: which trials each one shows, and the sentence that says what is to be seen in it.

A chart that cannot be drawn becomes a sentence: neither the page nor the search is lost to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heterokd.pictures import (
    Curve,
    Dot,
    Level,
    Measured,
    Member,
    Row,
    Strip,
    Vector,
    draw_confusion,
    draw_curves,
    draw_front,
    draw_glance,
    draw_history,
    draw_iou,
    draw_match,
    draw_strips,
)
from heterokd.report.answers import default_side
from heterokd.report.reading import Studied, Tried
from heterokd.report.tables import describe, methods_in_order
from heterokd.report.words import half_width, metric_name, settings, show
from heterokd.study import BASELINE
from heterokd.study.halving import rungs

MOST_CURVES = 150
"""Curves of a chart; of more trials those trained to the end are shown, and of the others every so many."""


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


def glance(studied: Studied) -> Chart:
    """Winner, default settings, scratch and teacher on one axis."""

    def draw() -> tuple[str, str]:
        winner, metric = studied.winner, metric_name(studied.summary["metric"])
        if winner is None or winner["mean"] is None:
            raise NothingToShow("No student was trained to the end, so there is nothing to compare.")
        rows = [_leader_row(winner, f"winner: {winner['method']}", "winner")]
        found = default_side(studied, winner)
        if found is not None:
            default, side = found
            low, high = (None, None) if side.half is None else (side.mean - side.half, side.mean + side.half)
            rows.append(Row(f"{default.method}, defaults", side.mean, low, high, "default", show(side.mean)))
        scratch = studied.scratch
        if scratch is not None and scratch["mean"] is not None:
            rows.append(_leader_row(scratch, "labels alone", "scratch"))
        if "teacher" in studied.levels:
            level = studied.levels["teacher"]
            rows.append(Row("teacher", level, None, None, "teacher", show(level)))
        rows.sort(key=lambda row: -row.mean if studied.summary["maximise"] else row.mean)
        caption = f"{metric} on val. Bars are 95 % intervals of a mean over seeds; the teacher is one network."
        if not winner["confirmed"]:
            caption = f"{metric} on val. One seed each: nothing says how far these values scatter."
        title = "The winner and what it is compared with"
        said = "; ".join(f"{row.label} {row.note}" for row in rows)
        return draw_glance(title, said, rows, f"{metric} on val"), caption

    return chart("glance", "The winner and what it is compared with", draw)


def _leader_row(leader: Mapping[str, Any], label: str, look: str) -> Row:
    low, high = (leader["low"], leader["high"]) if half_width(leader) is not None else (None, None)
    return Row(label, float(leader["mean"]), low, high, look, show(leader["mean"]))


def methods(studied: Studied) -> Chart:
    """Every trial of every method."""

    def draw() -> tuple[str, str]:
        if not any(one.value is not None for one in studied.search):
            raise NothingToShow("No trial has reported a value yet.")
        winner = studied.winner
        strips = []
        for method in methods_in_order(studied):
            own = [one for one in studied.search if one.method == method]
            leaders = [one for one in studied.summary["leaders"] if one["method"] == method and one["confirmed"]]
            best = leaders[0] if leaders and leaders[0]["mean"] is not None else None
            published = next((one.value for one in own if one.origin == "published" and one.is_complete), None)
            look = "winner" if winner is not None and method == winner["method"] else method
            strips.append(
                Strip(
                    method=method,
                    dots=[_dot(one) for one in own],
                    mean=None if best is None else float(best["mean"]),
                    low=None if best is None else best["low"],
                    high=None if best is None else best["high"],
                    published=published,
                    look=look,
                )
            )
        metric = metric_name(studied.summary["metric"])
        caption = _method_sentence(studied, strips)
        title = "Every trial of every method"
        return draw_strips(title, caption, strips, _levels(studied, ("teacher",)), f"{metric} on val"), caption

    return chart("methods", "Every trial of every method", draw)


def _method_sentence(studied: Studied, strips: Sequence[Strip]) -> str:
    complete = [(strip, [dot.value for dot in strip.dots if dot.mark == "complete"]) for strip in strips]
    tried = [(strip, [value for value in values if value is not None]) for strip, values in complete]
    tried = [(strip, values) for strip, values in tried if values]
    if not tried:
        return "No trial was trained to the end."
    pick = max if studied.summary["maximise"] else min
    strip, values = pick(tried, key=lambda one: pick(one[1]))
    confirmed = [strip for strip in strips if strip.mean is not None]
    said = f"The best single value, {show(pick(values))}, is {strip.method}'s"
    if confirmed:
        first = pick(confirmed, key=lambda one: one.mean or 0.0)
        said += f"; the best mean over fresh seeds, {show(first.mean)}, is {first.method}'s"
    none = [strip.method for strip in strips if not any(dot.mark == "complete" for dot in strip.dots)]
    if none:
        said += f"; nothing of {', '.join(none)} was trained to the end"
    return f"{said}. Dots of the search are the luckier, the more there are: compare diamonds."


def history(studied: Studied) -> Chart:
    """Trials in their order, and the best so far."""

    def draw() -> tuple[str, str]:
        dots = [_dot(one) for one in studied.search if one.state != "running"]
        complete = [dot for dot in dots if dot.mark == "complete" and dot.value is not None]
        if not dots:
            raise NothingToShow("No trial has ended yet.")
        counts = {mark: sum(dot.mark == mark for dot in dots) for mark in ("complete", "pruned", "failed")}
        caption = (
            f"{counts['complete']} trained to the end, {counts['pruned']} stopped early, {counts['failed']} failed."
        )
        if complete:
            pick = max if studied.summary["maximise"] else min
            best = pick(complete, key=lambda dot: dot.value or 0.0)
            rank = 1 + sum(dot.number < best.number for dot in dots)
            first = f"The best value of the search, {show(best.value)}, came with trial {best.number}"
            caption = f"{first}, the {_th(rank)} of {len(dots)}. {caption}"
        metric = f"{metric_name(studied.summary['metric'])} on val"
        title = "Best value so far"
        drawn = draw_history(title, caption, dots, _levels(studied), metric, maximise=studied.summary["maximise"])
        return drawn, caption

    return chart("history", "Best value so far", draw)


def curves(studied: Studied) -> Chart:
    """The metric of every trial over its epochs."""

    def draw() -> tuple[str, str]:
        trials = [one for one in studied.trials if len(one.curve) > 0]
        if not trials:
            raise NothingToShow("No trial has reported an epoch yet.")
        pointed = _pointed_out(studied)
        others = [one for one in trials if one.number not in pointed]
        shown = _some(others)
        lines = [
            Curve(one.epochs, one.curve, "complete" if one.state == "complete" else "pruned", tip=_tip(one))
            for one in shown
        ]
        for one in trials:
            if one.number in pointed:
                look, label = pointed[one.number]
                lines.append(Curve(one.epochs, one.curve, look, label, _tip(one)))
        stopped = sum(one.state in ("pruned", "paused") for one in trials)
        at = rungs(studied.experiment, studied.experiment.training.epochs) if studied.experiment.search.prune else ()
        caption = f"{stopped} of {len(trials)} trainings were stopped early"
        if at:
            caption += f", at rungs after epoch {_and(list(map(str, at)))}"
        caption += "; the winner, scratch and default settings stand out."
        if len(shown) < len(others):
            caption += f" {len(others) - len(shown)} of {len(trials)} curves are left out."
        metric = f"{metric_name(studied.summary['metric'])} on val"
        title = "Learning curves"
        return draw_curves(title, caption, lines, _levels(studied, ("teacher",)), at, metric), caption

    return chart("curves", "Learning curves", draw)


def _pointed_out(studied: Studied) -> dict[int, tuple[str, str]]:
    """By number, look and label of the trials that are spoken of."""
    found: dict[int, tuple[str, str]] = {}
    default = studied.default
    if default is not None:
        found[default.number] = ("default", f"{default.method}, defaults")
    if studied.scratch is not None:
        found[int(studied.scratch["number"])] = ("scratch", "labels alone")
    if studied.winner is not None:
        found[int(studied.winner["number"])] = ("winner", f"winner: {studied.winner['method']}")
    return found


def _some(trials: Sequence[Tried]) -> list[Tried]:
    """At most `MOST_CURVES` of them, those trained to the end first."""
    ordered = sorted(trials, key=lambda one: (one.state != "complete", one.number))
    if len(ordered) <= MOST_CURVES:
        return ordered
    complete = [one for one in ordered if one.state == "complete"]
    rest = ordered[len(complete) :]
    kept = complete[:: max(1, math.ceil(len(complete) / MOST_CURVES))]
    room = MOST_CURVES - len(kept)
    return kept + (rest[:: math.ceil(len(rest) / room)] if room > 0 and rest else [])


def fronts(studied: Studied, measured: Measured | None) -> list[Chart]:
    """Accuracy against each cost, where costs count; the teacher stands beside the students if it was weighed."""
    found = []
    for key in studied.experiment.search.costs:
        name = "parameters" if key == "params_m" else "latency"
        found.append(chart(f"front-{name}", f"Accuracy and {name}", lambda key=key: _front(studied, measured, key)))  # type: ignore[misc]
    return found


def _front(studied: Studied, measured: Measured | None, key: str) -> tuple[str, str]:
    members, facts = studied.summary.get("front") or (), studied.summary.get("students") or {}
    if not members:
        raise NothingToShow("No student was trained to the end, so there is no front.")
    on_front = {one["student"] for one in members}
    shown = [Member(one["student"], one[key], one["expected"], True, "") for one in members if key in one]
    for leader in studied.summary["leaders"]:
        student = leader["student"]
        if student not in on_front and key in facts.get(student, {}):
            on_front.add(student)
            shown.append(Member(student, facts[student][key], leader["expected"], False, ""))
    teacher = (measured.networks.get("teacher") or {}).get(key) if measured is not None else None
    if teacher and "teacher" in studied.levels:
        shown.append(Member("teacher", teacher, studied.levels["teacher"], False, "teacher"))
    cost = "million parameters" if key == "params_m" else "ms an image on one core"
    metric = f"{metric_name(studied.summary['metric'])} to expect on val"
    names = _and([one["student"] for one in members])
    none = (
        "is the only student that none beats in everything" if len(members) == 1 else "are beaten by none in everything"
    )
    caption = f"{names} {none} (filled); others cost more and reach less (hollow). Each can be promoted: --trial N."
    title = f"{metric} against {cost}"
    name = "front-parameters" if key == "params_m" else "front-latency"
    return draw_front(name, title, caption, shown, cost, metric), caption


def seen(studied: Studied, measured: Measured | None) -> list[Chart]:
    """What the winner sees: confusion matrix or IoU of every class, and CKA with its teacher."""
    if studied.winner is None:
        return []
    known = measured if measured is not None and measured.winner == studied.winner["number"] else None
    is_classes = studied.experiment.data.task == "classification"
    first = chart("confusion", "What is taken for what", lambda: _confusion(studied, known))
    if not is_classes:
        first = chart("iou", "IoU of every class", lambda: _iou(studied, known))
    return [first, chart("cka", "Teacher and student, stage by stage", lambda: _cka(studied, known))]


def _known(measured: Measured | None, part: str, is_there: bool) -> Measured:
    if measured is None:
        raise NothingToShow("The winner was not measured on val when its search ended: heterokd report NAME --measure")
    if not is_there:
        raise NothingToShow(f"This could not be measured ({measured.missing.get(part, 'nothing says why')}).")
    return measured


def _confusion(studied: Studied, measured: Measured | None) -> tuple[str, str]:
    known = _known(measured, "confusion", measured is not None and measured.confusion is not None)
    assert known.confusion is not None
    counts = known.confusion.copy()
    errors = int(counts.sum() - counts.trace())
    caption = f"{errors} of {known.images} images of val are taken for another class"
    for place in range(len(counts)):
        counts[place, place] = 0
    if errors:
        row, column = divmod(int(counts.argmax()), len(counts))
        caption += f", most often {known.classes[row]} for {known.classes[column]} ({counts[row, column]})"
    if known.scratch_confusion is not None:
        gained = known.confusion.diagonal() - known.scratch_confusion.diagonal()
        best, total = int(gained.argmax()), int(gained.sum())
        caption += f"; {total:+d} right beside labels alone, most of class {known.classes[best]} ({gained[best]:+d})"
    caption += ". These are the trainings that found both configurations, not their means over seeds."
    made = Vector("confusion", "Confusion matrix of the winner on val", caption, 1.0)
    scratch = () if known.scratch_confusion is None else (known.scratch_confusion,)
    draw_confusion(made, known.confusion, known.classes, *scratch)
    return made.text, caption


def _iou(studied: Studied, measured: Measured | None) -> tuple[str, str]:
    known = _known(measured, "iou", measured is not None and bool(measured.iou))
    student = next((name for name in known.iou if name not in ("teacher", BASELINE)), BASELINE)
    finite = [(value, place) for place, value in enumerate(known.iou[student]) if math.isfinite(value)]
    caption = f"IoU of each class on {known.images} images of val"
    if finite:
        (worst, at), (best, top) = min(finite), max(finite)
        caption += f": {known.classes[top]} is found best ({best:.2f}), {known.classes[at]} worst ({worst:.2f})"
    if BASELINE in known.iou and student != BASELINE:
        caption += "; the class that distillation helps most stands first"
    made = Vector("iou", "IoU of every class on val", f"{caption}.", 1.0)
    draw_iou(made, known.iou, known.classes)
    return made.text, f"{caption}."


def _cka(studied: Studied, measured: Measured | None) -> tuple[str, str]:
    known = _known(measured, "cka", measured is not None and bool(measured.similarity))
    pairs = [(value, row, column) for row, own in enumerate(known.similarity) for column, value in enumerate(own)]
    value, row, column = max(pairs)
    caption = (
        f"CKA on {known.compared} images of val: 1 is the same up to rotation and scale. Most alike are the student's "
        f"stage {row + 1} and the teacher's stage {column + 1} ({value:.2f}); the last stages, which decide, have "
        f"{known.similarity[-1][-1]:.2f}."
    )
    assert studied.winner is not None
    networks = known.networks
    names = [str(networks.get(one, {}).get("network", one)) for one in ("teacher", "student")]
    made = Vector("cka", "CKA between the stages of teacher and winner", caption, 1.0)
    draw_match(made, known.similarity, *names)
    return made.text, caption


def _dot(one: Tried) -> Dot:
    mark = "complete" if one.is_complete else "failed" if one.state == "failed" else "pruned"
    return Dot(one.number, mark, None if mark == "failed" else one.value, _tip(one))  # type: ignore[arg-type]


def _tip(one: Tried) -> str:
    value = "no value" if one.value is None else show(one.value)
    return f"trial {one.number}, {one.method}: {value} ({describe(one)}) {settings(one.sample)}"


def _levels(studied: Studied, names: Sequence[str] = ("teacher", BASELINE)) -> list[Level]:
    labels = {"teacher": "teacher", BASELINE: "labels alone"}
    return [Level(labels[name], value, name) for name, value in studied.levels.items() if name in names]


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _th(rank: int) -> str:
    ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending}"
