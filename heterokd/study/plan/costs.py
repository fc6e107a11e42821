"""What the parts of a search cost on this machine: plain numbers, measured or read off its first trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MethodCost:
    """One training by one method.

    Attributes:
        begin: seconds before the first update: networks, optimizer, first touch.
        epoch: seconds of an epoch as the search runs it, evaluation included: with the teacher's outputs from a cache
            where one serves the method.
        live: the same with the teacher running.
        stored: whether a cache serves it.
        disk: bytes of the checkpoint and the student's weights.
        spread: of the measurement, as a share of it.
    """

    begin: float
    epoch: float
    live: float
    stored: bool
    disk: int = 0
    spread: float = 0.0


@dataclass(frozen=True)
class Costs:
    """All that a plan multiplies.

    Attributes:
        device: in words.
        parallel: trials at a time; the measurement was made with as many at a time.
        cpus: cores of one trial.
        gpus: GPUs of one trial.
        start: seconds from the command to a Ray that is ready, and a store for the runs.
        process: seconds until a trial's process has loaded what it needs.
        end: seconds from the last trial to the end: pictures, page, registration.
        teacher: seconds to fit the teacher, or to verify the one that is there.
        view: seconds of the teacher for one view that a cache stores.
        methods: by method, of the first student.
        students: by student, how much longer its trainings take than the first one's.
        memory: bytes of the whole search.
        gpu_memory: bytes of a GPU that one trial takes; None without a GPU.
        source: where the numbers are from.
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
    memory: int | None = None
    gpu_memory: int | None = None
    source: str = "measured"
