"""Limits on a student's costs, in the sections `search` and `promotion`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, field_validator

from heterokd.config.settings import Settings
from heterokd.errors import did_you_mean
from heterokd.networks.student_costs import STUDENT_COSTS

STUDENT = "student/"
"""Prefix of costs in objectives and limits."""


class CostLimits(Settings):
    """Upper limits of a student's costs; a cost that is left out has no limit."""

    max_params_m: float | None = Field(None, gt=0, description="millions of parameters")
    max_latency_ms: float | None = Field(
        None, gt=0, description="median of a forward pass at batch 1 on a single core, in milliseconds"
    )
    limits: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="of any other cost, for example {student/flops_g: 0.5}"
    )

    @field_validator("limits")
    @classmethod
    def _are_costs(cls, limits: dict[str, float]) -> dict[str, float]:
        for key in limits:
            check_cost(key)
            if (limit := f"max_{key.removeprefix(STUDENT)}") in cls.model_fields:
                raise ValueError(f"{key}: is limited by {limit}; set that key instead")
        return limits

    @property
    def cost_limits(self) -> dict[str, tuple[str, float]]:
        """By cost, the key of its limit and the limit."""
        found = {key.removeprefix(STUDENT): (f"limits.{key}", limit) for key, limit in self.limits.items()}
        for name, maximum in (("params_m", self.max_params_m), ("latency_ms", self.max_latency_ms)):
            if maximum is not None:
                found[name] = (f"max_{name}", maximum)
        return found


def limit_settings(limits: Mapping[str, float]) -> dict[str, object]:
    """Return the keys of `CostLimits` for limits by cost."""
    named = {f"max_{key}": limit for key, limit in limits.items() if f"max_{key}" in CostLimits.model_fields}
    others = {f"{STUDENT}{key}": limit for key, limit in limits.items() if f"max_{key}" not in named}
    return {**named, "limits": others} if others else {**named}


def check_cost(key: str) -> None:
    """Check that a key names a cost of a student.

    Raises:
        ValueError: unknown cost.
    """
    known = [f"{STUDENT}{name}" for name in STUDENT_COSTS]
    if key not in known:
        raise ValueError(f"{key}: there is no such cost of a student; {did_you_mean(key, known)}")
