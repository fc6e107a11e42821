"""Floating-point operations of a student, in billions: the computation for one image, independent of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heterokd.networks.student_cost import StudentCost

if TYPE_CHECKING:
    from torch import nn


class FlopsG(StudentCost):
    """Billions of floating-point operations of a forward at batch 1; a multiply-add counts as two."""

    name, unit, symbol = "FLOPs", "billions", "G"

    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Count the operations of matrix products, convolutions and attention; other operations are negligible."""
        import torch  # not at the top: pages and plans read a cost's name alone
        from torch.utils.flop_counter import FlopCounterMode

        device = next(network.parameters()).device
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, *size, device=device))
        return int(counter.get_total_flops()) / 1e9

    def conditions(self, size: tuple[int, int]) -> str:
        """Name the images' size."""
        return f"batch 1, {size[0]} x {size[1]} pixels, a multiply-add counts as two"
