"""All distillation methods, one paper per file; the folder is the list.

`METHODS` maps a file's name to the `Method` defined in it: `methods/dkd.py` -> `METHODS["dkd"]`. A file is imported
when its method is looked up; listing the names imports nothing. `METHODS["dist+crd"]` is the sum of two methods.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from heterokd.extensions import Implementations
from heterokd.tasks import TaskName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from heterokd.method import Method

PLUS = "+"
"""Separates the names of a combination's two methods."""

BASELINE = "scratch"
"""Name of the method without a teacher, the baseline of all comparisons."""


class _Methods(Implementations["Method"]):
    """Methods by name, and combinations of two of them, which are not listed."""

    def __contains__(self, name: object) -> bool:
        members = members_of(str(name))
        if len(members) == 1:
            return super().__contains__(name)
        distinct = len(members) == 2 == len(set(members))
        return distinct and BASELINE not in members and all(map(super().__contains__, members))

    def _load(self, name: str) -> type[Method]:
        if PLUS not in name:
            return super()._load(name)
        if name not in self:
            raise KeyError(name)
        from heterokd.methods._combination import combine

        first, second = members_of(name)
        return combine(name, (first, self[first]), (second, self[second]))


def members_of(name: str) -> tuple[str, ...]:
    """Return the names of the methods that a name combines; a single name for a plain method."""
    return tuple(name.split(PLUS))


def pairs_of(methods: Iterable[str]) -> tuple[str, ...]:
    """Return the combinations of any two of these methods, the baseline and combinations excluded."""
    single = [method for method in methods if method != BASELINE and PLUS not in method]
    return tuple(PLUS.join(pair) for pair in combinations(single, 2))


METHODS = _Methods(__name__, "heterokd.method:Method", __name__)

VANILLA_KD: dict[TaskName, str] = {"classification": "kd", "segmentation": "pixel_kd"}
"""Hinton's distillation by task; it reads only logits and exists for every pair of networks."""

ONE_OF_EACH_KIND = (BASELINE, "kd", "dkd", "dist", "ofa", "rsd", "hcd", "fbt")
"""Short selection for classification, with logits, relations, stages and fused networks. A search of all methods takes
several times as long."""

SCENE_METHODS = (BASELINE, "pixel_kd", "cwd", "heteroakd")
"""Short selection for segmentation."""
