"""Parameters of a student, in millions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heterokd.networks.student_cost import StudentCost

if TYPE_CHECKING:
    from torch import nn


class ParamsM(StudentCost):
    """Millions of parameters."""

    name, unit, symbol = "parameters", "millions", "M"

    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Count the parameters, trained or frozen."""
        return sum(parameter.numel() for parameter in network.parameters()) / 1e6
