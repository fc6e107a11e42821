"""A student's costs: limits in the sections `search` and `promotion`, and in `search` how they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import not_
from typing import Annotated, Literal

from pydantic import Field, field_validator

from heterokd.config.sentences import given
from heterokd.config.settings import Settings
from heterokd.errors import did_you_mean
from heterokd.networks.student_cost import Runtime
from heterokd.networks.student_costs import STUDENT_COSTS

STUDENT = "student/"
"""Prefix of costs in objectives and limits."""
COSTS, LATENCY = "search.costs", "search.latency"
"""Keys of the table, and of what latencies are timed in."""
FROM_TABLE = f"from a table of yours ({COSTS})"


class CostLimits(Settings):
    """Upper limits of a student's costs; a cost that is left out has no limit."""

    max_params_m: float | None = Field(None, gt=0, description="millions of parameters")
    max_latency_ms: float | None = Field(
        None,
        gt=0,
        description="median of a forward pass at batch 1, in milliseconds; on a single core, or as search.latency says",
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


class LatencySettings(Settings):
    """What `student/latency_ms` and `student/int8_ms` are timed in."""

    runtime: Literal["torch", "onnx"] = Field(
        "torch", description="onnx: the exported graph in ONNX Runtime, in which int8_ms is always timed"
    )
    threads: int = Field(1, ge=1, le=1024, description="number of threads on the CPU")
    device: Literal["cpu", "cuda"] = Field("cpu", description="of latency_ms; int8_ms is timed on the CPU")


class CostSettings(CostLimits):
    """Limits of a student's costs, and where they come from."""

    latency: LatencySettings = Field(default_factory=LatencySettings, description="what latencies are timed in")
    costs: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        exclude_if=not_,
        description="costs that you measured on a device: {student/latency_ms: {NETWORK: 3.2}}, or a YAML or CSV file",
    )

    @field_validator("costs", mode="before")
    @classmethod
    def _name_rows(cls, costs: object) -> object:
        """Check keys and values first, because a fault in a row names the row."""
        if not isinstance(costs, Mapping):
            return costs
        for key, values in costs.items():
            check_cost(str(key))
            if not STUDENT_COSTS[str(key).removeprefix(STUDENT)].is_timed:
                raise ValueError(f"{key}: does not depend on a device, so it is not read from a table; remove it")
            for network, value in values.items() if isinstance(values, Mapping) else ():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                    raise ValueError(f"{key}.{network}: expected a number above 0, got {given(value)}")
        return costs

    @property
    def runtime(self) -> Runtime:
        """What latencies are timed in."""
        return Runtime(self.latency.runtime, self.latency.threads, self.latency.device)

    def listed_costs(self, name: str) -> Mapping[str, float]:
        """Return a cost of networks, as listed in the table; empty if the table does not have it."""
        return self.costs.get(f"{STUDENT}{name}", {})

    def cost_conditions(self, name: str, size: tuple[int, int]) -> str:
        """Describe where the values of a cost come from; empty if that is clear.

        Args:
            name: key of `STUDENT_COSTS`.
            size: height and width of an image, in pixels.
        """
        return FROM_TABLE if self.listed_costs(name) else STUDENT_COSTS[name](self.runtime).conditions(size)


def table_faults(settings: CostSettings, students: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key and sentence of each cost whose table lacks a student."""
    for key, values in settings.costs.items():
        lacking = [student for student in students if student not in values]
        if lacking:
            yield f"{COSTS}.{key}", f"has no value for student {', '.join(lacking)}; add it, or remove the student"


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
