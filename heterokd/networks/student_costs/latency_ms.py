"""Latency of a student, in milliseconds: one image, by default on one core of this machine's processor."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

from heterokd.networks.student_cost import StudentCost

if TYPE_CHECKING:
    from torch import Tensor, nn


class LatencyMs(StudentCost):
    """Median time of a forward at batch 1, in milliseconds."""

    name, unit, symbol = "latency", "ms", "ms"
    is_timed = True

    def measure(self, network: nn.Module, size: tuple[int, int]) -> float:
        """Time a forward in the runtime."""
        import torch  # not at the top: pages and plans read a cost's name alone

        from heterokd.networks.timing import time_call

        runtime = self.runtime
        if runtime.name == "onnx":
            from heterokd.networks.onnx_graph import time_graph

            return time_graph(network, size, runtime)
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        if runtime.device == "cuda":
            call = partial(_on_gpu, copy.deepcopy(network).cuda(), image)
        else:
            call = partial(network, image)
        return time_call(call, runtime.threads).median_ms

    def conditions(self, size: tuple[int, int]) -> str:
        """Describe the timing."""
        return self.runtime.conditions(size)


def _on_gpu(network: nn.Module, image: Tensor) -> Tensor:
    """Return logits on the CPU, which waits for the GPU."""
    logits: Tensor = network(image.cuda())
    return logits.cpu()
