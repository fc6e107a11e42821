"""Parse periods and sizes, such as 30d or 10GB."""

from __future__ import annotations

import re
from collections.abc import Mapping

from heterokd.errors import ConfigError

PERIODS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
"""Seconds per unit."""


def parse_quantity(option: str, text: str, units: Mapping[str, int], example: str) -> float:
    """Parse a number with a unit, such as 30d or 10GB, into the units' base.

    Args:
        option: name of the command-line option, for the error message.
        text: value to parse.
        units: base units per unit, such as `PERIODS`; case-insensitive.
        example: example of a valid value.

    Raises:
        ConfigError: the text cannot be parsed.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    factors = {unit.lower(): factor for unit, factor in units.items()}
    if found is None or found[2].lower() not in factors:
        raise ConfigError(f"{option} {text}: expected a number and one of {', '.join(units)}, such as {example}")
    return float(found[1]) * factors[found[2].lower()]
