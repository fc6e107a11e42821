"""Latency of a student, in milliseconds: one image on one core of this machine's processor."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from heterokd.networks.student_cost import StudentCost
from heterokd.networks.timing import RUNS, THREADS, time_call


class LatencyMs(StudentCost):
    """Median time of a forward at batch 1 on the CPU, in milliseconds."""

    name, unit, symbol = "latency", "ms", "ms"
    is_timed = True

    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Time a forward with `timing.THREADS` threads."""
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        return time_call(partial(network, image)).median_ms

    def conditions(self, size: tuple[int, int]) -> str:
        """Describe the timing."""
        threads = "1 thread" if THREADS == 1 else f"{THREADS} threads"
        return f"median of {RUNS}, batch 1, {size[0]} x {size[1]} pixels, CPU, {threads}"
