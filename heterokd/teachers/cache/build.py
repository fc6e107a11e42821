"""Building: shard by shard, by any number of processes at once, going on where an earlier build ended."""

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
"""Views that are computed together: what bounds a builder's memory beside its shard."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MANIFEST = "manifest.json"
Progress = Callable[[int, int], None]
"""Told (shards done, shards in all) after each."""


def missing(folder: RemoteDir, key: CacheKey) -> list[int]:
    """Numbers of the shards that are not there, or not whole: what is to be built.

    Args:
        folder: of the cache, `caches.at(key.id)`.
        key: of the cache.
    """
    layout = layout_of(key)
    if folder.local is None:
        there = {file.name for file in folder.files() if file.size > 0}
        return [number for number in range(layout.shards) if shard_name(number) not in there]
    return [number for number in range(layout.shards) if _is_missing(folder, key, number)]


def build_shard(folder: RemoteDir, key: CacheKey, number: int, compute: Compute) -> None:
    """Compute and write one shard; a file that is there is replaced.

    Args:
        folder: of the cache.
        key: says which views belong to the shard.
        number: of the shard.
        compute: the teacher's outputs for any views.

    Raises:
        CacheError: the disk is full or cannot be written; outputs of another shape or with a value that does not fit.
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
    """Build the missing ones of some shards; several processes may do so at once and share the work.

    Args:
        folder: of the cache.
        key: of the cache.
        compute: the teacher's outputs for any views.
        numbers: which shards; None: all.
        progress: told after each.

    Returns:
        The shards that this call built.

    Raises:
        CacheError: too little free space for what is missing, or see `build_shard`; finished shards stay.
    """
    wanted = sorted(set(range(layout_of(key).shards) if numbers is None else numbers))
    todo = [number for number in wanted if _is_missing(folder, key, number)]
    if folder.local is None and todo:
        # Nobody can claim a shard of an object store: builders that begin at other places seldom do the same twice.
        begin_at = random.randrange(len(todo))
        todo = todo[begin_at:] + todo[:begin_at]
    check_space(folder, key, len(todo))
    begin(folder, key)
    built: list[int] = []
    done = len(wanted) - len(todo)
    # First what nobody else is at; then what others had begun, of which a dead builder's is still to be done.
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
    """Write key.json where there is none, and remove what dead builders left.

    Raises:
        CacheError: the disk is full or cannot be written.
    """
    try:
        folder.sweep()
    except OSError as error:
        raise CacheError(f"{folder}: cannot be cleaned ({error}); check its permissions") from None
    if not folder.exists("key.json"):
        write(folder, "key.json", key.to_json().encode())


def finish(folder: RemoteDir, key: CacheKey) -> None:
    """Write manifest.json: from now on the cache counts as complete.

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
    """Refuse to build `shards` of a cache where they do not fit.

    Raises:
        CacheError: says what is needed and what is free.
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
        CacheError: the disk is full, or the place cannot be written.
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
    # A shard that a manifest vouches for is checked by who opens it; one of a broken-off build is checked here.
    return (folder / MANIFEST).exists() or checksum(arrays) == claimed


@contextmanager
def _claim(folder: RemoteDir, number: int, timeout: float) -> Iterator[bool]:
    """Hold a shard for this process; the system lets go of it when the process dies. Object stores have no claims."""
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
