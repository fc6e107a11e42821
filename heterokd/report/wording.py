"""Sentences on a study's results, for the page and the terminal."""

from __future__ import annotations

import math

from heterokd.study.failures import IN_A_ROW
from heterokd.study.summary import StudySummary


def notes(summary: StudySummary) -> list[str]:
    """List what a search excluded, stopped early or paused, and what it spent of its budget: a sentence each."""
    found = [f"Excluded: {reason}." for reasons in (summary.left_out, summary.excluded) for reason in reasons.values()]
    found += [
        f"{method} failed {IN_A_ROW} times in a row for the same reason and was left out of the rest of the search: "
        f"{reason}"
        for method, reason in summary.failing.items()
    ]
    harmful = summary.negative_transfer
    if harmful:
        worse = ", ".join(f"trial {trial.number} ({trial.method}, epoch {trial.epoch})" for trial in harmful)
        found.append(f"Negative transfer, stopped early as clearly worse than the student without a teacher: {worse}.")
    progress = summary.progress
    if progress.diverged:
        found.append(f"{progress.diverged} trial(s) diverged: a loss or a metric was not finite.")
    if progress.paused:
        found.append(f"The budget paused {progress.paused} trial(s); raise it and use --resume to continue them.")
    if summary.limits:
        parts = [
            f"{summary.spent.get(key) or 0:.4g} of {limit:g} {key.replace('_', ' ')}"
            for key, limit in summary.limits.items()
        ]
        found.append(f"Spent: {', '.join(parts)}.")
    return found


def verdict(summary: StudySummary) -> str:
    """Say whether the winner is significantly better than scratch."""
    winner, scratch, failure = summary.winner, summary.scratch, summary.distillation_failure
    if failure is not None:
        return f"All {failure.trials} distillation trials failed: {failure.reason}"
    if winner is None:
        return "No trial is complete."
    if scratch is None:
        return "The study has no scratch trial, so the gain of distillation is unknown."
    if winner.method == scratch.method:
        return "Distillation did not help here: the student trained without a teacher is the best."
    halves = winner.half_width, scratch.half_width
    if winner.mean is None or scratch.mean is None or not winner.confirmed or halves[0] is None or halves[1] is None:
        return "One seed each, so the difference may be noise: run more trials, or raise search.confirm_share."
    # Both half widths come from the same pooled deviation and quantile, so the difference has its own interval.
    difference, half = winner.mean - scratch.mean, math.hypot(halves[0], halves[1])
    if not summary.maximise:
        difference = -difference
    gain = f"{difference:+.4f} over scratch (95 % interval {difference - half:+.4f} to {difference + half:+.4f})"
    if difference > half:
        return f"The gain is significant: {gain}."
    return f"The gain is not significant: {gain}; raise search.confirm_share or the budget for more fresh seeds."
