"""Why a method did not win: its difference to the winner, or how its trials ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from heterokd.formatting import format_score
from heterokd.methods import BASELINE
from heterokd.storage.trial_status import TrialStatus
from heterokd.study.assignment import BEHIND
from heterokd.study.gain import gain
from heterokd.study.pruner import compared
from heterokd.study.ranked_config import RankedConfig
from heterokd.study.summary import StudySummary
from heterokd.study.trial_view import TrialView

SURENESS = {
    "significant": "better than the winner in this pair alone",
    "likely": "probably better, but not certain",
    "tie": "not known to be worse",
    "likely worse": "probably worse",
    "worse": "significantly worse",
    "unknown": "one seed each, so the difference may be noise",
}
"""A difference to the winner in words, by `Gain.grade`; the winner has the best lower bound, maybe a lower mean."""


def method_outcomes(summary: StudySummary, trials: Sequence[TrialView]) -> dict[str, str]:
    """Describe in a sentence how each method of a study ended, in the order of first trials.

    Args:
        summary: the study's leaders.
        trials: all trials of the study, repetitions included.
    """
    search = [trial for trial in trials if trial.is_search]
    groups: dict[str, list[TrialView]] = {}
    for trial in search:
        groups.setdefault(trial.method, []).append(trial)
    return {method: _outcome(summary, method, groups[method], search) for method in groups}


def _outcome(summary: StudySummary, method: str, trials: Sequence[TrialView], search: Sequence[TrialView]) -> str:
    winner = summary.winner
    if winner is not None and winner.method == method:
        return "the winner"
    if summary.methods and method not in (*summary.methods, BASELINE):
        values = [trial.value for trial in trials if trial.is_complete and trial.value is not None]
        best = (max if summary.maximise else min)(values, default=None)
        return "removed from the search space" + ("" if best is None else f"; best value {format_score(best)}")
    if any(trial.is_complete for trial in trials):
        return "complete" if winner is None else _to_winner(summary, winner, method, trials)
    sign = 1 if summary.maximise else -1
    stopped = [trial for trial in trials if trial.status == TrialStatus.PRUNED and trial.epochs]
    if stopped:
        last = max(stopped, key=lambda trial: (trial.epochs[-1], sign * trial.curve[-1]))
        count = "its trial was" if len(trials) == 1 else f"{len(stopped)} of {len(trials)} trials were"
        return (
            f"{count} stopped early, trial {last.number} at epoch {last.epochs[-1]} of {last.planned}: "
            f"{stop_reason(last, search, sign)}"
        )
    failed = [trial for trial in trials if trial.status.is_failure]
    if failed:
        cause = failed[-1].error or failed[-1].reason or "no reason is known"
        return f"{len(failed)} of {len(trials)} trials failed: {cause}"
    return f"not finished: {', '.join(sorted({str(trial.status) for trial in trials}))}"


def _to_winner(summary: StudySummary, winner: RankedConfig, method: str, trials: Sequence[TrialView]) -> str:
    """Compare a method's first repeated configuration with the winner; without one, the best values of the search."""
    leader = next((leader for leader in summary.leaders if leader.method == method and leader.confirmed), None)
    found = None if leader is None else gain(leader, winner, maximise=summary.maximise)
    if found is not None and winner.confirmed:
        interval = f" ({found.interval})" if found.interval else ""
        return f"{found.difference:+.4f} to the winner{interval}: {SURENESS[found.grade]}"
    choose = max if summary.maximise else min
    best = choose(trial.value for trial in trials if trial.is_complete and trial.value is not None)
    text = f"best value of the search {format_score(best)}"
    if winner.search_value is not None:
        text += f", of the winner {format_score(winner.search_value)}"
    return f"{text}; not repeated on fresh seeds"


def stop_reason(trial: TrialView, search: Sequence[TrialView], sign: int) -> str:
    """Return why a trial was stopped, in words.

    Args:
        trial: a stopped trial that has reported an epoch.
        search: all trials of the search, without repetitions.
        sign: 1 if larger values of the metric are better, else -1.
    """
    if trial.reason != BEHIND:
        return trial.reason or "no reason is known"
    epoch = trial.epochs[-1]
    place, count = _place(trial, search, epoch, sign)
    window = min(compared(trial.planned), epoch)
    epochs = "value of the epoch" if window == 1 else f"mean of {window} epochs"
    return f"{place}{_ordinal(place)} of the {count} that have reached it, by the {epochs}"


def _place(trial: TrialView, search: Sequence[TrialView], epoch: int, sign: int) -> tuple[int, int]:
    """Return the place of a trial among all trials of the search that have reached an epoch, and their number."""
    means: Mapping[int, float] = {
        other.number: sign * fmean(values)
        for other in search
        if other.epochs and other.epochs[-1] >= epoch and (values := _compared_values(other, epoch))
    }
    mine = means.get(trial.number)
    return (1 if mine is None else 1 + sum(mean > mine for mean in means.values())), len(means)


def _compared_values(trial: TrialView, epoch: int) -> list[float]:
    """Return the values that a rung at `epoch` averages."""
    window = range(epoch - compared(trial.planned) + 1, epoch + 1)
    return [value for at, value in zip(trial.epochs, trial.curve, strict=True) if at in window]


def _ordinal(place: int) -> str:
    if place % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
