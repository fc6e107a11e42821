"""A data set in a store or in shards, and its copy on this node, which all processes of the node share.

The copy holds plain files, by the names that they have below the root, or in their shard. A file appears in it when it
is whole. So an interrupted fetch goes on with the files that are missing.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pyarrow import NativeFile

from heterokd.datasets.io.read_image import image_suffixes
from heterokd.datasets.io.stored_files import Labelled, StoredFiles
from heterokd.errors import DataError
from heterokd.formatting import format_duration, format_size
from heterokd.storage.files import replacing
from heterokd.storage.filesystem import RemoteDir
from heterokd.storage.stored_data.data_index import DataIndex
from heterokd.storage.stored_data.node_cache import CARD, CopyCard, NodeCache, on_disk, read_card
from heterokd.storage.stored_data.refusals import refused
from heterokd.storage.stored_data.shard_files import table_images
from heterokd.storage.use_locks import SharedLock

logger = logging.getLogger(__name__)

T = TypeVar("T")

FILES, COMPLETE, FETCH_LOCK = "files", "complete", ".fetch.lock"
THREADS = 32
"""Number of concurrent requests; a single stream of a store gives a tenth of a node's bandwidth."""
ATTEMPTS = 3
WAIT_SECONDS = 1.0
READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class CopyPlace:
    """Where the copy of a data set lies.

    Attributes:
        url: of the data set.
        cache: the node's copies.
        folder: folder of this copy.
        lock: protects the copy against deletion while this object lives.
        is_of_images: whether `fetch` fetches only images.
        reopen: opens the data set in another process, by its URL and `is_of_images`.
    """

    url: str
    cache: NodeCache
    folder: Path
    lock: SharedLock | None
    is_of_images: bool
    reopen: Callable[[str, bool], NodeCopy]


class NodeCopy(StoredFiles):
    """Files of a data set, with their copy on this node.

    Args:
        store: where the shards lie.
        index: the files.
        copy: where the copy lies.
    """

    def __init__(self, store: RemoteDir, index: DataIndex, copy: CopyPlace) -> None:
        self.store, self.index, self.copy = store, index, copy
        self.url, self.folder = copy.url, copy.folder / FILES
        self._complete = (copy.folder / COMPLETE).exists()
        self._of_table = [Lock() for _ in index.shards] if index.kind == "table" else []
        if read_card(copy.folder) is None:
            CopyCard(copy.url, self._space(self._wanted())).write(copy.folder)
        os.utime(copy.folder / CARD)

    def __reduce__(self) -> tuple[Callable[[str, bool], NodeCopy], tuple[str, bool]]:
        """Pickle the address: another process opens its node's copy."""
        return self.copy.reopen, (self.url, self.copy.is_of_images)

    def here(self, name: str) -> Path:
        """Return a file's local path, fetching it if it is not here."""
        path = self.folder / name
        row = None if self._complete else self.index.row(os.fsencode(name))
        if row is not None and not path.exists():
            self._fetch_one(row, path)
        return path

    @property
    def names(self) -> NDArray[np.bytes_]:
        """Names of all files, sorted."""
        return self.index.names

    @property
    def labelled(self) -> Labelled | None:
        """Labels of shards."""
        return self.index.labelled

    @property
    def missing_bytes(self) -> int:
        """Bytes that `fetch` would transfer, those of whole shards."""
        return self._transferred(self._missing())

    @property
    def total_bytes(self) -> int:
        """Bytes that a fetch of everything transfers."""
        return self._transferred(self._wanted())

    def _transferred(self, rows: NDArray[np.int64]) -> int:
        if self.index.kind == "files":
            return int(self.index.sizes[rows].sum())
        return sum(self.index.shards[shard].size for shard in np.unique(self.index.shard[rows]).tolist())

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; of a row that of its table."""
        row = self.index.row(os.fsencode(name))
        if row is None:
            return None
        known = int(self.index.sizes[row])
        return known if known >= 0 else self.index.shards[int(self.index.shard[row])].size

    def check_room(self) -> None:
        """Check that this node has room for all files."""
        if not self._complete:
            self.copy.cache.check_room(self.copy.folder, self._space(self._missing()), self.url)

    def fetch(self) -> None:
        """Fetch all files that are not here; other processes of this machine wait meanwhile."""
        if self._complete:
            return
        with FileLock(self.copy.folder / FETCH_LOCK):
            if not (self.copy.folder / COMPLETE).exists():
                self._fetch_missing(self._missing())
                (self.copy.folder / COMPLETE).touch()
            self._complete = True

    def _wanted(self) -> NDArray[np.int64]:
        """Return the positions of the files that `fetch` fetches."""
        names = self.index.names.tolist()
        if not self.copy.is_of_images or self.index.kind == "table":
            return np.arange(len(names))
        suffixes = tuple(suffix.encode() for suffix in image_suffixes())
        return np.flatnonzero(np.fromiter((name.lower().endswith(suffixes) for name in names), np.bool_, len(names)))

    def _space(self, rows: NDArray[np.int64]) -> int:
        """Return the bytes that files take on the disk."""
        known = self.index.sizes[rows]
        if self.index.kind == "table":  # images take about as much as their table
            return on_disk(int(self.index.bytes * len(rows) / max(1, len(self.index.names))), len(rows))
        return on_disk(int(known.sum()), len(rows))

    def _missing(self) -> NDArray[np.int64]:
        """Return the positions of the files that are not here."""
        if self._complete:
            return np.zeros(0, np.int64)
        return np.array([row for row in self._wanted().tolist() if self._is_missing(row)], np.int64)

    def _fetch_missing(self, missing: NDArray[np.int64]) -> None:
        if not len(missing):
            return
        needed = self._space(missing)
        self.copy.cache.make_room(self.copy.folder, needed, self.url)
        logger.info("fetching %s of %s to %s", format_size(needed), self.url, self.folder)
        began = time.monotonic()
        shards = self.index.shard[missing]
        order = np.lexsort((self.index.offset[missing], shards))
        parts = np.split(missing[order], np.flatnonzero(np.diff(shards[order])) + 1)
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for _ in pool.map(self._fetch_shard, parts):  # raises the exceptions of the threads
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what has arrived stays
                raise
        took = time.monotonic() - began
        logger.info("fetched %s of %s in %s", format_size(needed), self.url, format_duration(took))

    def _fetch_shard(self, rows: NDArray[np.int64]) -> None:
        """Fetch files of a shard, sorted by offset; a failed request is repeated for the files that are missing."""

        def fetch() -> None:
            for row, content in self._contents(rows.tolist()):
                self._write(row, content)

        with self._refused():
            _patiently(fetch)

    def _contents(self, rows: list[int]) -> Iterator[tuple[int, bytes]]:
        """Yield the content of files of a shard, sorted by offset, that are not here."""
        index = self.index
        shard = index.shards[int(index.shard[rows[0]])]
        missing = [row for row in rows if self._is_missing(row)]
        if not missing:
            return
        if index.kind == "table":
            wanted = {int(index.offset[row]): row for row in missing}
            for number, content in table_images(self.store, shard):
                if number in wanted:
                    yield wanted.pop(number), content
            if wanted:
                raise self._damaged(shard.name, "rows are missing")
            return
        with self.store.filesystem.open_input_stream(
            f"{self.store.path}/{shard.name}", buffer_size=None if index.kind == "files" else READ_BYTES
        ) as stream:
            place = 0
            for row in missing:
                _skip(stream, int(index.offset[row]) - place)
                content = stream.read(int(index.sizes[row]))
                place = int(index.offset[row]) + len(content)
                if len(content) != index.sizes[row]:
                    raise self._damaged(shard.name, "it is shorter than its index says")
                yield row, content

    def _fetch_one(self, row: int, path: Path) -> None:
        index = self.index
        number = int(index.shard[row])
        shard = index.shards[number]
        with self._refused():
            if index.kind == "table":
                with self._of_table[number]:
                    if not path.exists():
                        rows = np.flatnonzero(index.shard == number).tolist()
                        row_of = {int(index.offset[each]): each for each in rows}
                        for each, content in table_images(self.store, shard, int(index.offset[row])):
                            self._write(row_of[each], content)
                return
            offset, size = int(index.offset[row]), int(index.sizes[row])

            def read() -> bytes:
                with self.store.filesystem.open_input_file(f"{self.store.path}/{shard.name}") as file:
                    return bytes(file.read_at(size, offset))

            content = _patiently(read)
        if len(content) != size:
            raise self._damaged(shard.name, "it is shorter than its index says")
        self._write(row, content)

    def _path(self, row: int) -> Path:
        return self.folder / os.fsdecode(self.index.names[row])

    def _write(self, row: int, content: bytes) -> None:
        try:
            with replacing(self._path(row)) as partial:
                partial.write_bytes(content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"data.root: the disk of {self.folder} is full before {self.url} is fetched; free some space, what has "
                "arrived is kept"
            ) from None

    def _is_missing(self, row: int) -> bool:
        try:
            found = self._path(row).stat().st_size
        except OSError:
            return True
        return int(self.index.sizes[row]) not in (found, -1)

    def _refused(self) -> AbstractContextManager[None]:
        return refused(self.url, "what has arrived is kept")

    def _damaged(self, shard: str, reason: str) -> DataError:
        return DataError(f"data.root: {self.store}/{shard}: is damaged ({reason}); upload it again")


def _skip(stream: NativeFile, count: int) -> None:
    """Read and forget bytes: a store's stream cannot seek."""
    while count > 0:
        read = len(stream.read(min(count, READ_BYTES)))
        if not read:
            return
        count -= read


def _patiently(call: Callable[[], T]) -> T:
    """Call again if a store's answer fails; refusals are repeated by the store's client already."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except OSError as error:
            if error.errno is not None:
                raise
            logger.debug("attempt %d failed (%s)", attempt, error)
            time.sleep(attempt * WAIT_SECONDS)
    return call()
