"""Costs of the parts of a search on this machine, measured or taken from its first trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MethodCost:
    """Cost of a training with a method.

    Attributes:
        begin: seconds before the first update, for networks, optimizer and warm-up.
        epoch: seconds of an epoch in the search, including evaluation, with cached teacher outputs if possible.
        live: seconds of an epoch with a running teacher.
        stored: whether the method can use a cache.
        disk: bytes of the checkpoint and the student's weights.
        spread: relative spread of the measurement.
    """

    begin: float
    epoch: float
    live: float
    stored: bool
    disk: int = 0
    spread: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Costs of all parts of a search.

    Attributes:
        device: description of the device.
        parallel: number of parallel trials, also during the measurement.
        cpus: CPU cores per trial.
        gpus: GPUs per trial.
        start: seconds from the command until Ray and the MLflow store are ready.
        process: seconds until a trial's process has imported its modules.
        end: seconds from the last trial to the end: pictures, report, registration.
        teacher: seconds to fit the teacher, or to verify an existing teacher.
        view: seconds of the teacher for a view that a cache stores.
        methods: cost of each method with the first student.
        students: training time of each student relative to the first.
        nodes: number of nodes, with those that may come.
        memory: bytes of memory of the whole search.
        gpu_memory: bytes of GPU memory per trial; None without a GPU.
        source: where the costs are from.
        speed_spread: relative standard deviation of a machine's speed between a plan and its search.
    """

    device: str
    parallel: int
    cpus: float
    gpus: float
    start: float
    process: float
    end: float
    teacher: float
    view: float
    methods: Mapping[str, MethodCost]
    students: Mapping[str, float] = field(default_factory=dict)
    nodes: int = 1
    memory: int | None = None
    gpu_memory: int | None = None
    source: str = "measured"
    speed_spread: float = 0.07

    def longest(self, epochs: int) -> float | None:
        """Return the seconds of the longest training, with a running teacher; None without a known method."""
        factor = max(self.students.values(), default=1.0)
        known = [cost.begin + epochs * max(cost.epoch, cost.live) for cost in self.methods.values()]
        return factor * max(known) if known else None
