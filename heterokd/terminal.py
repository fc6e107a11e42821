"""What a search shows while it runs: a live table on a terminal, one line per finished trial in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from heterokd.plan import Plan, Range
from heterokd.report import metric_name, settings, show
from heterokd.reproduce import Reproduction
from heterokd.root import TrialFolder
from heterokd.tasks import TASKS

SHOWN_LEADERS = 6
"""Rows of the leaders' tables: they fit a small terminal together with everything else."""


SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

PIPE_WIDTH = 140
"""Columns where nobody says how many there are: a log file."""


class Terminal:
    """Listens to a search. Use as a context manager.

    Args:
        metric: what is searched for.
        quiet: print nothing (`--json`).
    """

    def __init__(self, metric: str, *, quiet: bool = False) -> None:
        self.metric = metric
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        self.console = Console(file=sys.stdout, quiet=quiet, highlight=False, width=width)
        self.started = time.monotonic()
        self.first_finish: tuple[float, int] | None = None
        self.running: dict[int, str] = {}
        self.summary: Mapping[str, Any] | None = None
        self.live = Live(self, console=self.console, refresh_per_second=2, transient=True)
        self.is_live = self.console.is_terminal and not quiet

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def teacher_epoch(self, metrics: Mapping[str, float]) -> bool:
        """Progress of the teacher's fit; never asks it to stop."""
        epoch = int(metrics["epoch"])
        if epoch == 1 or epoch % 10 == 0:
            self.say(f"fitting the teacher: epoch {epoch}, {score_text(metrics)} on val")
        return True

    def __call__(
        self, event: Literal["start", "report", "finish"], trial: TrialFolder, summary: Mapping[str, Any]
    ) -> None:
        """A trial started, reached a rung or finished."""
        self.summary = summary
        status, method = trial.status, trial.recipe.method
        if event != "finish":
            reports = trial.metrics()
            at = f" epoch {int(reports[-1]['epoch'])}" if reports else ""
            again = f" again on seed {trial.recipe.training.seed}" if status.get("confirms") is not None else ""
            self.running[trial.number] = f"{trial.number:04d} {method}{again}{at}"
            if self.is_live and not self.live.is_started:
                self.live.start()
            return
        self.running.pop(trial.number, None)
        self.say(self._finished(trial, status, method))

    def _finished(self, trial: TrialFolder, status: Mapping[str, Any], method: str) -> str:
        standing = self.summary["standing"] if self.summary else {}
        done = sum(standing.get(key, 0) for key in ("complete", "pruned", "failed", "confirmations_done"))
        planned = standing.get("planned", 0) + standing.get("confirmations_planned", 0)
        value = (status.get("metrics") or {}).get(self.metric)
        reached = "" if value is None else f"{self.metric} {show(value)}"
        state = status["state"]
        if state == "pruned":
            reached += f" at epoch {int(status['metrics']['epoch'])}"
        if state == "failed" and trial.error:
            reached = trial.error.strip().splitlines()[-1]
        repeated = status.get("confirms")
        what = "" if repeated is None else f"seed {trial.recipe.training.seed} of trial {repeated}"
        return f"[{done:>3}/{planned}] {trial.number:04d} {method:<8} {state:<8} {reached}  {what}".rstrip()

    def __rich__(self) -> Group:
        """The live view."""
        elapsed = time.monotonic() - self.started
        parts: list[Any] = []
        if self.summary is not None:
            standing = self.summary["standing"]
            done = standing["complete"] + standing["pruned"] + standing["failed"] + standing["confirmations_done"]
            planned = standing["planned"] + standing["confirmations_planned"]
            if self.first_finish is None and done:
                self.first_finish = (elapsed, done)
            eta = ""
            if self.first_finish is not None and done > self.first_finish[1]:
                rate = (elapsed - self.first_finish[0]) / (done - self.first_finish[1])
                eta = f", about {clock(rate * max(planned - done, 0))} left"
            parts.append(
                Text(
                    f"{done} of {planned} trainings: {standing['complete']} complete, {standing['pruned']} pruned, "
                    f"{standing['failed']} failed; {clock(elapsed)} so far{eta}"
                )
            )
            parts.append(leader_table(self.summary))
        parts.append(Text("running: " + ("; ".join(self.running.values()) or "nothing yet"), style="dim"))
        return Group(*parts)


def score_text(metrics: Mapping[str, float]) -> str:
    """The score of an epoch with its name: `top-1 0.9123` or `mIoU 0.4312`."""
    key = next(key for task in TASKS.values() if (key := f"val/{task.score}") in metrics)
    return f"{metric_name(key)} {show(metrics[key])}"


def leader_table(summary: Mapping[str, Any]) -> Table:
    """The leading students with their intervals; the scratch baseline is always among them."""
    table = Table(box=None, pad_edge=False, expand=True)
    for title, width in (("trial", 5), ("method", 8), (summary["metric"], 10), ("95 % interval of the mean", 25)):
        table.add_column(title, min_width=width, no_wrap=True)
    # What does not fit is cut here, never in the figures.
    table.add_column("settings", overflow="ellipsis", no_wrap=True, ratio=1)
    rows = list(summary["leaders"][:SHOWN_LEADERS])
    scratch = summary["scratch"]
    if scratch is not None and all(leader["number"] != scratch["number"] for leader in rows):
        rows.append(scratch)
    for leader in rows:
        sure = f"{show(leader['low'])} to {show(leader['high'])}" if leader["low"] is not None else ""
        count = len(leader["seeds"])
        seeds = f", {count} seed{'s' if count > 1 else ''}" if leader["confirmed"] else "one seed"
        table.add_row(
            f"{leader['number']:04d}",
            leader["method"],
            show(leader["mean"]),
            (sure if leader["confirmed"] else "") + seeds,
            settings(leader["sample"]),
        )
    return table


def reproduction_table(found: Reproduction) -> Table:
    """Published and measured score of each method, in per cent."""
    table = Table(box=None, pad_edge=False)
    metric = found.metric
    for title in (
        "method",
        f"published {metric}",
        f"measured {metric}",
        "deviation",
        "seeds",
        "difference",
        "settings",
    ):
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
    """How alike stages are."""
    table = Table(box=None, pad_edge=False)
    table.add_column("student")
    for number in range(len(similarity[0])):
        table.add_column(f"teacher's stage {number + 1}", justify="right")
    for number, row in enumerate(similarity):
        table.add_row(f"stage {number + 1}", *(f"{value:.2f}" for value in row))
    return table


def plan_lines(plan: Plan) -> list[str]:
    """A plan in words: trainings, time, device-hours, money, memory, disk, and what is there already."""
    counts, took = plan.trainings, {name: clock(seconds) for name, seconds in plan.phases.items()}
    done = f", {counts['done']:.0f} are done already" if counts["done"] else ""
    lines = [
        f"trainings  {counts['published']:.0f} published settings, {counts['sampled']:.0f} samples (about "
        f"{counts['pruned']:.0f} of them stopped early), {counts['repeated']:.0f} again on fresh seeds{done}; "
        f"{plan.parallel} at a time",
        f"time       {span(plan.seconds, clock)}",
        f"           start {took['start']}, teacher {took['teacher']}, trials {took['search']}, "
        f"confirmation {took['confirmation']}, end {took['end']}",
        f"devices    {span(plan.device_hours, hours)} {plan.device_unit} on {plan.device}",
    ]
    if plan.money is None:
        lines.append("money      unknown: give cluster.nodes with their price_per_hour, or search.budget.price")
    else:
        lines.append(f"money      {span(plan.money, lambda value: f'{value:.2f}')} {plan.currency}")
    if plan.memory is not None:
        lines.append(f"memory     {size(plan.memory)} for all processes together")
    if plan.gpu_memory is not None:
        lines.append(f"           {size(plan.gpu_memory)} of a GPU for each trial")
    lines.append(f"disk       {span(plan.disk, size)}")
    teacher = "the teacher is ready" if plan.ready["teacher"] else "the teacher will be fitted"
    cache = "no cache is needed" if plan.ready["cache"] == 1 else "its cache will be built"
    if 0 < plan.ready["cache"] < 1:
        cache = f"{plan.ready['cache']:.0%} of its cache are there"
    return [*lines, f"there      {teacher}, {cache}"]


def span(value: Range, show: Callable[[float], str]) -> str:
    """A number with its range."""
    return f"about {show(value.expected)} ({show(value.low)} to {show(value.high)})"


def hours(value: float) -> str:
    """Hours with two digits that mean something."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit, bytes_ in reversed(SIZES.items()):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count:.0f} B"


def clock(seconds: float) -> str:
    """A duration as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
