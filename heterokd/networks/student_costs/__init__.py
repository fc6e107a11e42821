"""Costs of a student, one file each: the folder is the list. `search.objectives` names them `student/<file name>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heterokd.extensions import Implementations

if TYPE_CHECKING:
    from heterokd.networks.student_cost import StudentCost

STUDENT_COSTS: Implementations[StudentCost] = Implementations(
    __name__, "heterokd.networks.student_cost:StudentCost", "heterokd.student_costs"
)
