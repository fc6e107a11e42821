"""Open a data set by its URL: find or make its index, and its copy on this node."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from heterokd.datasets.io.class_order import CLASS_LIST
from heterokd.datasets.io.read_image import image_suffixes
from heterokd.datasets.io.walk import is_hidden
from heterokd.errors import ConfigError, DataError
from heterokd.storage.files import replacing, write_text
from heterokd.storage.filesystem import RemoteDir, StoredFile, open_folder
from heterokd.storage.stored_data.data_index import INDEX, DataIndex, read_index
from heterokd.storage.stored_data.make_index import TABLES, TAR, make_index
from heterokd.storage.stored_data.node_cache import NodeCache, node_cache
from heterokd.storage.stored_data.node_copy import COMPLETE, FETCH_LOCK, CopyPlace, NodeCopy
from heterokd.storage.stored_data.refusals import empty_reason, refused
from heterokd.storage.use_locks import shared_lock

TRUSTED = 30.0
"""For so many times the seconds that the list of a folder's files took, a complete copy is used without a new list.

Each process of a node opens the data set, and the list of a million files takes minutes."""


DEPTH = 3
"""Number of folders below a local root in which shards are looked for."""


def open_data(url: str, may_be_shards: bool = True) -> NodeCopy:
    """Open the data set below a URL or a folder.

    Args:
        url: s3://BUCKET/..., gs://BUCKET/..., file:///FOLDER, or a folder of shards.
        may_be_shards: whether it is a data set of images with a class each: tars and tables are then shards of images,
            and files that are no images are fetched only if they are read.

    Raises:
        DataError: the store refuses or does not answer, there are no files, or a shard is damaged.
    """
    store = _opened(url)
    cache = node_cache()
    known = _trusted(cache, url, may_be_shards)
    if known is not None:
        return known
    with refused(url):
        began = time.monotonic()
        pushed = store.stat(INDEX)
        files = [pushed] if pushed is not None else list(store.files())
        seconds = time.monotonic() - began
        if not files:
            raise empty_reason(store, url)
        place = cache.folder / _name(url, files, may_be_shards)
        lock = shared_lock(open_folder(place))
        index = _index(store, files, place, may_be_shards=may_be_shards, is_pushed=pushed is not None)
    copy = NodeCopy(store, index, CopyPlace(url, cache, place, lock, may_be_shards, open_data))
    noted = {"copy": place.name, "at": time.time(), "seconds": seconds}
    write_text(_note(cache, url, may_be_shards), json.dumps(noted))
    for name in index.names.tolist():
        if name.endswith(CLASS_LIST.encode()):
            copy.here(os.fsdecode(name))
    return copy


def write_index(url: str) -> DataIndex:
    """Write the index of shards next to them; return it.

    Raises:
        DataError: the store refuses, or a shard is damaged.
    """
    store = _opened(url)
    with refused(url, "with the right to write it, too"):
        files = [file for file in store.files() if file.name != INDEX]
        if not files:
            raise empty_reason(store, url)
        index = make_index(store, files, may_be_shards=True)
        with TemporaryDirectory() as place:
            index.write(Path(place) / INDEX)
            store.copy_from(Path(place) / INDEX, INDEX)
    return index


def _opened(url: str) -> RemoteDir:
    try:
        return open_folder(url)
    except ConfigError as error:
        raise DataError(f"data.root: {error}") from None


def is_pushed(root: Path) -> bool:
    """Whether `heterokd data push` wrote a local folder."""
    return (root / INDEX).is_file()


def is_sharded(root: Path) -> bool:
    """Whether a local folder holds shards or a pushed data set: tars or tables, and no images."""
    if is_pushed(root):
        return True
    has_shards, suffixes = False, image_suffixes()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_hidden([name]))
        for name in files:
            lower = name.lower()
            if lower.endswith(suffixes) and not is_hidden([name]):
                return False  # found at once in a folder of images
            has_shards |= lower.endswith((*TAR, *TABLES)) and not is_hidden([name])
        if len(Path(folder).relative_to(root).parts) >= DEPTH:
            folders.clear()
    return has_shards


def _index(
    store: RemoteDir, files: Sequence[StoredFile], place: Path, *, may_be_shards: bool, is_pushed: bool
) -> DataIndex:
    """Return the index, from the copy if it is there."""
    kept = place / INDEX
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / FETCH_LOCK):
        if not kept.exists():
            with replacing(kept) as partial:
                if is_pushed:
                    store.copy_to(INDEX, partial)
                else:
                    make_index(store, files, may_be_shards=may_be_shards).write(partial)
    return read_index(kept, f"{store}/{INDEX}" if is_pushed else str(kept))


def _trusted(cache: NodeCache, url: str, may_be_shards: bool) -> NodeCopy | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        noted = json.loads(_note(cache, url, may_be_shards).read_text(encoding="utf-8"))
        place = cache.folder / noted["copy"]
        if not 0 <= time.time() - noted["at"] <= TRUSTED * noted["seconds"] or not (place / COMPLETE).exists():
            return None
        lock = shared_lock(open_folder(place))
        if (place / COMPLETE).exists():
            index = read_index(place / INDEX, str(place / INDEX))
            return NodeCopy(open_folder(url), index, CopyPlace(url, cache, place, lock, may_be_shards, open_data))
    return None


def _name(url: str, files: Sequence[StoredFile], may_be_shards: bool) -> str:
    """Return the name of a copy's folder; changed files have another copy."""
    content = [url.rstrip("/"), may_be_shards, *(list(asdict(file).values()) for file in files)]
    return hashlib.sha256(json.dumps(content).encode(errors="surrogateescape")).hexdigest()[:16]


def _note(cache: NodeCache, url: str, may_be_shards: bool) -> Path:
    digest = hashlib.sha256(f"{url.rstrip('/')}:{may_be_shards}".encode()).hexdigest()[:16]
    return cache.folder / "lists" / f"{digest}.json"
