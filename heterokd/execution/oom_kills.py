"""Count the processes that the kernel killed because memory did not suffice.

A separate module, so that the driver does not import torch for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))
"""Files with a line `oom_kill N`: of this container, and of this machine."""


def oom_kills(counters: Sequence[Path] = COUNTERS) -> int:
    """Return the sum of the counters that can be read; 0 if none can, as on other systems than Linux."""
    found = 0
    for file in counters:
        with suppress(OSError, ValueError):
            lines = dict(line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines())
            found += int(lines.get("oom_kill", 0))
    return found
