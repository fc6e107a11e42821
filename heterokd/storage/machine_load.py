"""Timeouts that grow with the load of the machine: what takes a second on an idle one takes ten where ten wait."""

from __future__ import annotations

import os
from collections.abc import Callable

MOST = 16.0
"""Maximum factor: processes that wait for a dead disk count as load, too, and do not slow others down."""

Load = Callable[[], float]
"""Returns how many processes run, or wait to run, per core."""


def machine_load() -> float:
    """Return the mean number of processes per core of the last minute; 0 where the system does not count them."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def under_load(seconds: float, load: Load = machine_load) -> float:
    """Return a timeout for this machine now; a loop that waits asks again, since the load changes.

    Args:
        seconds: timeout on an idle machine.
        load: returns the load.

    >>> under_load(3.0, lambda: 10.0)
    30.0
    >>> under_load(3.0, lambda: 0.2)
    3.0
    """
    return seconds * min(max(1.0, load()), MOST)
