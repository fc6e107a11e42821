"""Search domains of parameters, declared in the parameter's annotation.

    class Params(MethodParams):
        temperature: Annotated[float, Float(1, 8, log=True)] = Field(4.0, description="tau, divides logits")

A *domain* is the range of a parameter; a *space* is all domains of an experiment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

from pydantic import BaseModel

from heterokd.errors import ConfigError

Scalar = bool | int | float | str | None


def _is_scalar(value: object) -> TypeGuard[Scalar]:
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _check_bounds(low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"low and high must be finite, got low={low!r}, high={high!r}")
    if low > high:
        raise ConfigError(f"`low <= high` must hold, got low={low!r}, high={high!r}")
    if log and low <= 0:
        raise ConfigError(f"a log domain needs `low > 0`, got low={low!r}; raise it, or set log: false")


@dataclass(frozen=True)
class Float:
    """Real numbers in [low, high]; `log` samples on a log scale."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


@dataclass(frozen=True)
class Int:
    """Integers in [low, high], both included."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low} to {self.high}{', log' if self.log else ''}"


@dataclass(frozen=True, init=False)
class Choice:
    """Categorical options: numbers, strings, booleans, None."""

    options: tuple[Scalar, ...]

    def __init__(self, *options: Scalar) -> None:
        if not options:
            raise ConfigError("options must hold at least one value, got none")
        wrong = [option for option in options if not _is_scalar(option)]
        if wrong:
            raise ConfigError(f"an option is a number, a word, true or false, got {wrong[0]!r}")
        if len({(isinstance(option, bool), option) for option in options}) != len(options):
            raise ConfigError(f"the options must differ, got {list(options)}")
        object.__setattr__(self, "options", tuple(options))

    def __contains__(self, value: object) -> bool:
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in self.options)

    def __str__(self) -> str:
        return " | ".join(str(option) for option in self.options)


Domain = Float | Int | Choice


def domains(params: type[BaseModel]) -> dict[str, Domain]:
    """Return the domains of a model's fields, in the fields' order; fields without a domain are fixed."""
    found: dict[str, Domain] = {}
    for name, field in params.model_fields.items():
        for annotation in field.metadata:
            if isinstance(annotation, (Float, Int, Choice)):
                found[name] = annotation
    return found


def read_domain(value: object, where: str, like: Domain | None = None) -> Domain:
    """Parse a domain of a search space: `{low, high, log}`, `{options: [...]}`, or a single value to fix.

    Args:
        value: value in the YAML file.
        where: file and key, for error messages.
        like: domain that is narrowed; decides whether bounds are integers, and the default scale.

    Raises:
        ConfigError: keys or types are wrong.
    """
    forms = "expected one value, {low, high, log} or {options: [...]}"
    if not isinstance(value, dict):
        if _is_scalar(value):
            return Choice(value)
        raise ConfigError(f"{where}: {forms}, got {value!r}")
    keys = set(value)
    try:
        if keys == {"options"}:
            if not isinstance(value["options"], list | tuple):
                raise ConfigError(f"options must be a list, got {value['options']!r}")
            return Choice(*value["options"])
        if {"low", "high"} <= keys <= {"low", "high", "log"}:
            low, high = value["low"], value["high"]
            log = value.get("log", getattr(like, "log", False))
            numbers = all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in (low, high))
            if not numbers or not isinstance(log, bool):
                raise ConfigError(f"low and high must be numbers and log true or false, got {value!r}")
            whole = isinstance(low, int) and isinstance(high, int) and not isinstance(like, Float)
            return Int(low, high, log) if whole else Float(float(low), float(high), log)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    raise ConfigError(f"{where}: {forms}, got {value!r}")
