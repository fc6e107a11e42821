"""What a study says of itself to others: the content of summary.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from heterokd.config.experiment import Experiment
from heterokd.methods import BASELINE
from heterokd.study.budget import Spending
from heterokd.study.leaderboard import Leader, front
from heterokd.study.progress import Standing
from heterokd.study.storage import Given
from heterokd.study.trials import TrialRecord

SUMMARY_LEADERS = 20
"""How many leaders a summary holds; it is rewritten after each trial."""


def summarise(
    experiment: Experiment,
    methods: Sequence[str],
    told: Given,
    standing: Standing,
    leaders: Sequence[Leader],
    spending: Spending,
    harmful: Sequence[TrialRecord],
) -> dict[str, Any]:
    """Standing, the first leaders, winner, best scratch; plain values, no NaN.

    Args:
        experiment: the question.
        methods: of the study.
        told: methods and students that are left out, and what students cost.
        standing: how far it is.
        leaders: best first.
        spending: what it has cost.
        harmful: trials that were clearly worse than the same student trained on labels alone.
    """
    baseline = next((leader for leader in leaders if leader.method == BASELINE), None)
    summary: dict[str, Any] = _plain(
        {
            "name": experiment.name,
            "metric": experiment.metric,
            "maximise": experiment.maximise,
            "methods": methods,
            "excluded": told.excluded,
            "left_out": told.left_out,
            "students": told.facts,
            "objectives": experiment.search.objectives,
            "standing": asdict(standing),
            "budget": experiment.search.budget.model_dump(),
            "spent": spending.as_dict(),
            "negative_transfer": [
                {"number": one.number, "method": one.method, "epoch": one.reached} for one in harmful
            ],
            "winner": asdict(leaders[0]) if leaders else None,
            "scratch": asdict(baseline) if baseline else None,
            "front": _front(experiment, told, leaders),
            "leaders": [asdict(leader) for leader in leaders[:SUMMARY_LEADERS]],
        }
    )
    return summary


def _front(experiment: Experiment, told: Given, leaders: Sequence[Leader]) -> list[dict[str, Any]]:
    """Students of which none is better in everything, with what they cost; empty where the metric alone counts."""
    costs = experiment.search.costs
    members = front(leaders, told.facts, costs) if costs else []
    return [{**asdict(member), **told.facts.get(member.student, {})} for member in members]


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples, null for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
