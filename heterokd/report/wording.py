"""Say what a study's figures mean: the same sentences on the page and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def notes(summary: Mapping[str, Any]) -> list[str]:
    """List what a search excluded, stopped early or paused, and what it spent of its budget: a sentence each."""
    found = [f"Excluded: {reason}." for key in ("left_out", "excluded") for reason in summary.get(key, {}).values()]
    harmful = summary.get("negative_transfer", ())
    if harmful:
        worse = ", ".join(f"trial {one['number']} ({one['method']}, epoch {one['epoch']})" for one in harmful)
        found.append(f"Negative transfer, stopped early as clearly worse than the student without a teacher: {worse}.")
    standing = summary["standing"]
    if standing.get("diverged"):
        found.append(f"{standing['diverged']} trial(s) diverged: a loss or a metric was not finite.")
    if standing.get("paused"):
        found.append(f"The budget paused {standing['paused']} trial(s); raise it and use --resume to continue them.")
    spent, budget = summary.get("spent") or {}, summary.get("budget") or {}
    limits = {key: limit for key, limit in budget.items() if limit is not None and key != "price"}
    if limits:
        parts = [f"{spent[key]:.4g} of {limit:g} {key.replace('_', ' ')}" for key, limit in limits.items()]
        found.append(f"Spent: {', '.join(parts)}.")
    return found


def half_width(leader: Mapping[str, Any]) -> float | None:
    """Half width of a leader's 95 % interval, the larger side where the metric's range cuts it; None without one."""
    if leader["low"] is None or leader["high"] is None or leader["mean"] is None:
        return None
    return float(max(leader["mean"] - leader["low"], leader["high"] - leader["mean"]))


def verdict(summary: Mapping[str, Any]) -> str:
    """Say whether the winner is significantly better than scratch."""
    winner, scratch = summary["winner"], summary["scratch"]
    if winner is None:
        return "No trial is complete."
    if scratch is not None and winner["method"] == scratch["method"]:
        return "Distillation did not help here: the student trained without a teacher is the best."
    if scratch is None:
        return "The study has no scratch trial, so the gain of distillation is unknown."
    widths = [half_width(leader) for leader in (winner, scratch)]
    if not winner["confirmed"] or widths[0] is None or widths[1] is None:
        return "One seed each, so the difference may be noise: run more trials, or raise search.confirm_share."
    # Both half widths come from the same pooled deviation and quantile, so the difference has its own interval.
    difference, half = winner["mean"] - scratch["mean"], math.hypot(widths[0], widths[1])
    if not summary["maximise"]:
        difference = -difference
    gain = f"{difference:+.4f} over scratch (95 % interval {difference - half:+.4f} to {difference + half:+.4f})"
    if difference > half:
        return f"The gain is significant: {gain}."
    return f"The gain is not significant: {gain}; raise search.confirm_share or the budget for more fresh seeds."
