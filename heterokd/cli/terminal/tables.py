"""Tables for a terminal of 80 columns; the least important column is cut if necessary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from heterokd.formatting import (
    format_duration,
    format_estimate,
    format_hours,
    format_sample,
    format_size,
    metric_name,
)
from heterokd.study.plan.estimate import Plan
from heterokd.study.summary import StudySummary

if TYPE_CHECKING:
    from heterokd.execution.reproduce import Reproduction

SHOWN_LEADERS = 6
"""Rows of the leaderboard that fit a small terminal."""


def leader_table(summary: StudySummary, rows: int = SHOWN_LEADERS) -> Table:
    """Return a table of at most `rows` leading students with their intervals, and of the scratch baseline."""
    table = Table(box=None, pad_edge=False, expand=True)
    counted = any(leader.iou_classes for leader in summary.rows(rows))
    score = f"{metric_name(summary.metric)} (classes)" if counted else summary.metric
    for title, width in (("trial", 5), ("method", 8), (score, 10), ("95 % interval of the mean", 25)):
        table.add_column(title, min_width=width, no_wrap=True)
    # Only this column is cut, never the numbers.
    table.add_column("settings", overflow="ellipsis", no_wrap=True, ratio=1)
    for leader in summary.rows(rows):
        table.add_row(
            f"{leader.number:04d}",
            leader.method,
            leader.score.replace(" classes", ""),
            leader.bounds,
            format_sample(leader.sample),
        )
    return table


def reproduction_table(found: Reproduction) -> Table:
    """Return a table of published and measured scores of each method, in per cent."""
    table = Table(box=None, pad_edge=False)
    metric = found.metric
    for title in ("method", f"published {metric}", f"measured {metric}"):
        table.add_column(title)
    for title in ("deviation", "seeds", "difference", "settings"):
        table.add_column(title)
    for row in found.rows:
        table.add_row(
            row.method,
            "" if row.published is None else f"{row.published:.2f}",
            "" if row.mean is None else f"{row.mean:.2f}",
            "" if row.deviation is None else f"{row.deviation:.2f}",
            str(len(row.values)),
            "" if row.difference is None else f"{row.difference:+.2f}",
            row.settings,
        )
    return table


def match_table(similarity: Sequence[Sequence[float]]) -> Table:
    """Return a table of the similarity of stages."""
    table = Table(box=None, pad_edge=False)
    table.add_column("student")
    for number in range(len(similarity[0])):
        table.add_column(f"teacher's stage {number + 1}", justify="right")
    for number, row in enumerate(similarity):
        table.add_row(f"stage {number + 1}", *(f"{value:.2f}" for value in row))
    return table


def plan_lines(plan: Plan) -> list[str]:
    """Describe a plan: trainings, time, device-hours, money, memory, disk, and the state of the cache."""
    counts, took = plan.trainings, {name: format_duration(seconds) for name, seconds in plan.phases.items()}
    done = f", {counts['done']:.0f} are done" if counts["done"] else ""
    lines = [
        f"trainings  {counts['published']:.0f} published settings, {counts['sampled']:.0f} samples (about "
        f"{counts['pruned']:.0f} of them pruned), {counts['repeated']:.0f} confirmations on fresh seeds{done}; "
        f"{plan.parallel} at a time",
        f"time       about {format_estimate(plan.seconds, format_duration)}",
        f"           start {took['start']}, teacher {took['teacher']}, trials {took['search']}, "
        f"confirmation {took['confirmation']}, end {took['end']}",
        f"devices    about {format_estimate(plan.device_hours, format_hours)} {plan.device_unit} on {plan.device}",
    ]
    if plan.money is None:
        lines.append("money      unknown: set price_per_hour of cluster.nodes, or search.budget.price")
    else:
        lines.append(f"money      about {format_estimate(plan.money, lambda value: f'{value:.2f}')} {plan.currency}")
    if plan.memory is not None:
        lines.append(f"memory     {format_size(plan.memory)} for all processes")
    if plan.gpu_memory is not None:
        lines.append(f"           {format_size(plan.gpu_memory)} of GPU memory per trial")
    lines.append(f"disk       about {format_estimate(plan.disk, format_size)}")
    if plan.fetch is not None:
        fetch = plan.fetch
        where = "to this machine" if fetch.nodes == 1 else f"to each of {fetch.nodes} nodes"
        lines.append(
            f"data       {format_size(fetch.bytes)} {where}, {format_duration(fetch.seconds)} at {fetch.gbit:g} Gbit/s "
            "(cluster.store_gbit)"
        )
    teacher = "the teacher is ready" if plan.ready["teacher"] else "the teacher will be fitted"
    if plan.teachers > 1:
        ready = round(plan.ready["teacher"] * plan.teachers)
        teacher = f"{ready} of {plan.teachers} teachers are ready"
        teacher += ", the others will be fitted" if ready < plan.teachers else ""
    whose = "its cache" if plan.teachers == 1 else "their caches"
    cache = "no cache is needed" if plan.ready["cache"] == 1 else f"{whose} will be built"
    if 0 < plan.ready["cache"] < 1:
        cache = f"{plan.ready['cache']:.0%} of {whose} is built"
    lines.append(f"cached     {teacher}, {cache}")
    return [*lines, *(f"excluded   {reason}" for reason in plan.left_out.values())]
