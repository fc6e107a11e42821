"""SearchTerminal: show the progress of a search."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from heterokd.cli.terminal.console import Terminal
from heterokd.cli.terminal.tables import SHOWN_LEADERS, leader_table
from heterokd.config.experiment import TEACHER, Experiment
from heterokd.errors import HeterokdError
from heterokd.formatting import classes_in_mean, format_duration, format_score
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import BEHIND, NEGATIVE_TRANSFER
from heterokd.study.progress import StudyProgress
from heterokd.study.pruner import checkpoint_epochs, compared
from heterokd.study.summary import StudySummary

FEWEST_LEADERS = 3
"""Minimum number of rows in the live table."""

HEADS = 7
"""Lines of the live view in addition to leaders and trials: counts, time, budget, best, two empty, table header."""

NUMBERS = {"trials": "trials", "trainings": "trainings", "hours": "h", "gpu_hours": "GPU-hours", "money": "money"}


class SearchTerminal(Terminal):
    """Output of a search, a context manager: a live view on a terminal, a line per finished trial elsewhere.

    Args:
        experiment: of the search.
        quiet: print nothing (`--json`).
        seconds: clock for the elapsed and remaining time.
    """

    def __init__(
        self, experiment: Experiment, *, quiet: bool = False, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(quiet=quiet, fit_epochs=experiment.teacher.training.epochs, seconds=seconds)
        self.experiment, self.metric = experiment, experiment.metric
        self.started = self.heard = seconds()
        self.done_at_start: int | None = None
        self.running: dict[int, TrialFolder] = {}
        self.summary: StudySummary | None = None
        self.live = Live(self, console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> SearchTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, event: Literal["start", "report", "finish"], trial: TrialFolder, summary: StudySummary) -> None:
        """Update the view after a trial started, reported or finished."""
        self.heard = self.seconds()
        if self.done_at_start is None:
            self.started, self.done_at_start = self.heard, summary.progress.done - (event == "finish")
        self.summary = summary
        if event == "finish":
            self.running.pop(trial.number, None)
            line = self._finished(trial, summary.progress)
            if self.is_live:
                self.print_table(_line(line))
            else:
                self.print_line(line)
            return
        self.running[trial.number] = trial
        if self.is_live and not self.live.is_started:
            self.clear_status()
            self.live.start()

    def _finished(self, trial: TrialFolder, progress: StudyProgress) -> str:
        snapshot = trial.snapshot
        status, value = snapshot.status, snapshot.metrics.get(self.metric)
        reached = ""
        if value is not None:
            reached = f"{self.metric} {format_score(value)}{classes_in_mean(self.metric, snapshot.metrics)}"
        if status == TrialStatus.PRUNED:
            reached += f" at epoch {int(snapshot.metrics['epoch'])}"
            reports = trial.metrics()[-compared(trial.recipe.training.epochs) :]
            curve = [report[self.metric] for report in reports if self.metric in report]
            if snapshot.reason == BEHIND and len(curve) > 1:
                reached += f", {format_score(fmean(curve))} on average"  # the value that a rung compares
            elif snapshot.reason not in (BEHIND, NEGATIVE_TRANSFER, None):
                reached += f", stopped by {snapshot.reason}"
        if status.is_failure and trial.error_line:
            reached = trial.error_line
        repeated, what = snapshot.confirms, []
        teacher = snapshot.sample.get(TEACHER)
        if teacher is not None:
            what.append(f"after {teacher}")
        if not (trial.path / "recipe.yaml").exists():
            return f"[{progress.done:>3}/{progress.total}] {trial.number:04d} ended before its process began"
        if repeated is not None:
            what.append(f"seed {trial.recipe.training.seed} of trial {repeated}")
        place = f"[{progress.done:>3}/{progress.total}] {trial.number:04d}"
        return f"{place} {trial.recipe.method:<8} {status:<8} {reached}  {', '.join(what)}".rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the live view in the height of the screen."""
        yield self.view(options.size.height)

    def view(self, height: int) -> RenderableType:
        """Render counts, time, budget, the best student, leaders and running trials in `height` lines."""
        if (summary := self.summary) is None:
            return Text("starting")
        lines = height - HEADS - 1  # a line for the cursor
        runs = list(self.running.values())
        leaders = max(FEWEST_LEADERS, min(SHOWN_LEADERS, lines - 1 - len(runs)))
        room = max(1, lines - 1 - leaders)  # scratch may need an additional line
        shown = runs if len(runs) <= room else runs[: room - 1]
        running = [self._where(trial) for trial in shown]
        if len(shown) < len(runs):
            running.append(f"and {len(runs) - len(shown)} more")
        parts: list[RenderableType] = [
            _line(self._numbers(summary)),
            _line(self._time(summary)),
            *(_line(f"spent    {spent}") for spent in self._spent(summary)),
            _line(self._best(summary)),
            Text(""),
            leader_table(summary, leaders),
            Text(""),
        ]
        named = [f"{'running' if not index else '':<8} {text}" for index, text in enumerate(running or ["nothing yet"])]
        return Group(*parts, *(_line(text, "dim") for text in named))

    def _numbers(self, summary: StudySummary) -> str:
        progress = summary.progress
        parts = [f"{progress.complete} complete", f"{progress.pruned} pruned", f"{progress.failed} failed"]
        if progress.paused:
            parts.append(f"{progress.paused} paused")
        if progress.confirmations_done:
            parts.append(f"{progress.confirmations_done} confirmed")
        return f"{progress.done} of {progress.total}: {', '.join(parts)}; {len(self.running)} running"

    def _time(self, summary: StudySummary) -> str:
        """Return elapsed time, and the remaining time at the average pace."""
        now = self.seconds()
        parts = [f"{format_duration(now - self.started)} so far"]
        left = self._left(summary, now)
        if left is not None:
            parts.append(f"about {format_duration(left)} left")
        return ", ".join(parts)

    def _left(self, summary: StudySummary, now: float) -> float | None:
        progress, limits = summary.progress, _limits(summary)
        done = progress.done - (self.done_at_start or 0)
        left = None
        if done > 0:
            left = (self.heard - self.started) / done * max(progress.total - progress.done, 0) - (now - self.heard)
        if "hours" in limits:
            by_clock = 3600 * (limits["hours"] - (summary.spent.get("hours") or 0.0)) - (now - self.heard)
            left = by_clock if left is None else min(left, by_clock)
        return None if left is None else max(left, 0.0)

    def _spent(self, summary: StudySummary) -> list[str]:
        """Return a line with the used part of each limit; none without a budget."""
        spent = {key: value or 0.0 for key, value in summary.spent.items()}
        if self.running and "hours" in spent:
            spent["hours"] += (self.seconds() - self.heard) / 3600
        limits = _limits(summary)
        parts = [f"{spent[key]:.3g} of {limit:g} {NUMBERS[key]}" for key, limit in limits.items() if key in spent]
        return [", ".join(parts)] if parts else []

    def _best(self, summary: StudySummary) -> str:
        winner = summary.winner
        if winner is None:
            return "best     no trial is complete yet"
        return f"best     {winner.number:04d} {winner.method} {self.metric} {winner.score} ({winner.bounds})"

    def _where(self, trial: TrialFolder) -> str:
        """Return a trial's line, or only its number if its folder cannot be read: the view must not end the search."""
        try:
            return self._running(trial)
        except (HeterokdError, OSError):
            return f"{trial.number:04d}"

    def _running(self, trial: TrialFolder) -> str:
        """Return a trial's epoch, from its folder if it is on this machine, and its next rung."""
        recipe, reports = trial.recipe, trial.metrics()
        epochs = recipe.training.epochs
        epoch = int(reports[-1]["epoch"]) if reports else 0
        repeated = trial.snapshot.confirms
        ahead = [rung for rung in checkpoint_epochs(self.experiment, epochs) if rung > epoch]
        if repeated is not None:
            what = f"seed {recipe.training.seed} of trial {repeated}"
        elif self.experiment.search.pruner is not None:
            what = "any epoch"
        else:
            what = f"rung at {ahead[0]}" if ahead and self.experiment.search.prune else "to the end"
        score = ""
        evaluated = next((report for report in reversed(reports) if self.metric in report), None)
        if evaluated is not None:
            score = f"{self.metric} {format_score(evaluated[self.metric])}{classes_in_mean(self.metric, evaluated)}"
        return f"{trial.number:04d} {recipe.method:<10} epoch {epoch:>3} of {epochs}, {what:<12} {score}".rstrip()


def _limits(summary: StudySummary) -> dict[str, float]:
    return {key: float(summary.limits[key]) for key in NUMBERS if key in summary.limits}


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
