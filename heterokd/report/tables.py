"""What the page shows in tables: leaders, methods, trials, published numbers, the plan beside what was taken."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import product

from heterokd.config.experiment import TEACHER
from heterokd.formatting import format_duration, format_interval, format_sample, format_score
from heterokd.methods import BASELINE, METHODS
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.report.measured import Measured
from heterokd.report.study_data import StudyReport
from heterokd.storage.files import read_json
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.plan.estimate import Range
from heterokd.study.plan.record import PlanRecord
from heterokd.study.published import published_results
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.trial_view import TrialView

Row = dict[str, object]
"""What a line of a table shows, by the names that the page's template uses."""

MOST_TRIALS = 400
"""Rows of the table of all trials; of more, the best are shown."""

DRAWN = ("confusion", "iou", "match", "cka")
"""Pictures whose numbers the page has: it draws them itself."""

PICTURES = {"samples": "Images of val", "match": "Stages before distillation"}
"""Headings of the other pictures, in their order; then those of methods."""


def leader_rows(report: StudyReport) -> list[Row]:
    """The leading configurations with where their interval lies on a common scale of 0 to 100."""
    leaders = report.summary.leaders
    ends = [value for one in leaders for value in (one.low, one.high, one.mean) if value is not None]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)

    def place(value: float | None) -> float | None:
        return None if value is None else round(2 + 96 * (value - low) / ((high - low) or 1.0), 2)

    rows = []
    for leader in leaders:
        tried = report.find(leader.number)
        is_sure = leader.confirmed and leader.low is not None
        rows.append(
            {
                **vars(leader),
                "kind": _kind(report, leader),
                "seconds": "" if tried is None or tried.seconds is None else format_duration(tried.seconds),
                "interval": format_interval(leader.low, leader.high) if is_sure else "",
                "from": place(leader.low) if is_sure else None,
                "to": place(leader.high) if is_sure else None,
                "at": place(leader.mean),
                "settings": format_sample(leader.sample),
            }
        )
    return rows


def _kind(report: StudyReport, leader: RankedConfig) -> str:
    winner = report.winner
    if winner is not None and leader.number == winner.number:
        return "winner"
    return "baseline" if leader.method == BASELINE else ""


def method_rows(report: StudyReport) -> list[Row]:
    """Every method: its trials, its best value of the search, its mean on fresh seeds, the time that it took."""
    rows = []
    for method in methods_in_order(report):
        own = [one for one in report.search if one.method == method]
        values = [one.value for one in own if one.is_complete and one.value is not None]
        confirmed = next((one for one in report.summary.leaders if one.method == method and one.confirmed), None)
        seconds = [one.seconds for one in report.trials if one.method == method and one.seconds is not None]
        best = (max if report.summary.maximise else min)(values) if values else None
        rows.append(
            {
                "method": method,
                "complete": len(values),
                "pruned": sum(one.status in (TrialStatus.PRUNED, TrialStatus.PAUSED) for one in own),
                "failed": sum(one.status.is_failure for one in own),
                "best": "" if best is None else format_score(best),
                "mean": "" if confirmed is None else format_score(confirmed.mean),
                "seeds": 0 if confirmed is None else len(confirmed.seeds),
                "time": format_duration(sum(seconds)) if seconds else "",
                "seconds": sum(seconds),
            }
        )
    return rows


def methods_in_order(report: StudyReport) -> list[str]:
    """Methods as they lead: by their first leader, then by their best value, then those without any."""
    first: dict[str, int] = {}
    for leader in report.summary.leaders:
        first.setdefault(leader.method, len(first))
    sign = 1 if report.summary.maximise else -1

    def rank(method: str) -> tuple[int, float]:
        values = [sign * one.value for one in report.search if one.method == method and one.value is not None]
        return first.get(method, len(first)), -max(values, default=float("-inf"))

    return sorted({one.method for one in report.search}, key=rank)


def trial_rows(report: StudyReport) -> tuple[list[Row], int]:
    """Every trial, by number; of too many the best, and how many are left out."""
    sign = 1 if report.summary.maximise else -1
    trials: Sequence[TrialView] = report.trials
    if len(trials) > MOST_TRIALS:
        ranked = sorted(trials, key=lambda one: (one.value is None, -sign * (one.value or 0.0), one.number))
        trials = sorted(ranked[:MOST_TRIALS], key=lambda one: one.number)
    rows: list[Row] = [
        {
            "number": one.number,
            "method": one.method,
            "student": one.student,
            "state": describe(one),
            "value": None if one.value is None else format_score(one.value),
            "epoch": one.epochs[-1] if one.epochs else 0,
            "planned": one.planned,
            "seconds": one.seconds,
            "time": "" if one.seconds is None else format_duration(one.seconds),
            "settings": format_sample(one.sample),
        }
        for one in trials
    ]
    return rows, len(report.trials) - len(rows)


def describe(one: TrialView) -> str:
    """A trial's end in words."""
    said = {TrialStatus.PRUNED: "stopped early", TrialStatus.PAUSED: "paused by the budget"}.get(
        one.status, str(one.status)
    )
    if one.reason and one.status in (TrialStatus.PRUNED, TrialStatus.FAILED):
        said += f": {one.reason}"
    return said if one.confirms is None else f"{said}, seed {one.seed} of trial {one.confirms}"


def failure_rows(report: StudyReport) -> list[Row]:
    """Trials that failed, with what."""
    return [
        {"number": one.number, "method": one.method, "error": one.error}
        for one in report.trials
        if one.status.is_failure or (one.error and one.status != TrialStatus.COMPLETE)
    ]


def front_rows(report: StudyReport) -> list[Row]:
    """The Pareto front, each student with the costs that count."""
    costs = report.experiment.search.costs
    return [
        {**vars(member), "costs": _figures(report.summary.students.get(member.student, {}), costs)}
        for member in report.summary.front
    ]


def network_rows(measured: Measured | None) -> tuple[list[str], list[Row]]:
    """Labels of the costs that were measured, and teacher and student with theirs; both empty where neither was."""
    if measured is None or "teacher" not in measured.networks:
        return [], []
    networks = measured.networks
    costs = [key for key in STUDENT_COSTS if any(one.costs.get(key) is not None for one in networks.values())]
    rows: list[Row] = [
        {"name": name, "network": one.network, "costs": _figures(one.costs, costs)} for name, one in networks.items()
    ]
    return [STUDENT_COSTS[key].label() for key in costs], rows


def _figures(known: Mapping[str, float | None], costs: Sequence[str]) -> list[str]:
    """Costs of a student with as many digits as each is shown; empty where one is not known."""
    values = [(STUDENT_COSTS[key].digits, known.get(key)) for key in costs]
    return ["" if value is None else f"{value:.{digits}g}" for digits, value in values]


def embedded_pictures(report: StudyReport) -> list[dict[str, str]]:
    """The PNGs of a study's pictures with name, caption and base64 text; the page then needs no other file.

    A caption is what captions.json says of the file's stem, and the stem itself where it says nothing.
    """
    pictures, drawn = report.folder.pictures, DRAWN if report.measured is not None else ("cka",)
    captions = read_json(pictures / "captions.json")
    files = {file.stem: file for file in sorted(pictures.glob("*.png"))}
    ordered = sorted(files, key=lambda stem: list(PICTURES).index(stem) if stem in PICTURES else len(PICTURES))
    return [
        {
            "name": file.stem,
            "title": PICTURES.get(file.stem, _heading(file.stem)),
            "caption": str(captions.get(file.stem, file.stem.replace("_", " "))),
            "data": base64.b64encode(file.read_bytes()).decode("ascii"),
        }
        for file in map(files.__getitem__, ordered)
        if file.stem not in drawn
    ]


def _heading(stem: str) -> str:
    return f"Maps of {stem}" if stem in METHODS else stem.replace("_", " ")


def plan_table(record: PlanRecord | None) -> dict[str, object] | None:
    """A study's plan beside what it took; None where it has none."""
    if record is None:
        return None
    plan, taken, counts = record.plan, record.taken, record.plan.trainings
    rows = [
        _range_row("minutes", plan.seconds.times(1 / 60), None if taken is None else taken.seconds / 60, "%.1f"),
        _range_row(plan.device_unit, plan.device_hours, None if taken is None else taken.device_hours, "%.2f"),
    ]
    if plan.money is not None:
        rows.append(_range_row(plan.currency, plan.money, None if taken is None else taken.money, "%.2f"))
    disk = None if taken is None else 1e-6 * taken.disk
    rows.append(_range_row("MB on disk (the study's own folder, when taken)", plan.disk.times(1e-6), disk, "%.0f"))
    for name, planned, count in (
        ("trainings", counts["published"] + counts["sampled"], taken and taken.trainings),
        ("of them stopped early", counts["pruned"], taken and taken.pruned),
        ("again on fresh seeds", counts["repeated"], taken and taken.repeated),
    ):
        rows.append(
            {"name": name, "planned": f"{planned:.0f}", "range": "", "taken": "" if count is None else str(count)}
        )
    return {"rows": rows, "source": plan.source, "parallel": plan.parallel, "device": plan.device}


def _range_row(name: str, planned: Range, taken: float | None, form: str) -> dict[str, str]:
    return {
        "name": name,
        "planned": form % planned.expected,
        "range": f"{form % planned.low} to {form % planned.high}",
        "taken": "" if taken is None else form % taken,
    }


def published_tables(report: StudyReport) -> list[Row]:
    """What papers print of the experiment's pairs, beside this study's best of each method; one table a pair.

    Empty for pairs of no table. Only the tables' metric is compared: a study of another one has no numbers of its own
    there.
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
        tables.append(
            {
                "teacher": pair.teacher_name,
                "student": pair.student_name,
                "metric": pair.metric_name,
                "teacher_value": "unknown" if pair.teacher_value is None else f"{pair.teacher_value:.2f}",
                "rows": [
                    {
                        "method": result.method,
                        "published": result.value,
                        "ours": ours.get(result.method),
                        "source": result.source,
                    }
                    for result in sorted(pair.results, key=lambda result: -result.value)
                ],
            }
        )
    return tables
