"""Build a cache shard by shard, in any number of concurrent processes; an interrupted build is resumed."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager

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

VIEWS_PER_CALL = 256
"""Maximum views per call of the teacher: bounds a builder's memory in addition to its shard."""

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MANIFEST = "manifest.json"


def missing(folder: RemoteDir, key: CacheKey) -> list[int]:
    """Return the numbers of the missing or incomplete shards of the cache in `folder`."""
    layout = layout_of(key)
    if folder.local is None:
        there = {file.name for file in folder.files() if file.size > 0}
        return [number for number in range(layout.shards) if shard_name(number) not in there]
    return [number for number in range(layout.shards) if _is_missing(folder, key, number)]


def build_shard(folder: RemoteDir, key: CacheKey, number: int, compute: Compute) -> None:
    """Compute and write a shard, whose views the key determines; an existing file is replaced.

    Raises:
        CacheError: the disk is full or not writable; outputs of another shape or with a value that does not fit.
    """
    index, view = layout_of(key).records(number)
    arrays: Arrays = {name: np.empty((len(index), *shape), dtype) for name, (dtype, shape) in columns(key).items()}
    for start in range(0, len(index), VIEWS_PER_CALL):
        rows = slice(start, start + VIEWS_PER_CALL)
        for name, part in encode(key, compute(index[rows], view[rows])).items():
            arrays[name][rows] = part
    write(folder, shard_name(number), write_shard(key, number, arrays))


def build_shards(
    folder: RemoteDir, key: CacheKey, compute: Compute, numbers: Collection[int] | None = None
) -> list[int]:
    """Build those of the numbered shards (None: all) that are missing; return the numbers of the built shards.

    Concurrent processes share the work.

    Raises:
        CacheError: too little free space for the missing shards, or see `build_shard`; finished shards are kept.
    """
    wanted = sorted(set(range(layout_of(key).shards) if numbers is None else numbers))
    todo = [number for number in wanted if _is_missing(folder, key, number)]
    if folder.local is None and todo:
        # Object stores have no locks: with random starts, two builders rarely compute the same shard.
        start = random.randrange(len(todo))
        todo = todo[start:] + todo[:start]
    check_space(folder, key, len(todo))
    begin(folder, key)
    built: list[int] = []
    # First the shards that no other builder has claimed; then wait for the claimed shards, whose builder may have died.
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
    lacking = missing(folder, key)
    if lacking:
        raise CacheError(f"{folder}: {len(lacking)} shards are missing, such as {shard_name(lacking[0])}; build them")
    shards: list[dict[str, object]] = []
    for number in range(layout_of(key).shards):
        stored = folder.stat(shard_name(number))
        shards.append({"file": shard_name(number), "bytes": 0 if stored is None else stored.size})
        if folder.local is not None:
            shards[-1]["crc32"] = read_shard(key, number, str(folder.local / shard_name(number)))[1]
    content = {"cache": key.id, "records": key.records, "shards": shards}
    write(folder, MANIFEST, json.dumps(content, indent=1).encode())


def check_space(folder: RemoteDir, key: CacheKey, shards: int) -> None:
    """Check that a number of shards of a cache fit on the disk.

    Raises:
        CacheError: they do not fit.
    """
    layout = layout_of(key)
    whole = cache_bytes(key)
    needed = min(layout.block_images * layout.block_views * record_bytes(key) * shards + shards * FOOTPRINT, whole)
    free = folder.free_bytes()
    if shards and free is not None and free < needed:
        raise CacheError(
            f"{folder}: the cache needs {needed:,} more bytes, {free:,} are free; free some space, use another --root, "
            "fewer views or fp16, or store only the largest logits (top_k)"
        )


def write(folder: RemoteDir, name: str, content: bytes | memoryview) -> None:
    """Write a file of a cache.

    Raises:
        CacheError: the disk is full, or the folder is not writable.
    """
    try:
        folder.write(name, content)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise CacheError(
                f"{folder}/{name}: {len(content):,} bytes could not be written because the disk is full "
                f"({error.strerror}); free some space and run the command again, finished shards are kept"
            ) from None
        raise CacheError(f"{folder}/{name}: cannot be written ({error}); check the folder's permissions") from None


def _is_missing(folder: RemoteDir, key: CacheKey, number: int) -> bool:
    if not folder.exists(shard_name(number)):
        return True
    if folder.local is None:
        return False
    try:
        arrays, claimed = read_shard(key, number, str(folder.local / shard_name(number)))
    except CacheError:
        return True
    # Shards of a complete cache are verified when it is opened; shards of an interrupted build are verified here.
    return not folder.exists(MANIFEST) and checksum(arrays) != claimed


@contextmanager
def _claim(folder: RemoteDir, number: int, timeout: float) -> Iterator[bool]:
    """Lock a shard for this process, until it dies at the latest; yield whether it is locked now.

    Object stores have no locks.
    """
    if folder.local is None:
        yield True
        return
    locks = folder.local / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{number:06d}.lock", timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
