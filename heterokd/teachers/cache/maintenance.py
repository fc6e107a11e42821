"""List, verify, repair and delete caches."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from heterokd.errors import CacheError
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.teachers.cache.build import MANIFEST
from heterokd.teachers.cache.key import CacheKey
from heterokd.teachers.cache.locks import USE_LOCK, alone
from heterokd.teachers.cache.records import Records, problems, read_key, read_manifest
from heterokd.teachers.cache.shards import layout_of, shard_name

LAST_USED = "last_used"


@dataclass(frozen=True)
class CacheCard:
    """Description of a cache, without opening its shards.

    Attributes:
        id: name of its folder.
        description: its key in a line, or the reason why it is damaged.
        bytes: size on the disk.
        records: number of stored views.
        complete: whether all shards exist.
        last_used: time of the last opening, or else of the last write.
        in_use: whether a process reads or builds it now; False (unknown) in an object store.
    """

    id: str
    description: str
    bytes: int
    records: int
    complete: bool
    last_used: datetime
    in_use: bool = False


def list_caches(caches: RemoteDir | Path | str) -> list[CacheCard]:
    """List the caches of a folder, including damaged ones, most recently used first."""
    root = caches if isinstance(caches, RemoteDir) else open_folder(caches)
    cards = [_card(root.at(name), name) for name in root.folders()]
    return sorted((card for card in cards if card is not None), key=lambda card: card.last_used, reverse=True)


def verify_cache(folder: RemoteDir | Path | str, copies: Path | None = None) -> list[str]:
    """Verify a cache with all its checksums; return a sentence per problem, an empty list if there is none.

    Args:
        folder: folder of the cache, below the folder of all caches.
        copies: see `Records`.
    """
    folder = folder if isinstance(folder, RemoteDir) else open_folder(folder)
    try:
        key = read_key(folder)
        records = Records(folder, key, read_manifest(folder, key), copies)
    except CacheError as error:
        return [str(error)]
    return problems(records, "full")


def mend_cache(folder: RemoteDir | Path | str) -> list[str]:
    """Delete the damaged files of a complete cache, so that the next build computes only those.

    Args:
        folder: folder of the cache, below the folder of all caches.

    Returns:
        Names of the deleted files; empty if there is no cache, or if it is intact or was never complete: a build
        verifies the shards of a partial cache itself.

    Raises:
        CacheError: its key is damaged, so that none of its files can be trusted.
    """
    folder = folder if isinstance(folder, RemoteDir) else open_folder(folder)
    if not folder.exists(MANIFEST):
        return []
    key = read_key(folder)
    removed = []
    try:
        records = Records(folder, key, read_manifest(folder, key))
    except CacheError:
        removed, records = [MANIFEST], Records(folder, key, None)
    for number in range(records.layout.shards) if folder.local is not None else ():
        try:
            records.shard(number)
        except CacheError:
            removed.append(shard_name(number))
    if removed and MANIFEST not in removed:
        removed.append(MANIFEST)
    for name in reversed(removed):  # the manifest first: without it the cache does not count as complete
        folder.delete(name)
    return removed


def prune_caches(
    caches: RemoteDir | Path | str,
    *,
    unused_for: timedelta | None = None,
    max_bytes: int | None = None,
    ids: Collection[str] | None = None,
    dry_run: bool = False,
) -> list[CacheCard]:
    """Delete caches by id, by age of the last use, and least recently used ones until the rest fits a size.

    A cache that a process reads or builds now is kept.

    Args:
        caches: folder of all caches.
        unused_for: age of the last use beyond which a cache is deleted.
        max_bytes: maximum total size of the caches to keep.
        ids: ids of caches to delete.
        dry_run: whether to delete nothing.

    Returns:
        The deleted caches, or with `dry_run` those that would be.

    Raises:
        CacheError: a given id is unknown or in use, or a cache cannot be deleted.
    """
    root = caches if isinstance(caches, RemoteDir) else open_folder(caches)
    cards = list_caches(root)
    unknown = sorted(set(ids or ()) - {card.id for card in cards})
    if unknown:
        known = ", ".join(card.id for card in cards) or "none"
        raise CacheError(f"{root}: there is no cache {unknown[0]!r}; known: {known}")
    used = next((card.id for card in cards if card.in_use and card.id in (ids or ())), None)
    if used is not None:
        raise CacheError(f"{root}: cache {used} is in use by a running search or training; wait for it, or end it")
    now = datetime.fromtimestamp(time.time(), UTC)
    doomed = [
        card
        for card in cards
        if card.id in (ids or ()) or (unused_for is not None and now - card.last_used > unused_for and not card.in_use)
    ]
    if max_bytes is not None:
        total = 0
        for card in sorted((card for card in cards if card not in doomed), key=lambda card: not card.in_use):
            total += card.bytes
            if total > max_bytes and not card.in_use:
                doomed.append(card)
    return doomed if dry_run else [card for card in doomed if _delete(root.at(card.id))]


def _delete(folder: RemoteDir) -> bool:
    """Delete a cache if it is unused; return whether it was deleted."""
    with suppress(OSError):  # a cache of an earlier version has no lock file yet
        if folder.local is not None:
            (folder.local / USE_LOCK).parent.mkdir(exist_ok=True)
            (folder.local / USE_LOCK).touch()
    with alone(folder) as is_ours:
        try:
            if is_ours:
                # The manifest first: if the rest is interrupted, the cache does not count as complete.
                folder.delete(MANIFEST)
                folder.delete_everything()
        except OSError as error:
            raise CacheError(f"{folder}: cannot be deleted ({error}); check its permissions") from None
        return is_ours


def nearest(root: RemoteDir, key: CacheKey) -> str:
    """Describe how the most similar cache differs from a key, as the end of an error message."""
    others: list[tuple[int, str, list[str]]] = []
    for name in root.folders():
        try:
            found = read_key(root.at(name)).differences(key)
        except CacheError:
            continue
        others.append((len(found), name, found))
    if not others:
        return "there are no others; build it"
    _, name, found = min(others)
    return f"the nearest, {name}, {'is not finished' if not found else 'differs: ' + '; '.join(found)}; build it"


def _card(folder: RemoteDir, name: str) -> CacheCard | None:
    files = {file.name: file for file in folder.files()}
    if "key.json" not in files and MANIFEST not in files and not any(file.startswith("shards/") for file in files):
        return None
    used = files[LAST_USED].modified if LAST_USED in files else max(file.modified for file in files.values())
    records, complete = 0, False
    try:
        key = read_key(folder)
        description, layout = key.describe(), layout_of(key)
        stored = [number for number in range(layout.shards) if shard_name(number) in files]
        records = sum(layout.length(number) for number in stored)
        complete = read_manifest(folder, key) is not None and len(stored) == layout.shards
    except CacheError as error:
        description = str(error)
    size = sum(file.size for file in files.values())
    with alone(folder) as is_free:
        return CacheCard(name, description, size, records, complete, datetime.fromtimestamp(used, UTC), not is_free)
