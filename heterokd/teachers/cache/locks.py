"""Lock a cache against deletion: readers and builders share the lock, deletion takes it exclusively.

The lock is the operating system's (flock), which releases it when the process ends in any way. An object store has no
locks: there, the user must make sure that a cache is unused before deleting it.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heterokd.storage.filesystem import RemoteDir

USE_LOCK = "locks/use.lock"


class Hold:
    """A shared lock of a cache against deletion, released by `release` or on garbage collection.

    Args:
        descriptor: file descriptor of the locked file.
    """

    def __init__(self, descriptor: int) -> None:
        self.release = weakref.finalize(self, os.close, descriptor)


def hold(folder: RemoteDir) -> Hold | None:
    """Take a shared lock of a cache; waits while it is being deleted.

    Args:
        folder: folder of the cache; created if it is missing.

    Returns:
        None in an object store, and if the folder is not writable, so that this user cannot delete it either.
    """
    if folder.local is None:
        return None
    place = folder.local / USE_LOCK
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_still_there(place, descriptor):
            return Hold(descriptor)
        os.close(descriptor)  # the cache was deleted in the meantime: this lock protects nothing


@contextmanager
def alone(folder: RemoteDir) -> Iterator[bool]:
    """Try to lock a cache exclusively until the end of the block; gives whether it is unused."""
    place = None if folder.local is None else folder.local / USE_LOCK
    if place is None or not place.exists():
        yield True
        return
    descriptor = os.open(place, (os.O_RDWR if os.access(place, os.W_OK) else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _is_still_there(place: Path, descriptor: int) -> bool:
    try:
        there = os.stat(place)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
