"""Lock a cache against deletion: readers and builders share the lock, deletion takes it exclusively.

The lock is the operating system's flock, which is released when the process ends in any way and works on a shared
mount. filelock's ReadWriteLock is a SQLite database: its readers write to the file, which a user without write
permission cannot, its locks are unreliable on network file systems, and processes of other versions of heterokd hold
flocks. An object store has no locks: there, the user must make sure that a cache is unused before deleting it.
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


class SharedLock:
    """A shared lock of a cache against deletion, released by `release` or on garbage collection.

    Args:
        descriptor: file descriptor of the locked file.
    """

    def __init__(self, descriptor: int) -> None:
        self.release = weakref.finalize(self, os.close, descriptor)


def shared_lock(folder: RemoteDir) -> SharedLock | None:
    """Take a shared lock of a cache, waiting while the cache is being deleted.

    Args:
        folder: folder of the cache; created if it is missing.

    Returns:
        None in an object store, and in a folder that this user cannot write, and therefore not delete.
    """
    if folder.local is None:
        return None
    file = folder.local / USE_LOCK
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_locked_file(file, descriptor):
            return SharedLock(descriptor)
        os.close(descriptor)  # the cache was deleted in the meantime: this lock protects nothing


@contextmanager
def exclusive_lock(folder: RemoteDir) -> Iterator[bool]:
    """Try to lock a cache exclusively until the end of the block; yield whether it is unused."""
    file = None if folder.local is None else folder.local / USE_LOCK
    if file is None or not file.exists():
        yield True
        return
    descriptor = os.open(file, (os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _is_locked_file(file: Path, descriptor: int) -> bool:
    """Whether the path still names the opened file: it may have been deleted, and created again."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
