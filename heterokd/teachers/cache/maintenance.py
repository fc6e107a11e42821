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
from heterokd.storage.use_locks import USE_LOCK, exclusive_lock
from heterokd.teachers.cache.build import MANIFEST, write
from heterokd.teachers.cache.key import CacheKey
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
        last_used: time of the last opening; of the last write if it was never opened.
        in_use: whether a process reads or builds it now; False in an object store, where this is unknown.
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
    root = open_folder(caches)
    cards = [_card(root.at(name), name) for name in root.folders()]
    return sorted((card for card in cards if card is not None), key=lambda card: card.last_used, reverse=True)


def verify_cache(folder: RemoteDir | Path | str, copies: Path | None = None) -> list[str]:
    """Verify a cache with all its checksums; return a sentence per problem. See `Records` for `copies`."""
    folder = open_folder(folder)
    try:
        key = read_key(folder)
        records = Records(folder, key, read_manifest(folder, key), copies)
    except CacheError as error:
        return [str(error)]
    return problems(records, "full")


def mend_cache(folder: RemoteDir | Path | str) -> list[str]:
    """Delete the damaged files of a complete cache, so that the next build computes only those; return their names.

    A partial cache is left unchanged: a build verifies its shards.

    Raises:
        CacheError: its key is damaged, so that none of its files can be trusted.
    """
    folder = open_folder(folder)
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
        with suppress(FileNotFoundError):  # another process may delete the same files
            folder.delete(name)
    return removed


def repair_cache(folder: RemoteDir, key: CacheKey) -> list[str]:
    """Delete the damaged files of a cache whose key is known, and write a damaged key.json again; return their names.

    The next build, or the trainings that read the cache, compute what is missing.

    Raises:
        CacheError: the folder is not writable.
    """
    repaired = []
    try:
        read_key(folder)
    except CacheError:
        write(folder, "key.json", key.to_json().encode())
        repaired.append("key.json")
    return repaired + mend_cache(folder)


def prune_caches(
    caches: RemoteDir | Path | str,
    *,
    unused_for: timedelta | None = None,
    max_bytes: int | None = None,
    ids: Collection[str] | None = None,
    dry_run: bool = False,
) -> list[CacheCard]:
    """Delete caches; return them, or with `dry_run` the caches that would be deleted.

    A cache that a process reads or builds now is kept.

    Args:
        caches: folder of all caches.
        unused_for: delete caches that were not used for longer.
        max_bytes: delete the least recently used caches until the rest has at most this size.
        ids: delete these caches.
        dry_run: delete nothing.

    Raises:
        CacheError: a given id is unknown or in use, or a cache cannot be deleted.
    """
    root = open_folder(caches)
    cards = list_caches(root)
    unknown = sorted(set(ids or ()) - {card.id for card in cards})
    if unknown:
        known = ", ".join(card.id for card in cards) or "none"
        raise CacheError(f"{root}: there is no cache {unknown[0]!r}; known: {known}")
    used = next((card.id for card in cards if card.in_use and card.id in (ids or ())), None)
    if used is not None:
        raise CacheError(f"{root}: cache {used} is in use by a running search or training; wait until it has ended")
    now = datetime.fromtimestamp(time.time(), UTC)
    chosen = [
        card
        for card in cards
        if card.id in (ids or ()) or (unused_for is not None and now - card.last_used > unused_for and not card.in_use)
    ]
    if max_bytes is not None:
        total = 0
        for card in sorted((card for card in cards if card not in chosen), key=lambda card: not card.in_use):
            total += card.bytes
            if total > max_bytes and not card.in_use:
                chosen.append(card)
    return chosen if dry_run else [card for card in chosen if _delete(root.at(card.id))]


def _delete(folder: RemoteDir) -> bool:
    """Delete a cache if it is unused; return whether it was deleted."""
    with suppress(OSError):  # an older cache may have no lock file
        if folder.local is not None:
            (folder.local / USE_LOCK).parent.mkdir(exist_ok=True)
            (folder.local / USE_LOCK).touch()
    with exclusive_lock(folder) as is_unused:
        try:
            if is_unused:
                # The manifest first: if the rest is interrupted, the cache does not count as complete.
                folder.delete(MANIFEST)
                folder.delete_everything()
        except OSError as error:
            raise CacheError(f"{folder}: cannot be deleted ({error}); check its permissions") from None
        return is_unused


def nearest(root: RemoteDir, key: CacheKey) -> str:
    """Describe how the most similar cache differs from a key, as the end of an error message."""
    others: list[tuple[int, str, list[str]]] = []
    for name in root.folders():
        with suppress(CacheError):
            differences = read_key(root.at(name)).differences(key)
            others.append((len(differences), name, differences))
    if not others:
        return "there are no other caches; build it"
    _, name, differences = min(others)
    state = "differs: " + "; ".join(differences) if differences else "is incomplete"
    return f"the most similar cache, {name}, {state}; build it"


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
    with exclusive_lock(folder) as is_unused:
        return CacheCard(name, description, size, records, complete, datetime.fromtimestamp(used, UTC), not is_unused)
