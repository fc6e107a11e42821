"""Print the summary of a search, in at most 24 lines of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from heterokd.cli.terminal.console import Terminal
from heterokd.cli.terminal.tables import leader_table
from heterokd.errors import without_password
from heterokd.report.wording import listed_costs, notes, student_costs, verdict
from heterokd.study.search_result import SearchResult

MOST_NOTES = 2
"""Maximum number of sentences on exclusions, early ends and the budget; the report has all of them."""

MOST_FRONT = 3
"""Maximum number of students of the Pareto front; the report has all of them."""


def print_summary(terminal: Terminal, found: SearchResult, costs: Sequence[str], registered: str) -> None:
    """Print the results of a search; `costs` are the objectives after the metric, `registered` describes the model."""
    summary, teacher = found.summary, found.teacher
    front, notices = summary.front, notes(summary)
    failed = summary.progress.failed
    listed = listed_costs(summary, costs)
    if failed:
        notices.insert(0, f"{failed} trial(s) failed; their tracebacks are in MLflow and in {found.folder.path}")
    terminal.print_line("")
    terminal.print_table(leader_table(summary, 6 if not front else 3 if listed else 4))
    terminal.print_line(f"teacher  {teacher.network}: {teacher.score} on val")
    for member in front[:MOST_FRONT]:
        spent = student_costs(summary, member.student, costs)
        terminal.print_line(f"front    {member.student}: {member.method} {member.score} ({member.bounds}), {spent}")
    if len(front) > MOST_FRONT:
        terminal.print_line(f"         and {len(front) - MOST_FRONT} more in the report")
    if listed:
        terminal.print_line(f"cost     {listed}")
    terminal.print_sentence(verdict(summary))
    for notice in notices[:MOST_NOTES]:
        terminal.print_sentence(notice)
    if len(notices) > MOST_NOTES:
        terminal.print_line(f"{len(notices) - MOST_NOTES} more remarks are in the report.")
    terminal.print_line(f"report   {found.folder.report}")
    terminal.print_line(f"MLflow   {without_password(found.uri)}   (heterokd ui)")
    terminal.print_line(f"registry {registered}")
