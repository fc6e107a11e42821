"""What a search is doing: its running trials, and its last decisions with their reasons."""

from __future__ import annotations

from statistics import fmean

from heterokd.formatting import format_score
from heterokd.report.study_data import StudyReport
from heterokd.report.tables import Row
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import BEHIND
from heterokd.study.pruner import checkpoint_epochs, compared
from heterokd.study.trial_view import TrialView

LAST_DECISIONS = 12
"""Maximum number of decisions that are listed."""


def running_rows(report: StudyReport) -> list[Row]:
    """List the running trials with their last epoch and value, and the epoch at which they are compared next."""
    rows: list[Row] = []
    for trial in report.trials:
        if trial.status != TrialStatus.RUNNING:
            continue
        epoch = trial.epochs[-1] if trial.epochs else 0
        ahead = [rung for rung in checkpoint_epochs(report.experiment, trial.planned) if rung > epoch]
        compares = ahead and report.experiment.search.prune and trial.is_search
        rows.append(
            {
                "number": trial.number,
                "method": trial.method,
                "epoch": epoch,
                "planned": trial.planned,
                "value": format_score(trial.value) if trial.value is not None else "",
                "next": f"compared at epoch {ahead[0]}" if compares else "trains to the end",
                "repeats": "" if trial.confirms is None else f"seed {trial.seed} of trial {trial.confirms}",
            }
        )
    return rows


def decisions(report: StudyReport) -> list[str]:
    """Describe how the last trials ended, the newest first: `0007 (kd) stopped at epoch 20: 14th of ...`."""
    ended = [trial for trial in report.trials if trial.status.is_final]
    ended.sort(key=lambda trial: (trial.path / "trial.json").stat().st_mtime, reverse=True)
    return [_decision(report, trial) for trial in ended[:LAST_DECISIONS]]


def _decision(report: StudyReport, trial: TrialView) -> str:
    name = f"{trial.number:04d} ({trial.method})"
    if trial.confirms is not None:
        name += f", seed {trial.seed} of trial {trial.confirms},"
    value = "" if trial.value is None else f" with {format_score(trial.value)}"
    if trial.status == TrialStatus.COMPLETE:
        return f"{name} was trained to the end{value}"
    if trial.status != TrialStatus.PRUNED or not trial.epochs:
        return f"{name} {trial.status}: {trial.error or trial.reason or 'no reason is known'}"
    epoch = trial.epochs[-1]
    reason = trial.reason
    if reason == BEHIND:
        place, count = _place(report, trial, epoch)
        window = min(compared(trial.planned), epoch)
        reason = f"{place}{_ordinal(place)} of the {count} that have reached it, by the mean of {window} epochs"
    return f"{name} stopped at epoch {epoch}: {reason or 'no reason is known'}"


def _place(report: StudyReport, trial: TrialView, epoch: int) -> tuple[int, int]:
    """Return the place of a trial among all trials of the search that have reached an epoch, and their number."""
    means = {}
    for other in report.search:
        window = range(epoch - compared(other.planned) + 1, epoch + 1)
        values = [value for at, value in zip(other.epochs, other.curve, strict=True) if at in window]
        if values and other.epochs[-1] >= epoch:
            means[other.number] = report.sign * fmean(values)
    mine = means.get(trial.number)
    return (1 if mine is None else 1 + sum(mean > mine for mean in means.values())), len(means)


def _ordinal(place: int) -> str:
    if place % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
