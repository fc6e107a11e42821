"""What a study says of itself to others: the content of summary.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from heterokd.config import Experiment
from heterokd.study.assignments import BASELINE
from heterokd.study.leaders import Leader
from heterokd.study.spending import Spending
from heterokd.study.standing import Standing
from heterokd.study.trials import Training

SUMMARY_LEADERS = 20
"""How many leaders a summary holds; it is rewritten after each trial."""


def summarise(
    experiment: Experiment,
    methods: Sequence[str],
    excluded: Mapping[str, str],
    standing: Standing,
    leaders: Sequence[Leader],
    spending: Spending,
    harmful: Sequence[Training],
) -> dict[str, Any]:
    """Standing, the first leaders, winner, best scratch; plain values, no NaN.

    Args:
        experiment: the question.
        methods: of the study.
        excluded: methods that cannot exist for the pair, with the reason.
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
            "excluded": excluded,
            "standing": asdict(standing),
            "budget": experiment.search.budget.model_dump(),
            "spent": spending.as_dict(),
            "negative_transfer": [
                {"number": one.number, "method": one.method, "epoch": one.reached} for one in harmful
            ],
            "winner": asdict(leaders[0]) if leaders else None,
            "scratch": asdict(baseline) if baseline else None,
            "leaders": [asdict(leader) for leader in leaders[:SUMMARY_LEADERS]],
        }
    )
    return summary


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples, null for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
