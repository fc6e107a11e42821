"""Which cases of an expensive family `make test` runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def cases(
    every: Iterable[Any], *, quick: Collection[Any], names: Callable[[Any], Any] = lambda case: case
) -> list[Any]:
    """The values of a `parametrize`: those of `quick` as they are, the others marked `thorough`.

    Args:
        every: the family; a tuple is a case of several parameters.
        quick: names of those that `make test` runs.
        names: what `quick` calls a case.

    Raises:
        ValueError: a quick case is none of the family.
    """
    family = list(every)
    strange = set(quick) - {names(case) for case in family}
    if strange:
        raise ValueError(f"no cases of the family: {sorted(map(str, strange))}")
    return [
        case
        if names(case) in quick
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough)
        for case in family
    ]
