"""Files of a data set that lie in a store or in shards, with a copy on this node's disk.

The list of files, with sizes and labels, is known without their content. So classes, counts and splits are found
without a copy. A file is fetched when it is read, and all files by `fetch`, before a training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.io.images import Images, sources_of


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labels that shards give for images, where folders do not.

    Attributes:
        images: [M] names of the images.
        labels: [M] class numbers.
        splits: [M] positions in `SPLIT_NAMES`; -1: no split.
        classes: name of each class number.
        is_numbered: whether shards give class numbers, whose order is kept; otherwise they give names.
    """

    images: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    splits: NDArray[np.int64]
    classes: tuple[str, ...]
    is_numbered: bool


class StoredFiles(ABC):
    """Files of a data set, by their names below its root.

    `stored / name` is `stored.here(name)`, as of a folder's `Path`.

    Attributes:
        url: where they lie.
        folder: folder of the copy; files appear in it when they are fetched, each whole.
    """

    url: str
    folder: Path

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Path:
        return self.here(name)

    @abstractmethod
    def here(self, name: str) -> Path:
        """Return a file's local path, fetching it if it is not here; a path to nothing if there is no such file.

        Raises:
            DataError: it cannot be fetched.
        """

    @property
    @abstractmethod
    def names(self) -> NDArray[np.bytes_]:
        """Names of all files, sorted, see `path_array`."""

    @property
    @abstractmethod
    def labelled(self) -> Labelled | None:
        """Labels of shards; None if folders are classes, or a table gives them."""

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """Bytes that a fetch of everything transfers."""

    @property
    @abstractmethod
    def missing_bytes(self) -> int:
        """Bytes that `fetch` would transfer; 0 if all files are here."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, for rows of a table that of the table's file; None if there is no such file.

        Images of a table have no size of their own before they are read.
        """

    @abstractmethod
    def check_room(self) -> None:
        """Check that this node has room for all files.

        Raises:
            DataError: the disk, or the limit of the copies, is too small.
        """

    @abstractmethod
    def fetch(self) -> None:
        """Fetch all files that are not here; processes of this machine wait for each other.

        Raises:
            DataError: the store refuses, a file there is damaged, or the disk is too small.
        """


def stored_sources(images: Images) -> list[StoredFiles]:
    """Return the stored files that images are, or are chosen and joined from; none for other images."""
    folders = (getattr(getattr(source, "files", None), "folder", None) for source in sources_of(images))
    return [folder for folder in folders if isinstance(folder, StoredFiles)]
