"""Parameters of a student, in millions."""

from __future__ import annotations

from torch import nn

from heterokd.networks.student_cost import StudentCost


class ParamsM(StudentCost):
    """Millions of parameters."""

    name, unit, symbol = "parameters", "millions", "M"

    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Count the parameters, trained or frozen."""
        return sum(parameter.numel() for parameter in network.parameters()) / 1e6
