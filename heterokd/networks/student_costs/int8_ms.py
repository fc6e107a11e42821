"""Latency of a student in 8 bits, in milliseconds: one image, in ONNX Runtime on this machine's processor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from heterokd.networks.student_cost import Runtime, StudentCost

if TYPE_CHECKING:
    from torch import nn


class Int8Ms(StudentCost):
    """Median time at batch 1 of the file that `export --format onnx --int8` writes, in milliseconds."""

    name, unit, symbol = "int8 latency", "ms", "ms"
    is_timed, is_optional = True, True

    @property
    def timed_in(self) -> Runtime:
        """ONNX Runtime on the CPU, with the chosen number of threads."""
        return replace(self.runtime, name="onnx", device="cpu")

    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Write, quantize and time the graph."""
        from heterokd.networks.onnx_graph import time_graph  # not at the top: pages and plans read a cost's name alone

        return time_graph(network, size, self.timed_in, int8=True)

    def conditions(self, size: tuple[int, int]) -> str:
        """Describe the timing."""
        return f"{self.timed_in.conditions(size)}, static quantization"
