"""Charts of students: accuracy against cost, and the winner's confusion matrix or IoU and CKA with its teacher."""

from __future__ import annotations

import math
from functools import partial

from heterokd.formatting import join_words, metric_name
from heterokd.methods import BASELINE
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.report.chart import Chart, NothingToShow, draw_chart
from heterokd.report.figures.comparison import Member, draw_front
from heterokd.report.figures.matrices import draw_confusion, draw_iou, draw_match, student_of
from heterokd.report.figures.svg import Vector
from heterokd.report.measured import Measured
from heterokd.report.study_data import StudyReport
from heterokd.study.ranked_config import RankedConfig


def front_charts(report: StudyReport) -> list[Chart]:
    """Draw accuracy against each cost that is an objective, with the teacher if its cost was measured."""
    return [
        draw_chart(f"front-{name.lower().replace(' ', '-')}", f"Accuracy and {name}", partial(_front, report, key))
        for key in report.experiment.search.cost_objectives
        for name in (STUDENT_COSTS[key].name,)
    ]


def _front(report: StudyReport, key: str, made: Vector) -> str:
    front, costs = report.summary.front, report.summary.students
    if not front:
        raise NothingToShow("No trial is complete, so there is no Pareto front.")
    names = [member.student for member in front]
    others: dict[str, RankedConfig] = {}
    for leader in report.summary.leaders:
        if leader.student not in names:
            others.setdefault(leader.student, leader)
    shown = [
        Member(config.student, costs[config.student][key], config.mean, config in front)
        for config in (*front, *others.values())
        if key in costs.get(config.student, {}) and config.mean is not None
    ]
    teacher = None if report.measured is None else report.measured.cost("teacher", key)
    if teacher and "teacher" in report.levels:
        shown.append(Member("teacher", teacher, report.levels["teacher"], is_front=False, is_teacher=True))
    draw_front(made, shown, STUDENT_COSTS[key].label(), f"{metric_name(report.summary.metric)} on val")
    dominated = " The other students are dominated: they cost more and reach less." if others else ""
    return f"Pareto front (filled), each of which can be promoted with --trial N: {join_words(names)}.{dominated}"


def winner_charts(report: StudyReport) -> list[Chart]:
    """Draw the winner's confusion matrix or IoU of each class, and CKA with its teacher."""
    if report.winner is None:
        return []
    if report.experiment.data.task == "classification":
        first = draw_chart("confusion", "Confusion matrix of the winner on val", partial(_confusion, report.measured))
    else:
        first = draw_chart("iou", "IoU of each class on val", partial(_iou, report.measured))
    return [first, draw_chart("cka", "CKA between the stages of teacher and winner", partial(_cka, report.measured))]


def _missing(measured: Measured | None, part: str) -> NothingToShow:
    """Explain why a part of measured.json is missing."""
    if measured is None:
        return NothingToShow("The winner was not measured on val; run heterokd report NAME --measure.")
    return NothingToShow(f"This could not be measured ({measured.missing.get(part, 'for an unknown reason')}).")


def _confusion(measured: Measured | None, made: Vector) -> str:
    if measured is None or measured.confusion is None:
        raise _missing(measured, "confusion")
    classes, scratch = measured.classes, measured.scratch_confusion
    draw_confusion(made, measured.confusion, classes, scratch)
    errors = measured.confusion.copy()
    for place in range(len(errors)):
        errors[place, place] = 0
    caption = f"{errors.sum()} of {measured.images} images of val are misclassified"
    if errors.any():
        row, column = divmod(int(errors.argmax()), len(errors))
        caption += f", most often {classes[row]} as {classes[column]} ({errors[row, column]})"
    if scratch is not None:
        gains = measured.confusion.diagonal() - scratch.diagonal()
        best, total = int(gains.argmax()), int(gains.sum())
        compared = f"{abs(total)} {'more' if total >= 0 else 'fewer'} correct than without a teacher"
        caption += f"; {compared}, the largest gain in class {classes[best]} ({gains[best]:+d})"
    return f"{caption}. These are the trainings that found both configurations, not their means over seeds."


def _iou(measured: Measured | None, made: Vector) -> str:
    if measured is None or not measured.iou:
        raise _missing(measured, "iou")
    draw_iou(made, measured.iou, measured.classes)
    student = student_of(measured.iou)
    finite = [(value, place) for place, value in enumerate(measured.iou[student]) if math.isfinite(value)]
    caption = f"IoU of each class on {measured.images} images of val"
    if finite:
        (worst, low), (best, high) = min(finite), max(finite)
        caption += f"; best: {measured.classes[high]} ({best:.2f}), worst: {measured.classes[low]} ({worst:.2f})"
    if BASELINE in measured.iou and student != BASELINE:
        caption += "; sorted by the gain over the student without a teacher"
    return f"{caption}."


def _cka(measured: Measured | None, made: Vector) -> str:
    if measured is None or not measured.similarity:
        raise _missing(measured, "cka")
    teacher, student = (
        measured.networks[name].network if name in measured.networks else name for name in ("teacher", "student")
    )
    draw_match(made, measured.similarity, teacher, student)
    cells = [(value, row, column) for row, line in enumerate(measured.similarity) for column, value in enumerate(line)]
    value, row, column = max(cells)
    return (
        f"CKA on {measured.compared} images of val: 1 is equal up to rotation and scale. Most similar: stage {row + 1} "
        f"of the student and stage {column + 1} of the teacher ({value:.2f}). Last stages: "
        f"{measured.similarity[-1][-1]:.2f}."
    )
