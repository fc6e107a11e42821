"""The answer at a glance: the winner against scratch, default settings and the teacher, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from heterokd.formatting import format_duration, format_estimate, format_percent, format_score, metric_name
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.report.measured import Measured
from heterokd.report.study_data import StudyReport
from heterokd.report.wording import best_distilled, weak_teacher
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.gain import Gain, gain
from heterokd.study.plan.record import Taken
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.trial_view import TrialView


@dataclass(frozen=True)
class Card:
    """A part of the answer.

    Attributes:
        title: the question.
        figure: the answer in large letters.
        text: one or two sentences.
        mark: how sure it is, in a word or two, or "".
        tone: good, open or plain, for the colour; the mark says the same in words.
    """

    title: str
    figure: str
    text: str
    mark: str = ""
    tone: str = "plain"


@dataclass(frozen=True)
class Side:
    """A side of a comparison.

    Attributes:
        mean: mean of the metric.
        half: half width of the mean's 95 % interval; None if the variance over seeds is unknown.
        seeds: number of trainings.
        is_fresh: whether none of them was chosen for its value.
    """

    mean: float
    half: float | None
    seeds: int
    is_fresh: bool = True

    @property
    def text(self) -> str:
        """The mean, and of how many trainings."""
        count = "a single training" if self.seeds == 1 else f"mean of {self.seeds} seeds"
        return f"{format_score(self.mean)} ({count})"


def cards(report: StudyReport) -> list[Card]:
    """Return the cards of a study; without a winner, only that of its cost."""
    winner = report.winner
    found = []
    if winner is not None and winner.mean is not None:
        best = Side(winner.mean, winner.half_width, len(winner.seeds), winner.confirmed)
        found = [_scratch(report, best)]
        found += [_default(report, winner, best, method) for method in reference_methods(report)]
        found.append(_teacher(report, best))
    return [*found, _cost(report), *([] if report.measured is None else [_student(report, report.measured)])]


def reference_methods(report: StudyReport) -> list[str]:
    """Return the methods whose default settings the winner is compared with: Hinton's distillation, and its method."""
    own = BASELINE if report.winner is None else report.winner.method
    return [method for method in dict.fromkeys((VANILLA_KD[report.experiment.data.task], own)) if method != BASELINE]


def default_side(report: StudyReport, winner: RankedConfig, method: str) -> tuple[TrialView, Side] | None:
    """Return a method with default settings; None if the study did not complete it, or if it is the winner.

    Unlike that of a sample, its value is not the best of many: a single training is unbiased, if noisy. Its noise is
    that of all repeated configurations together, from which the winner's interval comes, too.
    """
    default = report.published(method)
    if default is None or default.number == winner.number or default.value is None:
        return None
    confirmed = report.summary.confirmed(default.number)
    if confirmed is not None and confirmed.mean is not None:
        return default, Side(confirmed.mean, confirmed.half_width, len(confirmed.seeds))
    half = winner.half_width
    return default, Side(default.value, None if half is None else half * math.sqrt(len(winner.seeds)), 1)


def _compare(report: StudyReport, title: str, text: str, best: Side, other: Side) -> Card:
    """Make the card of a difference, positive where the winner is better; `text` describes the other side."""
    difference = report.sign * (best.mean - other.mean)
    width = None if best.half is None or other.half is None else math.hypot(best.half, other.half)
    return _graded(title, text, Gain(difference, width, best.is_fresh and other.is_fresh))


def _graded(title: str, text: str, found: Gain) -> Card:
    """Make the card of a gain; `text` describes what it is compared with."""
    figure, grade = f"{found.difference:+.4f}", found.grade
    if grade == "unknown":
        return Card(title, figure, f"{text}. One seed each: the difference may be noise.", "one seed", "open")
    text = f"{text}. {found.interval[0].upper()}{found.interval[1:]}"
    if not found.is_fresh:
        text += ", from single seeds"
    return Card(title, figure, f"{text}.", grade, "good" if grade == "significant" else "open")


def _scratch(report: StudyReport, best: Side) -> Card:
    title, scratch = "Gain over scratch", report.scratch
    if report.winner is not None and report.winner.method == BASELINE:
        distilled = best_distilled(report.summary)
        found = None if distilled is None else gain(distilled, report.winner, maximise=report.summary.maximise)
        if distilled is None or found is None:
            return Card(title, "unknown", "No student was distilled to the end.", "", "open")
        text = f"Best distilled student: {distilled.method}, trial {distilled.number}, {format_score(distilled.mean)}"
        return _graded(title, text, found)
    if scratch is None or scratch.mean is None:
        return Card(title, "unknown", "The study has no complete scratch trial.")
    side = Side(scratch.mean, scratch.half_width, len(scratch.seeds), scratch.confirmed)
    return _compare(report, title, f"Scratch reaches {side.text}", best, side)


def _default(report: StudyReport, winner: RankedConfig, best: Side, method: str) -> Card:
    found, title = default_side(report, winner, method), f"Gain over {method}'s defaults"
    if found is not None:
        default, side = found
        where = "" if default.student == (winner.student or default.student) else f" on {default.student}"
        text = f"{method} as published{where} (trial {default.number}) reaches {side.text}"
        return _compare(report, title, text, best, side)
    published = report.published(method)
    if published is not None and published.number == winner.number:
        return Card(title, "none", f"{method} with its published setting is the winner.", "no gain", "open")
    for trial in report.search:
        is_default = trial.method == method and trial.origin == "published"
        if is_default and trial.status == TrialStatus.PRUNED and trial.epochs:
            text = f"{method} as published (trial {trial.number}) fell behind and was stopped after epoch"
            text = f"{text} {trial.epochs[-1]}, at {format_score(trial.value)}."
            return Card(title, "ahead", text, "stopped early")
    return Card(title, "unknown", f"The study has no complete trial of {method} with default settings.")


def _teacher(report: StudyReport, best: Side) -> Card:
    title, level = "Difference to the teacher", report.levels.get("teacher")
    if level is None:
        text, known = "The teacher was not measured on this metric.", report.summary.teacher
        if known is not None:
            text += f" Its {metric_name(known.metric)} is {format_percent(known.val_score)}."
        return Card(title, "unknown", text)
    difference = report.sign * (best.mean - level)
    text = f"The teacher reaches {format_score(level)}; it is a single network, measured once."
    mark, tone = ("one seed", "open") if best.half is None else ("tie", "plain")
    if best.half is not None and abs(difference) > best.half:
        mark, tone = ("ahead", "good") if difference > 0 else ("behind", "plain")
    weak = weak_teacher(report.summary)
    if weak is not None:
        return Card(title, f"{difference:+.4f}", weak, "weak teacher", "open")
    costs = _student_costs(report)
    share = None if report.measured is None or not costs else _share(report.measured, costs[0])
    if share is not None and level > 0 and report.summary.maximise:
        part = f"{format_percent(best.mean / level)} of its {format_score(level)}"
        if best.mean > level:
            part = f"{format_score(best.mean)}, more than the teacher's {format_score(level)}"
        text = f"The student reaches {part}, with {share} {STUDENT_COSTS[costs[0]].name}."
    return Card(title, f"{difference:+.4f}", text, mark, tone)


def _cost(report: StudyReport) -> Card:
    plan = None if report.plan is None else report.plan.plan
    taken = (report.plan.taken if report.plan else None) or Taken()
    spent = report.summary.spent
    seconds = taken.seconds or 3600 * (spent.get("hours") or 0.0)
    hours = taken.device_hours or spent.get("gpu_hours")
    count = len(report.trials)
    parts = [f"{count} training{'' if count == 1 else 's'}"]
    if hours:
        parts.append(f"{hours:.2g} {plan.device_unit if plan else 'device-hours'} of training")
    if taken.money is not None and plan is not None:
        parts.append(f"{taken.money:.2f} {plan.currency}")
    text = f"Wall time, with the teacher's fit and the caches: {', '.join(parts)}."
    if plan is not None:
        text += f" Planned: {format_estimate(plan.seconds, format_duration)}."
    return Card("Duration of the search", format_duration(seconds) if seconds else "unknown", text)


def _student(report: StudyReport, measured: Measured) -> Card:
    costs = _student_costs(report)
    if not costs:
        return Card("Student", "unknown", f"Its size is unknown: {measured.missing.get('networks', 'not measured')}.")
    figures, texts = {}, {}
    for key in costs:
        kind, share = STUDENT_COSTS[key], _share(measured, key)
        figures[key] = f"{measured.cost('student', key):.{kind.digits}g} {kind.symbol}"
        texts[key] = "" if share is None else f" ({share})"
    first, *others = costs
    text = f"{STUDENT_COSTS[first].name} of {measured.networks['student'].network}{texts[first]}"
    text += "".join(f"; {STUDENT_COSTS[key].name} {figures[key]}{texts[key]}" for key in others)
    return Card("Student", figures[first], f"{text[0].upper()}{text[1:]}.")


def _student_costs(report: StudyReport) -> list[str]:
    """Return the measured costs of the student: objectives first, then those known before training, then the others."""
    measured = report.measured
    if measured is None or "student" not in measured.networks:
        return []
    known = report.summary.students.get(measured.networks["student"].network, {})
    keys = dict.fromkeys((*report.experiment.search.cost_objectives, *known, *measured.networks["student"].costs))
    return [key for key in keys if key in STUDENT_COSTS and measured.cost("student", key)]


def _share(measured: Measured, key: str) -> str | None:
    """Return the student's share of the teacher's cost in words, or None."""
    student, teacher = measured.cost("student", key), measured.cost("teacher", key)
    if not student or not teacher:
        return None
    ratio = student / teacher
    return f"{100 * ratio:.0f} % of the teacher's" if ratio < 1 else f"{ratio:.1f} times the teacher's"
