"""Parse JSON values into dataclasses and other types."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import TypeVar, cast

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_adapter = cache(TypeAdapter)
"""Cached by type: building an adapter takes milliseconds."""


def parse(kind: type[T], content: object) -> T:
    """Parse JSON values as a dataclass, a mapping or a list of known types; unknown keys of a dataclass are ignored.

    Raises:
        ValueError: a value is missing or of another type; the message names its place.
    """
    try:
        return cast(T, _adapter(cast(Hashable, kind)).validate_python(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
