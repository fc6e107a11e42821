"""Tables of the page: leaders, methods, trials, published numbers, planned and actual costs."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from itertools import product

from heterokd.config.experiment import TEACHER
from heterokd.formatting import format_classes, format_duration, format_interval, format_sample, format_score
from heterokd.methods import BASELINE, METHODS
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.report.figures.matrices import student_of
from heterokd.report.measured import Measured
from heterokd.report.study_data import StudyReport
from heterokd.report.wording import cost_sources
from heterokd.storage.files import read_derived
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.method_outcome import method_outcomes
from heterokd.study.plan.estimate import Range
from heterokd.study.plan.record import PlanRecord, Taken
from heterokd.study.published import published_results
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.trial_view import TrialView
from heterokd.training.paired_tests import wilson

Row = dict[str, object]
"""A row of a table, by the names that the page's template uses."""

MOST_TRIALS = 400
"""Maximum number of rows of the table of all trials: the best ones."""

MOST_CLASSES = 100
"""Maximum number of rows of the table of classes: those with the lowest results."""

DRAWN = ("confusion", "iou", "match", "cka")
"""Pictures that the page draws from their numbers."""

PICTURES = {"samples": "Images of val", "match": "Stages before distillation"}
"""Headings of the other pictures, in their order; those of methods follow."""


def leader_rows(report: StudyReport) -> list[Row]:
    """List the leading configurations, with the positions of their intervals on a common scale of 0 to 100."""
    leaders = report.summary.rows()
    ends = [value for leader in leaders for value in (leader.low, leader.high, leader.mean) if value is not None]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)

    def place(value: float | None) -> float | None:
        return None if value is None else round(2 + 96 * (value - low) / ((high - low) or 1.0), 2)

    rows = []
    for leader in leaders:
        trial = report.find(leader.number)
        rows.append(
            {
                **vars(leader),
                "kind": _kind(report, leader),
                "seconds": _duration(None if trial is None else trial.seconds),
                "interval": leader.interval,
                "from": place(leader.low),
                "to": place(leader.high),
                "at": place(leader.mean),
                "settings": format_sample(leader.sample),
                "classes": " to ".join(map(str, leader.iou_classes)),
            }
        )
    return rows


def _kind(report: StudyReport, leader: RankedConfig) -> str:
    if report.winner is not None and leader.number == report.winner.number:
        return "winner"
    return "baseline" if leader.method == BASELINE else ""


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else format_duration(seconds)


def method_rows(report: StudyReport) -> list[Row]:
    """List the methods: numbers of trials, values in the search and on fresh seeds, why it did not win, duration."""
    rows: list[Row] = []
    outcomes = method_outcomes(report.summary, report.trials)
    for method in methods_in_order(report):
        trials = [trial for trial in report.search if trial.method == method]
        values = [trial.value for trial in trials if trial.is_complete and trial.value is not None]
        confirmed = next(
            (leader for leader in report.summary.leaders if leader.method == method and leader.confirmed), None
        )
        seconds = [trial.seconds for trial in report.trials if trial.method == method and trial.seconds is not None]
        best = (max if report.summary.maximise else min)(values) if values else None
        rows.append(
            {
                "method": method,
                "complete": len(values),
                "pruned": sum(trial.status in (TrialStatus.PRUNED, TrialStatus.PAUSED) for trial in trials),
                "failed": sum(trial.status.is_failure for trial in trials),
                "best": "" if best is None else format_score(best),
                "mean": "" if confirmed is None else format_score(confirmed.mean),
                "seeds": 0 if confirmed is None else len(confirmed.seeds),
                "time": _duration(sum(seconds) if seconds else None),
                "seconds": sum(seconds),
                "outcome": outcomes[method],
            }
        )
    return rows


def methods_in_order(report: StudyReport) -> list[str]:
    """Sort the methods by their first leader, then by their best value; those without a value come last."""
    first: dict[str, int] = {}
    for leader in report.summary.leaders:
        first.setdefault(leader.method, len(first))

    def rank(method: str) -> tuple[int, float]:
        values = [report.sign * t.value for t in report.search if t.method == method and t.value is not None]
        return first.get(method, len(first)), -max(values, default=float("-inf"))

    return sorted({trial.method for trial in report.search}, key=rank)


def trial_rows(report: StudyReport) -> tuple[list[Row], int]:
    """List the trials by number, at most the best `MOST_TRIALS`; also return how many are left out."""
    trials: Sequence[TrialView] = report.trials
    if len(trials) > MOST_TRIALS:
        ranked = sorted(trials, key=lambda t: (t.value is None, -report.sign * (t.value or 0.0), t.number))
        trials = sorted(ranked[:MOST_TRIALS], key=lambda trial: trial.number)
    rows: list[Row] = [
        {
            "number": trial.number,
            "method": trial.method,
            "student": trial.student,
            "state": describe_end(trial),
            "status": str(trial.status),
            "value": None if trial.value is None else format_score(trial.value),
            "classes": format_classes(trial.iou_classes),
            "epoch": trial.epochs[-1] if trial.epochs else 0,
            "planned": trial.planned,
            "seconds": trial.seconds,
            "time": _duration(trial.seconds),
            "settings": format_sample(trial.sample),
        }
        for trial in trials
    ]
    return rows, len(report.trials) - len(rows)


def describe_end(trial: TrialView) -> str:
    """Describe how a trial ended."""
    texts = {TrialStatus.PRUNED: "stopped early", TrialStatus.PAUSED: "paused by the budget"}
    text = texts.get(trial.status, str(trial.status))
    if trial.reason and trial.status in (TrialStatus.PRUNED, TrialStatus.FAILED):
        text += f": {trial.reason}"
    return text if trial.confirms is None else f"{text}, seed {trial.seed} of trial {trial.confirms}"


def failure_rows(report: StudyReport) -> list[Row]:
    """List the trials that failed, with their errors."""
    return [
        {"number": trial.number, "method": trial.method, "error": trial.error}
        for trial in report.trials
        if trial.status.is_failure or (trial.error and trial.status != TrialStatus.COMPLETE)
    ]


def front_rows(report: StudyReport) -> list[Row]:
    """List the Pareto front: each student with the costs that are objectives."""
    costs = report.experiment.search.cost_objectives
    return [
        {**vars(member), "costs": _cost_texts(report.summary.students.get(member.student, {}), costs)}
        for member in report.summary.front
    ]


def network_rows(measured: Measured | None) -> tuple[list[str], list[Row]]:
    """Return the labels of the measured costs, and a row each for teacher and student; empty without measurements."""
    if measured is None or "teacher" not in measured.networks:
        return [], []
    networks = measured.networks
    costs = [key for key in STUDENT_COSTS if any(each.costs.get(key) is not None for each in networks.values())]
    rows: list[Row] = [
        {"name": name, "network": each.network, "costs": _cost_texts(each.costs, costs)}
        for name, each in networks.items()
    ]
    return [STUDENT_COSTS[key].label() for key in costs], rows


def network_sources(report: StudyReport) -> list[str]:
    """Say how the measured costs of teacher and student were measured."""
    if report.measured is None:
        return []
    search, size = report.experiment.search, report.experiment.data.view_size
    known = {key for each in report.measured.networks.values() for key, cost in each.costs.items() if cost is not None}
    texts = {key: search.cost_conditions(key, size) for key in STUDENT_COSTS if key in known}
    return cost_sources({key: text for key, text in texts.items() if text})


def _cost_texts(known: Mapping[str, float | None], costs: Sequence[str]) -> list[str]:
    """Format costs with as many digits as each has; unknown ones are empty."""
    values = [(STUDENT_COSTS[key].digits, known.get(key)) for key in costs]
    return ["" if value is None else f"{value:.{digits}g}" for digits, value in values]


def embedded_pictures(report: StudyReport) -> list[Row]:
    """Return a study's PNGs with name, title, caption and base64 text, so that the page needs no other file."""
    pictures, drawn = report.folder.pictures, DRAWN if report.measured is not None else ("cka",)
    captions = read_derived(pictures / "captions.json")
    found = (file for file in sorted(pictures.glob("*.png")) if not file.name.startswith("failure-"))
    files = {file.stem: file for file in found if file.stem not in drawn}
    ordered = sorted(files, key=lambda name: list(PICTURES).index(name) if name in PICTURES else len(PICTURES))
    return [
        {
            "name": name,
            "title": PICTURES.get(name, f"Maps of {name}" if name in METHODS else name.replace("_", " ")),
            "caption": captions.get(name, name.replace("_", " ")),
            "data": base64.b64encode(files[name].read_bytes()).decode("ascii"),
        }
        for name in ordered
    ]


def class_table(measured: Measured | None) -> Row | None:
    """List the winner's results on val by class, the lowest first, with 95 % intervals; None if they were not measured.

    In classification the share of a class's images that are found (recall, with Wilson's interval) and the share of
    predictions of the class that are right (precision); in segmentation the IoU, with a bootstrap over images.
    """
    if measured is None:
        return None
    if measured.confusion is not None:
        rows = _recall_rows(measured)
        head = ["images", "found", "95 % interval", "precision"]
        head += ["found without a teacher"] if measured.scratch_confusion is not None else []
    elif measured.iou and measured.iou_intervals is not None:
        rows = _iou_rows(measured)
        head = ["IoU", "95 % interval"] + [
            f"IoU of {name}" for name in measured.iou if name != student_of(measured.iou)
        ]
    else:
        return None
    ordered = [row for _, row in sorted(rows, key=lambda row: row[0])]
    return {"head": head, "rows": ordered[:MOST_CLASSES], "left_out": len(ordered[MOST_CLASSES:])}


def _recall_rows(measured: Measured) -> list[tuple[float, list[str]]]:
    """Return the recall and the cells of each class that val has."""
    counts, scratch = measured.confusion, measured.scratch_confusion
    assert counts is not None  # checked by the caller
    rows = []
    for place, name in enumerate(measured.classes):
        correct, images, predicted = (
            int(n) for n in (counts[place, place], counts[place].sum(), counts[:, place].sum())
        )
        if not images:
            continue
        cells = [name, str(images), f"{correct / images:.3f}", format_interval(*wilson(correct, images))]
        cells.append(f"{correct / predicted:.3f}" if predicted else "never predicted")
        if scratch is not None:
            cells.append(f"{scratch[place, place] / images:.3f}")
        rows.append((correct / images, cells))
    return rows


def _iou_rows(measured: Measured) -> list[tuple[float, list[str]]]:
    """Return the winner's IoU and the cells of each class that val has."""
    student, intervals = student_of(measured.iou), measured.iou_intervals
    assert intervals is not None  # checked by the caller
    rows = []
    for place, name in enumerate(measured.classes):
        value = float(measured.iou[student][place])
        if not math.isfinite(value):
            continue
        others = [f"{values[place]:.3f}" for network, values in measured.iou.items() if network != student]
        rows.append((value, [name, f"{value:.3f}", format_interval(*intervals[place].tolist()), *others]))
    return rows


def plan_table(record: PlanRecord | None) -> Row | None:
    """Compare a study's plan with what it took; None if it has no plan."""
    if record is None:
        return None
    plan, taken, counts = record.plan, record.taken or Taken(), record.plan.trainings
    rows = [
        _range_row("minutes", plan.seconds.times(1 / 60), taken.seconds / 60, "%.1f"),
        _range_row(plan.device_unit, plan.device_hours, taken.device_hours, "%.2f"),
    ]
    if plan.money is not None:
        rows.append(_range_row(plan.currency, plan.money, taken.money, "%.2f"))
    rows.append(_range_row("MB on disk (taken: the study's folder)", plan.disk.times(1e-6), 1e-6 * taken.disk, "%.0f"))
    rows += [
        {"name": name, "planned": f"{planned:.0f}", "range": "", "taken": str(count)}
        for name, planned, count in (
            ("trainings", counts["published"] + counts["sampled"], taken.trainings),
            ("of them stopped early", counts["pruned"], taken.pruned),
            ("again on fresh seeds", counts["repeated"], taken.repeated),
        )
    ]
    if record.taken is None:
        rows = [{**row, "taken": ""} for row in rows]
    return {"rows": rows, "source": plan.source, "parallel": plan.parallel, "device": plan.device}


def _range_row(name: str, planned: Range, taken: float | None, form: str) -> dict[str, str]:
    return {
        "name": name,
        "planned": form % planned.expected,
        "range": f"{form % planned.low} to {form % planned.high}",
        "taken": "" if taken is None else form % taken,
    }


def published_tables(report: StudyReport) -> list[Row]:
    """Compare published numbers of the experiment's pairs with this study's best of each method; a table each.

    Pairs without published numbers have no table. Our numbers are shown if the study searches the tables' metric.
    """
    experiment, summary = report.experiment, report.summary
    tables: list[Row] = []
    for teacher, student in product(experiment.teacher.networks, experiment.student.networks):
        pair = published_results(experiment.data.dataset, teacher, student)
        if pair is None:
            continue
        ours: dict[str, float] = {}
        for leader in summary.leaders if summary.metric == f"val/{pair.metric}" else ():
            sample = leader.sample
            is_ours = sample.get("student.network", student) == student and sample.get(TEACHER, teacher) == teacher
            if is_ours and leader.mean is not None:
                ours.setdefault(leader.method, 100 * leader.mean)  # the leaders come best first
        rows: list[Row] = [
            {"method": found.method, "published": found.value, "ours": ours.get(found.method), "source": found.source}
            for found in sorted(pair.results, key=lambda found: -found.value)
        ]
        tables.append(
            {
                "teacher": pair.teacher_name,
                "student": pair.student_name,
                "metric": pair.metric_name,
                "teacher_value": "unknown" if pair.teacher_value is None else f"{pair.teacher_value:.2f}",
                "rows": rows,
            }
        )
    return tables
