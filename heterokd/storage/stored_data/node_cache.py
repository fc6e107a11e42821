"""Folder of the copies of data sets on this node's disk, bounded in bytes; the least recently used ones are deleted."""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from heterokd.errors import ConfigError, DataError
from heterokd.formatting import format_size
from heterokd.storage.files import write_text
from heterokd.storage.filesystem import open_folder
from heterokd.storage.typed_json import parse
from heterokd.storage.use_locks import exclusive_lock

logger = logging.getLogger(__name__)

FOLDER_VARIABLE, LIMIT_VARIABLE = "HETEROKD_DATA_CACHE", "HETEROKD_DATA_CACHE_GB"
DISK_SHARE = 0.8
"""Default limit, as a share of the disk."""
FREE_BYTES = 10**9
"""Free space that a fetch leaves."""
BLOCK = 4096
CARD = "copy.json"


@dataclass(frozen=True)
class CopyCard:
    """What a copy is.

    Attributes:
        url: where the data set lies.
        bytes: space that the whole copy takes on the disk.
        is_fetched: whether all files are fetched or being fetched; otherwise only files that were read are here.
    """

    url: str
    bytes: int
    is_fetched: bool = False

    def write(self, folder: Path) -> None:
        """Write the card into the copy's folder; its modification time is that of the last use."""
        write_text(folder / CARD, json.dumps(asdict(self)))


@dataclass(frozen=True)
class NodeCache:
    """The copies on a node.

    Attributes:
        folder: holds a folder for each copy.
        limit: bytes that all copies may take.
    """

    folder: Path
    limit: int

    def check_room(self, copy: Path, missing: int, url: str) -> None:
        """Check that a copy can have room, if copies that are in use now are not by then.

        Raises:
            DataError: the limit or the disk is too small.
        """
        self._check_limit(self._total(copy, missing, url), url)
        usable = self._free() - FREE_BYTES + sum(_taken(folder, card) for folder, card in self._others(copy))
        if usable < missing:
            raise self._too_small(url, missing, usable)

    def make_room(self, copy: Path, missing: int, url: str) -> None:
        """Reserve space for a copy that is about to be fetched; delete the least recently used others if necessary.

        Args:
            copy: folder of the copy.
            missing: bytes that are not here yet.
            url: what error messages call the data set.

        Raises:
            DataError: the limit or the disk is too small.
        """
        with FileLock(self.folder / ".room.lock"):
            total = self._total(copy, missing, url)
            self._check_limit(total, url)
            others = self._others(copy)
            taken = sum(_taken(folder, card) for folder, card in others)
            for folder, card in others:
                if taken + total <= self.limit and self._free() >= missing + FREE_BYTES:
                    break
                size = _taken(folder, card)
                if _deleted(folder):
                    taken -= size
                    logger.info("deleted the copy of %s (%s) to make room", card.url, format_size(size))
            if taken + total > self.limit or self._free() < missing + FREE_BYTES:
                raise self._too_small(url, missing, min(self._free() - FREE_BYTES, self.limit - taken))
            CopyCard(url, total, is_fetched=True).write(copy)

    def _total(self, copy: Path, missing: int, url: str) -> int:
        return (read_card(copy) or CopyCard(url, missing)).bytes

    def _check_limit(self, total: int, url: str) -> None:
        if total > self.limit:
            raise DataError(
                f"data.root: {url} takes {format_size(total)}, and the copies of data sets in {self.folder} may "
                f"take {format_size(self.limit)}; raise {LIMIT_VARIABLE}, or set {FOLDER_VARIABLE} to a folder on "
                "a larger disk"
            )

    def _too_small(self, url: str, missing: int, usable: int) -> DataError:
        return DataError(
            f"data.root: {url} needs {format_size(missing)} more in {self.folder}, where {format_size(max(0, usable))} "
            f"can be used besides data sets in use; free some, or set {FOLDER_VARIABLE} to a folder on a larger disk"
        )

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _others(self, copy: Path) -> list[tuple[Path, CopyCard]]:
        """Return the other copies, the least recently used first."""
        found = []
        for folder in self.folder.iterdir():
            card = read_card(folder) if folder != copy and folder.is_dir() else None
            if card is not None:
                found.append(((folder / CARD).stat().st_mtime, folder, card))
        return [(folder, card) for _, folder, card in sorted(found, key=lambda entry: entry[:2])]


def node_cache() -> NodeCache:
    """Open the folder that `HETEROKD_DATA_CACHE` names, by default below the user's folder of caches.

    Raises:
        ConfigError: `HETEROKD_DATA_CACHE_GB` is no positive number.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heterokd" / "data"
    folder = Path(os.environ.get(FOLDER_VARIABLE) or default).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return NodeCache(folder, int(DISK_SHARE * shutil.disk_usage(folder).total))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ConfigError(f"{LIMIT_VARIABLE}: expected gigabytes, a number above 0, got {text!r}")
    return NodeCache(folder, int(limit * 1e9))


def read_card(folder: Path) -> CopyCard | None:
    """Return what a copy is; None if the folder holds none."""
    with suppress(OSError, ValueError):
        return parse(CopyCard, json.loads((folder / CARD).read_text(encoding="utf-8")))
    return None


def on_disk(sizes: int, files: int) -> int:
    """Return the space that files take on a disk, in bytes, which gives each whole blocks."""
    return sizes + files * BLOCK // 2


def _taken(folder: Path, card: CopyCard) -> int:
    """Return the space that a copy takes or will take."""
    if card.is_fetched:
        return card.bytes
    found = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return on_disk(sum(found), len(found))


def _deleted(folder: Path) -> bool:
    """Delete a copy unless it is in use."""
    with exclusive_lock(open_folder(folder)) as is_unused:
        if is_unused:
            (folder / CARD).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        return is_unused
