"""Summary at the end of a search, in at most 24 lines of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterokd.cli.terminal.console import Terminal
from heterokd.cli.terminal.tables import leader_table
from heterokd.formatting import format_score, metric_name
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.report.wording import notes, verdict
from heterokd.training.teacher import TeacherCard

MOST_NOTES = 2
"""Sentences about exclusions, early ends and the budget; the report has all of them."""

MOST_FRONT = 3
"""Students of the Pareto front; the report has all of them."""


def closing(
    terminal: Terminal,
    summary: Mapping[str, Any],
    teacher: TeacherCard,
    costs: Sequence[str],
    *,
    folder: Path,
    page: Path,
    store: str,
    registered: str,
) -> None:
    """Print the results of a search and where they are.

    Args:
        terminal: to print on.
        summary: of the study.
        teacher: its card.
        costs: objectives besides the metric.
        folder: of the study.
        page: path of its report.
        store: address of MLflow's.
        registered: describes the registered model.
    """
    terminal.say("")
    front = summary["front"]
    terminal.show(leader_table(summary, 6 if not front else 4))
    terminal.say(f"teacher  {teacher.network}: {metric_name(teacher.metric)} {teacher.val_score:.4f} on val")
    for member in front[:MOST_FRONT]:
        spent = ", ".join(STUDENT_COSTS[key].figure(member[key]) for key in costs)
        terminal.say(f"front    {member['student']}: {member['method']} {format_score(member['expected'])}, {spent}")
    if len(front) > MOST_FRONT:
        terminal.say(f"         and {len(front) - MOST_FRONT} more in the report")
    terminal.tell(verdict(summary))
    failed = summary["standing"]["failed"]
    said = notes(summary)
    if failed:
        said.insert(0, f"{failed} trial(s) failed; their tracebacks are in MLflow and in {folder}")
    for note in said[:MOST_NOTES]:
        terminal.tell(note)
    if len(said) > MOST_NOTES:
        terminal.say(f"{len(said) - MOST_NOTES} more remarks are in the report.")
    terminal.say(f"report   {page}")
    terminal.say(f"MLflow   {store}   (heterokd ui)")
    terminal.say(f"registry {registered}")
