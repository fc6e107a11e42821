"""Charts of what the winner sees and of what students cost: confusion or IoU, CKA with its teacher, the front."""

from __future__ import annotations

import math
from functools import partial

from heterokd.formatting import join_words, metric_name
from heterokd.methods import BASELINE
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.report.figures.comparison import Member, draw_front
from heterokd.report.figures.matrices import draw_confusion, draw_iou, draw_match
from heterokd.report.figures.svg import Vector
from heterokd.report.measured import Measured
from heterokd.report.search_charts import Chart, NothingToShow, chart
from heterokd.report.study_data import StudyReport
from heterokd.study.ranked_config import RankedConfig


def fronts(report: StudyReport) -> list[Chart]:
    """Accuracy against each cost, where costs count; the teacher stands beside the students if it was weighed."""
    found = []
    for key in report.experiment.search.costs:
        name = STUDENT_COSTS[key].name
        found.append(chart(f"front-{name.lower()}", f"Accuracy and {name}", partial(_front, report, key)))
    return found


def _front(report: StudyReport, key: str) -> tuple[str, str]:
    members, facts = report.summary.front, report.summary.students
    if not members:
        raise NothingToShow("No student was trained to the end, so there is no front.")
    on_front = {one.student for one in members}
    others: dict[str, RankedConfig] = {}
    for leader in report.summary.leaders:
        if leader.student not in on_front:
            others.setdefault(leader.student, leader)
    shown = [
        Member(one.student, facts[one.student][key], one.expected, one in members, "")
        for one in (*members, *others.values())
        if key in facts.get(one.student, {}) and one.expected is not None
    ]
    teacher = None if report.measured is None else report.measured.cost("teacher", key)
    if teacher and "teacher" in report.levels:
        shown.append(Member("teacher", teacher, report.levels["teacher"], False, "teacher"))
    cost = STUDENT_COSTS[key].label()
    metric = f"{metric_name(report.summary.metric)} to expect on val"
    names = join_words([one.student for one in members])
    none = (
        "is the only student that none beats in everything" if len(members) == 1 else "are beaten by none in everything"
    )
    caption = f"{names} {none} (filled); others cost more and reach less (hollow). Each can be promoted: --trial N."
    title = f"{metric} against {cost}"
    return draw_front(f"front-{STUDENT_COSTS[key].name.lower()}", title, caption, shown, cost, metric), caption


def seen(report: StudyReport) -> list[Chart]:
    """What the winner sees: confusion matrix or IoU of every class, and CKA with its teacher."""
    if report.winner is None:
        return []
    is_classes = report.experiment.data.task == "classification"
    first = chart("confusion", "What is taken for what", lambda: _confusion(report.measured))
    if not is_classes:
        first = chart("iou", "IoU of every class", lambda: _iou(report.measured))
    return [first, chart("cka", "Teacher and student, stage by stage", lambda: _cka(report.measured))]


def _known(measured: Measured | None, part: str, is_there: bool) -> Measured:
    if measured is None:
        raise NothingToShow("The winner was not measured on val when its search ended: heterokd report NAME --measure")
    if not is_there:
        raise NothingToShow(f"This could not be measured ({measured.missing.get(part, 'nothing says why')}).")
    return measured


def _confusion(measured: Measured | None) -> tuple[str, str]:
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


def _iou(measured: Measured | None) -> tuple[str, str]:
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


def _cka(measured: Measured | None) -> tuple[str, str]:
    known = _known(measured, "cka", measured is not None and bool(measured.similarity))
    pairs = [(value, row, column) for row, own in enumerate(known.similarity) for column, value in enumerate(own)]
    value, row, column = max(pairs)
    caption = (
        f"CKA on {known.compared} images of val: 1 is the same up to rotation and scale. Most alike are the student's "
        f"stage {row + 1} and the teacher's stage {column + 1} ({value:.2f}); the last stages, which decide, have "
        f"{known.similarity[-1][-1]:.2f}."
    )
    networks = known.networks
    names = [networks[one].network if one in networks else one for one in ("teacher", "student")]
    made = Vector("cka", "CKA between the stages of teacher and winner", caption, 1.0)
    draw_match(made, known.similarity, *names)
    return made.text, caption
