"""Wait for disks that are full, or read-only for a while, as shared disks are when their server restarts.

Without the wait, results that were computed would be lost.
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
"""Errors of a disk that may pass; others (no permission, no such folder) need an action of the user."""

PATIENCE = 1800.0
"""Longest wait for a disk, in seconds."""

POLL_SECONDS = 1.0

PROBE_BYTES = 4096
"""Size of the test file; an empty file fits on a full disk."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


def when_writable(place: Path, write: Callable[[], T], patience: float = PATIENCE) -> T:
    """Call `write`; if the disk cannot be written, wait for it and try again.

    Args:
        place: file or folder that is written.
        write: function that writes; it may be called again after it failed.
        patience: longest wait in seconds.

    Raises:
        Exception: of `write`, if the disk is not the reason or cannot be written after `patience` seconds.
    """
    started = time.monotonic()
    while True:
        try:
            return write()
        except Exception as error:
            reason = _reason(place, error)
            if reason is None or time.monotonic() - started > patience:
                raise
            logger.warning("%s: cannot be written (%s); waiting for the disk, no data is lost", place, reason)
        while obstacle(place) is not None and time.monotonic() - started <= patience:
            time.sleep(POLL_SECONDS)
        # Also if the probe's small file fits and a large file does not.
        time.sleep(POLL_SECONDS)


def obstacle(place: Path) -> str | None:
    """Reason that a path cannot be written at present, or None."""
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
    """Reason that a write failed if the disk is the cause; SQLite and safetensors raise other errors than OSError."""
    if isinstance(error, OSError) and error.errno in PASSING:
        return os.strerror(error.errno)
    return obstacle(place)
