"""Upkeep: which caches there are, whether they are sound, and which may go."""

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
    """What is known of a cache without opening its shards.

    Attributes:
        id: name of its folder.
        description: its key in one line, or what is wrong with it.
        bytes: on the disk.
        records: views that are stored.
        complete: whether every shard is there.
        last_used: when it was last opened, or else written.
        in_use: whether a process reads or builds it now; unknown, and False, in an object store.
    """

    id: str
    description: str
    bytes: int
    records: int
    complete: bool
    last_used: datetime
    in_use: bool = False


def list_caches(caches: RemoteDir | Path | str) -> list[CacheCard]:
    """The caches of a folder, the last used first; damaged ones too."""
    root = caches if isinstance(caches, RemoteDir) else open_folder(caches)
    cards = [_card(root.at(name), name) for name in root.folders()]
    return sorted((card for card in cards if card is not None), key=lambda card: card.last_used, reverse=True)


def verify_cache(folder: RemoteDir | Path | str, copies: Path | None = None) -> list[str]:
    """What is wrong with one cache, a sentence each; every checksum is checked. An empty list: it is sound.

    Args:
        folder: of the cache, below the folder of all caches.
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
    """Delete what is damaged of a cache that was complete, so that building it again computes that and nothing else.

    Args:
        folder: of the cache, below the folder of all caches.

    Returns:
        Names of the files that went; none where there is no cache, and where it is sound or was never complete: a
        build looks after partial ones by itself.

    Raises:
        CacheError: its key is damaged, so that nothing in it can be trusted.
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
    for name in reversed(removed):  # without its manifest first, it is not taken for complete
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
    """Delete caches: those named, those not used for long, and then the least recently used until the rest is small.

    A cache that a process reads or builds now is kept.

    Args:
        caches: the folder of all caches.
        unused_for: delete what was last used longer ago.
        max_bytes: keep at most this much.
        ids: delete these.
        dry_run: delete nothing.

    Returns:
        What was deleted, or would be.

    Raises:
        CacheError: there is no cache of a given id, it is in use, or one cannot be deleted.
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
    """Delete a cache that nobody uses; whether it is gone."""
    with suppress(OSError):  # of an earlier version it has no lock yet, by which others can be kept away
        if folder.local is not None:
            (folder.local / USE_LOCK).parent.mkdir(exist_ok=True)
            (folder.local / USE_LOCK).touch()
    with alone(folder) as is_ours:
        try:
            if is_ours:
                # Without its manifest it is not taken for complete, should the rest be interrupted.
                folder.delete(MANIFEST)
                folder.delete_everything()
        except OSError as error:
            raise CacheError(f"{folder}: cannot be deleted ({error}); check its permissions") from None
        return is_ours


def nearest(root: RemoteDir, key: CacheKey) -> str:
    """The tail of an error sentence: how the most similar cache differs from the one that is asked for."""
    told: list[tuple[int, str, list[str]]] = []
    for name in root.folders():
        try:
            found = read_key(root.at(name)).differences(key)
        except CacheError:
            continue
        told.append((len(found), name, found))
    if not told:
        return "there are no others; build it"
    _, name, found = min(told)
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
