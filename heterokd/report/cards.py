"""The answer at a glance: the winner against scratch, default settings and the teacher, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from heterokd.formatting import format_duration, format_estimate, format_percent, format_score, metric_name
from heterokd.methods import BASELINE, VANILLA_KD
from heterokd.report.measured import Measured
from heterokd.report.study_data import Studied, Tried
from heterokd.storage.study_dir import StudyFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.plan.record import planned
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.significance import Comparison


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


def cards(studied: Studied, measured: Measured | None, folder: StudyFolder) -> list[Card]:
    """What a reader wants to know first; without a winner only what it cost."""
    winner = studied.winner
    found = []
    if winner is not None and winner.mean is not None:
        best = Side(winner.mean, winner.half_width if winner.confirmed else None, len(winner.seeds))
        found = [_scratch(studied, best), _default(studied, winner, best), _teacher(studied, best, measured)]
    return [*found, _cost(studied, folder), *([] if measured is None else [_size(measured)])]


def default_side(studied: Studied, winner: RankedConfig) -> tuple[Tried, Side] | None:
    """Distillation with default settings; None where the study did not try it, or it is the winner itself.

    Its own value, unlike that of a sample, is not the best of many: a single training is an honest, if noisy, figure.
    The noise is that of all repeated configurations together, from which the winner's interval comes too.
    """
    default = studied.default
    if default is None or default.number == winner.number or default.value is None:
        return None
    confirmed = studied.summary.confirmed(default.number)
    if confirmed is not None and confirmed.mean is not None:
        return default, Side(confirmed.mean, confirmed.half_width, len(confirmed.seeds))
    half = winner.half_width if winner.confirmed else None
    single = None if half is None else half * math.sqrt(len(winner.seeds))
    return default, Side(default.value, single, 1)


def _against(studied: Studied, best: Side, other: Side) -> tuple[str, str, str, str]:
    """Difference, mark, tone and the sentence on how sure it is; better is positive."""
    sign = 1 if studied.summary.maximise else -1
    difference = sign * (best.mean - other.mean)
    figure = f"{difference:+.4f}"
    if best.half is None or other.half is None:
        return figure, "one seed", "open", "One seed each: the difference may be noise."
    width = math.hypot(best.half, other.half)
    text = f"95 % interval {difference - width:+.4f} to {difference + width:+.4f}"
    if abs(difference) > width:
        return figure, "real" if difference > 0 else "worse", "good" if difference > 0 else "open", f"{text}."
    return figure, "a tie", "open", f"{text}: it may be noise."


def _scratch(studied: Studied, best: Side) -> Card:
    title, scratch = "Over labels alone", studied.scratch
    if studied.winner is not None and studied.winner.method == BASELINE:
        return Card(title, "none", "no gain", "open", "The student trained on labels alone is the best one.")
    if scratch is None or scratch.mean is None:
        return Card(title, "unknown", "", "plain", "The study has no scratch trial that was trained to the end.")
    side = Side(scratch.mean, scratch.half_width, len(scratch.seeds))
    figure, mark, tone, sure = _against(studied, best, side)
    if mark == "real" and paired_tie(studied) is not None:
        mark, tone = "likely", "plain"
    return Card(title, figure, mark, tone, f"Scratch reaches {format_score(side.mean)} ({_seeds(side.seeds)}). {sure}")


def paired_tie(studied: Studied) -> Comparison | None:
    """The paired comparison of winner and scratch where it does not find the difference that their intervals show.

    It rests on the seeds that both have, which are fewer.
    """
    winner, scratch = studied.winner, studied.scratch
    if winner is None or scratch is None:
        return None
    names = [{one.method, f"{one.method} (trial {one.number})"} for one in (winner, scratch)]
    for one in studied.comparisons:
        if (one.first in names[0] and one.second in names[1]) or (one.first in names[1] and one.second in names[0]):
            return one if one.verdict in ("tie", "unknown") else None
    return None


def _default(studied: Studied, winner: RankedConfig, best: Side) -> Card:
    found = default_side(studied, winner)
    title = "Over default settings"
    if found is None:
        default = studied.default
        if default is not None and default.number == winner.number:
            return Card(title, "none", "no gain", "open", f"{default.method} with its published setting is the winner.")
        method = VANILLA_KD[studied.experiment.data.task]
        for one in studied.search:
            if one.method == method and one.origin == "published" and one.status == TrialStatus.PRUNED and one.epochs:
                text = f"{method} as published (trial {one.number}) fell behind and was stopped after epoch"
                return Card(
                    title, "ahead", "stopped early", "plain", f"{text} {one.epochs[-1]}, at {format_score(one.value)}."
                )
        return Card(
            title, "unknown", "", "plain", "Distillation with default settings was not trained to the end here."
        )
    default, side = found
    figure, mark, tone, sure = _against(studied, best, side)
    where = "" if default.student == (winner.student or default.student) else f" on {default.student}"
    text = f"{default.method} as published{where} (trial {default.number}) reaches {format_score(side.mean)}"
    return Card(title, figure, mark, tone, f"{text} ({_seeds(side.seeds)}). {sure}")


def _teacher(studied: Studied, best: Side, measured: Measured | None) -> Card:
    title, level = "Against the teacher", studied.levels.get("teacher")
    if level is None:
        known = studied.summary.teacher
        text = "The teacher was not measured on this metric."
        if known is not None:
            text += f" Its {metric_name(known.metric)} is {format_percent(known.val_score)}."
        return Card(title, "unknown", "", "plain", text)
    sign = 1 if studied.summary.maximise else -1
    difference = sign * (best.mean - level)
    text = f"The teacher reaches {format_score(level)}; it is one network, measured once."
    mark, tone = ("one seed", "open") if best.half is None else ("a tie", "plain")
    if best.half is not None and abs(difference) > best.half:
        mark, tone = ("ahead", "good") if difference > 0 else ("behind", "plain")
    ratio = None if measured is None else _ratio(measured, "params_m")
    if ratio is not None and level > 0 and sign > 0:
        share = format_percent(best.mean / level)
        text = f"{share} of its {format_score(level)}, with {_times(ratio, 'the parameters')}."
    return Card(title, f"{difference:+.4f}", mark, tone, text)


def _cost(studied: Studied, folder: StudyFolder) -> Card:
    known = planned(folder)
    plan, actual = (None, {}) if known is None else known
    spent = studied.summary.spent
    seconds = actual.get("seconds") or 3600 * (spent.get("hours") or 0.0)
    parts = []
    hours = actual.get("device_hours") or spent.get("gpu_hours")
    if hours:
        parts.append(f"{hours:.2g} {plan.device_unit if plan else 'device-hours'} of training")
    if actual.get("money") is not None and plan is not None:
        parts.append(f"{actual['money']:.2f} {plan.currency}")
    count = len(studied.trials)
    text = f"{count} training{'' if count == 1 else 's'}{''.join(f', {part}' for part in parts)}."
    if plan is not None:
        text += f" Planned: {format_estimate(plan.seconds, format_duration)}."
    return Card("The search took", format_duration(seconds) if seconds else "unknown", "", "plain", text)


def _size(measured: Measured) -> Card:
    student, teacher = measured.networks.get("student"), measured.networks.get("teacher")
    if not student:
        why = measured.missing.get("networks", "it was not measured")
        return Card("The student", "unknown", "", "plain", f"Its size is not known: {why}.")
    text = f"parameters of {student['network']}: "
    parts = [f"{student['latency_ms']:.3g} ms an image on one core"] if student["latency_ms"] else []
    ratio, faster = _ratio(measured, "params_m"), _ratio(measured, "latency_ms")
    if teacher and ratio is not None:
        parts.append(f"{_times(ratio, 'what the teacher has')}")
    if faster is not None:
        parts.append(f"{_times(faster, 'its time')}")
    return Card("The student", f"{student['params_m']:.3g} M", "", "plain", f"{text}{', '.join(parts)}.")


def _ratio(measured: Measured, key: str) -> float | None:
    """The student's share of what the teacher has."""
    values = [(measured.networks.get(name) or {}).get(key) for name in ("student", "teacher")]
    return values[0] / values[1] if values[0] and values[1] else None


def _times(ratio: float, what: str) -> str:
    return f"{100 * ratio:.0f} % of {what}" if ratio < 1 else f"{ratio:.1f} times {what}"


def _seeds(count: int) -> str:
    return "one training" if count == 1 else f"mean of {count} seeds"
