"""Build a cache shard by shard, in any number of concurrent processes; an interrupted build is resumed."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from heterokd.errors import CacheError
from heterokd.storage.filesystem import RemoteDir
from heterokd.teachers.cache.compute import Compute
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.cache.shards import (
    FOOTPRINT,
    Arrays,
    cache_bytes,
    checksum,
    columns,
    encode,
    layout_of,
    read_shard,
    record_bytes,
    shard_name,
    write_shard,
)

AT_ONCE = 256
"""Views per call of the teacher: bounds a builder's memory in addition to its shard."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MANIFEST = "manifest.json"
Progress = Callable[[int, int], None]
"""Callback after each shard, called with the number of finished shards and of all."""


def missing(folder: RemoteDir, key: CacheKey) -> list[int]:
    """Return the numbers of the missing or incomplete shards.

    Args:
        folder: folder of the cache, `caches.at(key.id)`.
        key: key of the cache.
    """
    layout = layout_of(key)
    if folder.local is None:
        there = {file.name for file in folder.files() if file.size > 0}
        return [number for number in range(layout.shards) if shard_name(number) not in there]
    return [number for number in range(layout.shards) if _is_missing(folder, key, number)]


def build_shard(folder: RemoteDir, key: CacheKey, number: int, compute: Compute) -> None:
    """Compute and write a shard; an existing file is replaced.

    Args:
        folder: folder of the cache.
        key: key of the cache, which determines the views of the shard.
        number: number of the shard.
        compute: function that returns the teacher's outputs for any views.

    Raises:
        CacheError: the disk is full or not writable; outputs of another shape or with a value that does not fit.
    """
    index, view = layout_of(key).records(number)
    arrays: Arrays = {name: np.empty((len(index), *shape), dtype) for name, (dtype, shape) in columns(key).items()}
    for start in range(0, len(index), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        for name, part in encode(key, compute(index[rows], view[rows])).items():
            arrays[name][rows] = part
    write(folder, shard_name(number), write_shard(key, number, arrays))


def build_shards(
    folder: RemoteDir,
    key: CacheKey,
    compute: Compute,
    numbers: Collection[int] | None = None,
    progress: Progress | None = None,
) -> list[int]:
    """Build missing shards; concurrent processes share the work.

    Args:
        folder: folder of the cache.
        key: key of the cache.
        compute: function that returns the teacher's outputs for any views.
        numbers: numbers of the shards; None: all.
        progress: called after each shard.

    Returns:
        Numbers of the shards that this call built.

    Raises:
        CacheError: too little free space for the missing shards, or see `build_shard`; finished shards are kept.
    """
    wanted = sorted(set(range(layout_of(key).shards) if numbers is None else numbers))
    todo = [number for number in wanted if _is_missing(folder, key, number)]
    if folder.local is None and todo:
        # Object stores have no locks: a random start makes it rare that two builders compute the same shard.
        begin_at = random.randrange(len(todo))
        todo = todo[begin_at:] + todo[:begin_at]
    check_space(folder, key, len(todo))
    begin(folder, key)
    built: list[int] = []
    done = len(wanted) - len(todo)
    # First the shards that no other builder has claimed; then wait for the claimed ones, whose builder may have died.
    for timeout in (0.0, -1.0):
        left = []
        for number in todo:
            with _claim(folder, number, timeout) as is_ours:
                if not is_ours:
                    left.append(number)
                    continue
                if _is_missing(folder, key, number):
                    build_shard(folder, key, number, compute)
                    built.append(number)
            if progress is not None:
                done += 1
                progress(done, len(wanted))
        todo = left
    return built


def begin(folder: RemoteDir, key: CacheKey) -> None:
    """Write key.json if it is missing, and remove partial files of dead builders.

    Raises:
        CacheError: the disk is full or not writable.
    """
    try:
        folder.sweep()
    except OSError as error:
        raise CacheError(f"{folder}: cannot be cleaned ({error}); check its permissions") from None
    if not folder.exists("key.json"):
        write(folder, "key.json", key.to_json().encode())


def finish(folder: RemoteDir, key: CacheKey) -> None:
    """Write manifest.json, which marks the cache as complete.

    Raises:
        CacheError: shards are missing or damaged, or the disk is full.
    """
    shards = []
    lacking = missing(folder, key)
    if lacking:
        raise CacheError(f"{folder}: {len(lacking)} shard(s) are missing, the first is {shard_name(lacking[0])}; build")
    for number in range(layout_of(key).shards):
        stored = folder.stat(shard_name(number))
        size = stored.size if stored is not None else 0
        shards.append({"file": shard_name(number), "bytes": size})
        if folder.local is not None:
            shards[-1]["crc32"] = read_shard(key, number, str(folder.local / shard_name(number)))[1]
    content = {"cache": key.id, "records": key.records, "shards": shards}
    write(folder, MANIFEST, json.dumps(content, indent=1).encode())


def check_space(folder: RemoteDir, key: CacheKey, shards: int) -> None:
    """Check that a number of shards of a cache fits on the disk.

    Raises:
        CacheError: they do not fit; the message states the needed and the free bytes.
    """
    layout = layout_of(key)
    whole = cache_bytes(key)
    needed = min(layout.block_images * layout.block_views * record_bytes(key) * shards + shards * FOOTPRINT, whole)
    free = folder.free_bytes()
    if shards and free is not None and free < needed:
        raise CacheError(
            f"{folder}: the cache needs {needed:,} more bytes, {free:,} are free; free some, take another --root, "
            "fewer views or fp16, or keep only the largest logits (top_k)"
        )


def write(folder: RemoteDir, name: str, content: bytes | memoryview) -> None:
    """Write a file of a cache.

    Raises:
        CacheError: the disk is full, or the folder is not writable.
    """
    try:
        folder.write(name, content)
    except OSError as error:
        if error.errno in FULL:
            raise CacheError(
                f"{folder}/{name}: {len(content):,} bytes could not be written because the disk is full "
                f"({error.strerror}); free some space and run again: finished shards are kept"
            ) from None
        raise CacheError(f"{folder}/{name}: cannot be written ({error}); check the folder's permissions") from None


def _is_missing(folder: RemoteDir, key: CacheKey, number: int) -> bool:
    if folder.local is None:
        return not folder.exists(shard_name(number))
    return not _is_whole(folder.local, key, number)


def _is_whole(folder: Path, key: CacheKey, number: int) -> bool:
    path = folder / shard_name(number)
    if not path.exists():
        return False
    try:
        arrays, claimed = read_shard(key, number, str(path))
    except CacheError:
        return False
    # Shards of a complete cache are verified when it is opened; those of an interrupted build are verified here.
    return (folder / MANIFEST).exists() or checksum(arrays) == claimed


@contextmanager
def _claim(folder: RemoteDir, number: int, timeout: float) -> Iterator[bool]:
    """Lock a shard for this process; the system releases it when the process dies. Object stores have no locks."""
    if folder.local is None:
        yield True
        return
    place = folder.local / "locks"
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / f"{number:06d}.lock", timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
