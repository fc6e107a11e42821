"""Who uses a cache: a lock that everybody who reads or builds it shares, and that it is deleted under.

The lock is the system's own (flock): it ends with the process that holds it, however that ends. An object store has
no locks: there, whoever deletes must know.
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
    """Keeps a cache from being deleted until it is let go, by `release` or by nobody needing it any more.

    Args:
        descriptor: of the lock's file, locked.
    """

    def __init__(self, descriptor: int) -> None:
        self.release = weakref.finalize(self, os.close, descriptor)


def hold(folder: RemoteDir) -> Hold | None:
    """Share the use of a cache; waits while it is being deleted.

    Args:
        folder: of the cache; it is made if it is missing.

    Returns:
        None in an object store, and where the folder may not be written: nobody deletes it from here then.
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
        os.close(descriptor)  # the cache was deleted in the meantime: this lock guards nothing


@contextmanager
def alone(folder: RemoteDir) -> Iterator[bool]:
    """Whether nobody uses a cache; if so, nobody can begin to until the end of the block."""
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
