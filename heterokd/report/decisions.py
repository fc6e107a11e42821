"""What a search is doing: its running trials, and its last decisions with their reasons."""

from __future__ import annotations

from heterokd.formatting import format_score
from heterokd.report.study_data import StudyReport
from heterokd.report.tables import Row
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.method_outcome import stop_reason
from heterokd.study.pruner import checkpoint_epochs
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
    sentence = stop_reason(trial, report.search, report.sign)
    return f"{name} stopped at epoch {trial.epochs[-1]}: {sentence}"
