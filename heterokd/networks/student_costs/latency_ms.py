"""Latency of a student, in milliseconds: one image on one core of this machine's processor."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from heterokd.networks.student_cost import StudentCost

if TYPE_CHECKING:
    from torch import nn


class LatencyMs(StudentCost):
    """Median time of a forward at batch 1 on the CPU, in milliseconds."""

    name, unit, symbol = "latency", "ms", "ms"
    is_timed = True

    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Time a forward with `timing.THREADS` threads."""
        import torch  # not at the top: pages and plans read a cost's name alone

        from heterokd.networks.timing import time_call

        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        return time_call(partial(network, image)).median_ms

    def conditions(self, size: tuple[int, int]) -> str:
        """Describe the timing."""
        from heterokd.networks.timing import RUNS, THREADS

        threads = "1 thread" if THREADS == 1 else f"{THREADS} threads"
        return f"median of {RUNS}, batch 1, {size[0]} x {size[1]} pixels, CPU, {threads}"
