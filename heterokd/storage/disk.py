"""Disks that cannot be written for a while: full, or gone read-only, as shared ones do when their server restarts.

Whoever computes waits for such a disk and then goes on; what was computed would be lost otherwise.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

PASSING = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO, errno.ETIMEDOUT}
"""Errors of a disk that may go by: others (no permission, no such folder) need somebody to change something."""

PATIENCE = 1800.0
"""Seconds after which a disk that still cannot be written is an error."""

POLL_SECONDS = 1.0

PROBE_BYTES = 4096
"""An empty file still fits on a full disk."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


def when_writable(place: Path, write: Callable[[], T], patience: float = PATIENCE) -> T:
    """Do what writes at a place; while its disk cannot be written, wait and do it again.

    Args:
        place: the file or folder that is written.
        write: may be called again after it failed.
        patience: seconds for which a disk may stay away.

    Raises:
        Exception: of `write`, when the disk is not the reason, or has not come back in `patience` seconds.
    """
    started = time.monotonic()
    while True:
        try:
            return write()
        except Exception as error:
            reason = _reason(place, error)
            if reason is None or time.monotonic() - started > patience:
                raise
            logger.warning("%s: cannot be written (%s); waiting for the disk, nothing is lost", place, reason)
        while obstacle(place) is not None and time.monotonic() - started <= patience:
            time.sleep(POLL_SECONDS)
        # Also where a small file fits and a large one does not.
        time.sleep(POLL_SECONDS)


def obstacle(place: Path) -> str | None:
    """Why nothing can be written at a place for the moment; None when it can."""
    while not place.is_dir():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
    except OSError as error:
        return os.strerror(error.errno) if error.errno in PASSING else None
    return None


def _reason(place: Path, error: Exception) -> str | None:
    """Why a write failed, if the disk is why. Libraries that write (SQLite, safetensors) have errors of their own."""
    if isinstance(error, OSError) and error.errno in PASSING:
        return os.strerror(error.errno)
    return obstacle(place)
