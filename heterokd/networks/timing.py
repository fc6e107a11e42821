"""How long a call takes: the one way in which a latency is measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

RUNS = 30
WARM_UPS = 5
THREADS = 1
"""Threads of a latency figure: what one core gives, whatever machine it is measured on."""


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of the same call, in milliseconds.

    Attributes:
        median_ms: half of the calls took less.
        p95_ms: 95 of 100 calls took less.
        runs: calls that were timed; the warm-up is not among them.
        threads: of the processor.
    """

    median_ms: float
    p95_ms: float
    runs: int = RUNS
    threads: int = THREADS


def time_call(call: Callable[[], object]) -> Timing:
    """Time a call `RUNS` times after `WARM_UPS`, torch holding to `THREADS` threads and keeping no gradients."""
    with _threads(THREADS), torch.inference_mode():
        for _ in range(WARM_UPS):
            call()
        times = []
        for _ in range(RUNS):
            started = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - started))
    return Timing(median_ms=float(np.median(times)), p95_ms=float(np.percentile(times, 95)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
