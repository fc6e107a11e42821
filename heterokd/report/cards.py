"""The answer at a glance: the winner against scratch, default settings and the teacher, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from heterokd.formatting import format_duration, format_estimate, format_percent, format_score, metric_name
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.report.measured import Measured
from heterokd.report.study_data import StudyReport
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.plan.record import Taken
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.significance import Comparison
from heterokd.study.trial_view import TrialView


@dataclass(frozen=True)
class Card:
    """One part of the answer.

    Attributes:
        title: the question.
        figure: the answer in large letters.
        mark: how sure it is, in a word or two; "" where that is no question.
        tone: good, open or plain; the mark says the same in words.
        text: one or two sentences.
    """

    title: str
    figure: str
    mark: str
    tone: str
    text: str


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        mean: of its metric.
        half: half of the mean's 95 % interval; None where nothing says how much seeds scatter.
        seeds: trainings that the mean is of.
    """

    mean: float
    half: float | None
    seeds: int


def cards(report: StudyReport) -> list[Card]:
    """What a reader wants to know first; without a winner only what it cost."""
    winner = report.winner
    found = []
    if winner is not None and winner.mean is not None:
        best = Side(winner.mean, winner.half_width if winner.confirmed else None, len(winner.seeds))
        found = [_scratch(report, best), _default(report, winner, best), _teacher(report, best)]
    return [*found, _cost(report), *([] if report.measured is None else [_size(report.measured)])]


def default_side(report: StudyReport, winner: RankedConfig) -> tuple[TrialView, Side] | None:
    """Distillation with default settings; None where the study did not try it, or it is the winner itself.

    Its own value, unlike that of a sample, is not the best of many: a single training is an honest, if noisy, figure.
    The noise is that of all repeated configurations together, from which the winner's interval comes too.
    """
    default = report.default
    if default is None or default.number == winner.number or default.value is None:
        return None
    confirmed = report.summary.confirmed(default.number)
    if confirmed is not None and confirmed.mean is not None:
        return default, Side(confirmed.mean, confirmed.half_width, len(confirmed.seeds))
    half = winner.half_width if winner.confirmed else None
    single = None if half is None else half * math.sqrt(len(winner.seeds))
    return default, Side(default.value, single, 1)


def _against(report: StudyReport, best: Side, other: Side) -> tuple[str, str, str, str]:
    """Difference, mark, tone and the sentence on how sure it is; better is positive."""
    sign = 1 if report.summary.maximise else -1
    difference = sign * (best.mean - other.mean)
    figure = f"{difference:+.4f}"
    if best.half is None or other.half is None:
        return figure, "one seed", "open", "One seed each: the difference may be noise."
    width = math.hypot(best.half, other.half)
    text = f"95 % interval {difference - width:+.4f} to {difference + width:+.4f}"
    if abs(difference) > width:
        return figure, "real" if difference > 0 else "worse", "good" if difference > 0 else "open", f"{text}."
    return figure, "a tie", "open", f"{text}: it may be noise."


def _scratch(report: StudyReport, best: Side) -> Card:
    title, scratch = "Over labels alone", report.scratch
    if report.winner is not None and report.winner.method == BASELINE:
        return Card(title, "none", "no gain", "open", "The student trained on labels alone is the best one.")
    if scratch is None or scratch.mean is None:
        return Card(title, "unknown", "", "plain", "The study has no scratch trial that was trained to the end.")
    side = Side(scratch.mean, scratch.half_width, len(scratch.seeds))
    figure, mark, tone, sure = _against(report, best, side)
    if mark == "real" and paired_tie(report) is not None:
        mark, tone = "likely", "plain"
    return Card(title, figure, mark, tone, f"Scratch reaches {format_score(side.mean)} ({_seeds(side.seeds)}). {sure}")


def paired_tie(report: StudyReport) -> Comparison | None:
    """The paired comparison of winner and scratch where it does not find the difference that their intervals show.

    It rests on the seeds that both have, which are fewer.
    """
    winner, scratch = report.winner, report.scratch
    if winner is None or scratch is None:
        return None
    names = [{one.method, f"{one.method} (trial {one.number})"} for one in (winner, scratch)]
    for one in report.comparisons:
        if (one.first in names[0] and one.second in names[1]) or (one.first in names[1] and one.second in names[0]):
            return one if one.verdict in ("tie", "unknown") else None
    return None


def _default(report: StudyReport, winner: RankedConfig, best: Side) -> Card:
    found = default_side(report, winner)
    title = "Over default settings"
    if found is None:
        default = report.default
        if default is not None and default.number == winner.number:
            return Card(title, "none", "no gain", "open", f"{default.method} with its published setting is the winner.")
        method = VANILLA_KD[report.experiment.data.task]
        for one in report.search:
            if one.method == method and one.origin == "published" and one.status == TrialStatus.PRUNED and one.epochs:
                text = f"{method} as published (trial {one.number}) fell behind and was stopped after epoch"
                return Card(
                    title, "ahead", "stopped early", "plain", f"{text} {one.epochs[-1]}, at {format_score(one.value)}."
                )
        return Card(
            title, "unknown", "", "plain", "Distillation with default settings was not trained to the end here."
        )
    default, side = found
    figure, mark, tone, sure = _against(report, best, side)
    where = "" if default.student == (winner.student or default.student) else f" on {default.student}"
    text = f"{default.method} as published{where} (trial {default.number}) reaches {format_score(side.mean)}"
    return Card(title, figure, mark, tone, f"{text} ({_seeds(side.seeds)}). {sure}")


def _teacher(report: StudyReport, best: Side) -> Card:
    title, level = "Against the teacher", report.levels.get("teacher")
    if level is None:
        known = report.summary.teacher
        text = "The teacher was not measured on this metric."
        if known is not None:
            text += f" Its {metric_name(known.metric)} is {format_percent(known.val_score)}."
        return Card(title, "unknown", "", "plain", text)
    sign = 1 if report.summary.maximise else -1
    difference = sign * (best.mean - level)
    text = f"The teacher reaches {format_score(level)}; it is one network, measured once."
    mark, tone = ("one seed", "open") if best.half is None else ("a tie", "plain")
    if best.half is not None and abs(difference) > best.half:
        mark, tone = ("ahead", "good") if difference > 0 else ("behind", "plain")
    ratio = None if report.measured is None else _ratio(report.measured, "params_m")
    if ratio is not None and level > 0 and sign > 0:
        share = format_percent(best.mean / level)
        text = f"{share} of its {format_score(level)}, with {_times(ratio, 'the parameters')}."
    return Card(title, f"{difference:+.4f}", mark, tone, text)


def _cost(report: StudyReport) -> Card:
    plan = None if report.plan is None else report.plan.plan
    taken = (report.plan.taken if report.plan else None) or Taken()
    spent = report.summary.spent
    seconds = taken.seconds or 3600 * (spent.get("hours") or 0.0)
    parts = []
    hours = taken.device_hours or spent.get("gpu_hours")
    if hours:
        parts.append(f"{hours:.2g} {plan.device_unit if plan else 'device-hours'} of training")
    if taken.money is not None and plan is not None:
        parts.append(f"{taken.money:.2f} {plan.currency}")
    count = len(report.trials)
    text = f"{count} training{'' if count == 1 else 's'}{''.join(f', {part}' for part in parts)}."
    if plan is not None:
        text += f" Planned: {format_estimate(plan.seconds, format_duration)}."
    return Card("The search took", format_duration(seconds) if seconds else "unknown", "", "plain", text)


def _size(measured: Measured) -> Card:
    params_m, latency_ms = measured.cost("student", "params_m"), measured.cost("student", "latency_ms")
    if params_m is None:
        why = measured.missing.get("networks", "it was not measured")
        return Card("The student", "unknown", "", "plain", f"Its size is not known: {why}.")
    text = f"parameters of {measured.networks['student'].network}: "
    parts = [f"{latency_ms:.3g} ms an image on one core"] if latency_ms else []
    ratio, faster = _ratio(measured, "params_m"), _ratio(measured, "latency_ms")
    if ratio is not None:
        parts.append(f"{_times(ratio, 'what the teacher has')}")
    if faster is not None:
        parts.append(f"{_times(faster, 'its time')}")
    return Card("The student", f"{params_m:.3g} M", "", "plain", f"{text}{', '.join(parts)}.")


def _ratio(measured: Measured, key: str) -> float | None:
    """The student's share of what the teacher has."""
    student, teacher = measured.cost("student", key), measured.cost("teacher", key)
    return student / teacher if student and teacher else None


def _times(ratio: float, what: str) -> str:
    return f"{100 * ratio:.0f} % of {what}" if ratio < 1 else f"{ratio:.1f} times {what}"


def _seeds(count: int) -> str:
    return "one training" if count == 1 else f"mean of {count} seeds"
