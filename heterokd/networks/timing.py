"""Measure the latency of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from heterokd.networks.student_cost import RUNS

WARM_UPS = 5
THREADS = 1
"""Default number of torch's threads: one core, for comparable latencies on all machines."""


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of the same call, in milliseconds.

    Attributes:
        median_ms: median time.
        p95_ms: 95th percentile.
        runs: number of timed calls, without the warm-up.
        threads: number of torch's threads.
    """

    median_ms: float
    p95_ms: float
    runs: int = RUNS
    threads: int = THREADS


def time_call(call: Callable[[], object], threads: int = THREADS) -> Timing:
    """Time a call `RUNS` times after `WARM_UPS` calls, with this number of torch's threads and in inference mode."""
    with _threads(threads), torch.inference_mode():
        for _ in range(WARM_UPS):
            call()
        times = []
        for _ in range(RUNS):
            started = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - started))
    return Timing(float(np.median(times)), float(np.percentile(times, 95)), threads=threads)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
