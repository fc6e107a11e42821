"""Say what a study's figures mean: the same sentences on the page and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a search left out, ended early or paused, and what it spent of its budget: one sentence each."""
    found = [f"Left out: {reason}." for key in ("left_out", "excluded") for reason in summary.get(key, {}).values()]
    harmful = summary.get("negative_transfer", ())
    if harmful:
        worse = ", ".join(f"trial {one['number']} ({one['method']}, epoch {one['epoch']})" for one in harmful)
        found.append(f"Negative transfer, ended early: clearly worse than the same student on labels alone: {worse}.")
    standing = summary["standing"]
    if standing.get("diverged"):
        found.append(f"{standing['diverged']} trial(s) ended at once because a loss or a metric was no number.")
    if standing.get("paused"):
        found.append(
            f"The budget paused {standing['paused']} trial(s); a larger one, with --resume, goes on with them."
        )
    spent, budget = summary.get("spent") or {}, summary.get("budget") or {}
    limits = {key: limit for key, limit in budget.items() if limit is not None and key != "price"}
    if limits:
        parts = [f"{spent[key]:.4g} of {limit:g} {key.replace('_', ' ')}" for key, limit in limits.items()]
        found.append(f"Spent: {', '.join(parts)}.")
    return found


def half_width(leader: Mapping[str, Any]) -> float | None:
    """Half of a leader's 95 % interval, which may end early on one side where the metric does; None without one."""
    if leader["low"] is None or leader["high"] is None or leader["mean"] is None:
        return None
    return float(max(leader["mean"] - leader["low"], leader["high"] - leader["mean"]))


def verdict(summary: Mapping[str, Any]) -> str:
    """How sure the study is that its winner is better than scratch, in one sentence."""
    winner, scratch = summary["winner"], summary["scratch"]
    if winner is None:
        return "No trial was trained to the end."
    if scratch is not None and winner["method"] == scratch["method"]:
        return "Distillation brought nothing here: the student trained on labels alone is the best."
    if scratch is None:
        return "The study had no scratch trial, so what distillation adds is not known."
    widths = [half_width(leader) for leader in (winner, scratch)]
    if not winner["confirmed"] or widths[0] is None or widths[1] is None:
        return "One seed each: the difference may be noise. More trials, or search.confirm_share, would tell."
    # Both half widths come from the same pooled deviation and quantile, so the difference has its own interval.
    difference, half = winner["mean"] - scratch["mean"], math.hypot(widths[0], widths[1])
    if not summary["maximise"]:
        difference = -difference
    gain = f"{difference:+.4f} over scratch (95 % interval {difference - half:+.4f} to {difference + half:+.4f})"
    if difference > half:
        return f"The gain is real: {gain}."
    return f"The gain may be noise: {gain}; more repetitions (search.confirm_share, or a larger budget) would tell."
