"""Index of a data set in a store: its files, where each lies, and their labels where shards give them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from heterokd.datasets.io.stored_files import Labelled
from heterokd.errors import DataError
from heterokd.storage.filesystem import StoredFile

INDEX = "heterokd-index.parquet"
"""Name of the index next to the shards that it describes; written last."""
FORMAT = 1
NO_IMAGE = -1
"""Label of a file that is no image; also the split of an image without a split."""

Kind = Literal["files", "tar", "table"]


@dataclass(frozen=True, eq=False)
class DataIndex:
    """Files of a data set, sorted by name.

    Attributes:
        kind: `files`: each file is an object. `tar`: they are parts of tars. `table`: they are rows of Parquet or Arrow
            files.
        shards: objects of the store that hold them; of `files` only the names and sizes matter.
        names: [N] names below the root, see `path_array`.
        sizes: [N] in bytes; of rows -1.
        shard: [N] position in `shards`.
        offset: [N] where the file begins in its shard, in bytes; of rows the row's number.
        labelled: labels of the images among them, if the shards give labels.
    """

    kind: Kind
    shards: tuple[StoredFile, ...]
    names: NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    labelled: Labelled | None = None

    def row(self, name: bytes) -> int | None:
        """Return the position of a file; None if there is no such file."""
        place = int(np.searchsorted(self.names, name))
        return place if place < len(self.names) and self.names[place] == name else None

    @property
    def bytes(self) -> int:
        """Size of all files; of tables that of the tables, which images take about as much as."""
        return int(self.sizes.sum()) if self.kind != "table" else sum(shard.size for shard in self.shards)

    def write(self, path: Path) -> None:
        """Write the index as a Parquet file."""
        found = self.labelled
        shards = [asdict(shard) for shard in self.shards]
        facts: dict[str, object] = {"format": FORMAT, "kind": self.kind, "shards": shards}
        columns: dict[str, object] = {
            "name": pa.array(self.names.tolist(), pa.binary()),
            "size": self.sizes,
            "shard": self.shard,
            "offset": self.offset,
        }
        if found is not None:
            labels = np.full((2, len(self.names)), NO_IMAGE, np.int64)
            labels[:, np.searchsorted(self.names, found.images)] = found.labels, found.splits
            columns |= {"label": labels[0], "split": labels[1]}
            facts |= {"classes": found.classes, "is_numbered": found.is_numbered}
        table = pa.table(columns).replace_schema_metadata({"heterokd": json.dumps(facts)})
        pq.write_table(table, path, compression="zstd")


def read_index(path: Path, source: str) -> DataIndex:
    """Read an index.

    Args:
        path: the file.
        source: what error messages call it.

    Raises:
        DataError: it is damaged, or of a newer version.
    """
    try:
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {})[b"heterokd"])
        if facts["format"] > FORMAT:
            raise DataError(f"data.root: {source} is of a newer version of heterokd; install that version")
        columns = {name: table.column(name).to_numpy() for name in table.column_names if name != "name"}
        names = np.array(table.column("name").to_pylist(), np.bytes_)
        labelled = None
        if "label" in columns:
            images = columns["label"] != NO_IMAGE
            labelled = Labelled(
                names[images],
                columns["label"][images],
                columns["split"][images],
                tuple(facts["classes"]),
                facts["is_numbered"],
            )
        return DataIndex(
            facts["kind"],
            tuple(StoredFile(**shard) for shard in facts["shards"]),
            names,
            columns["size"],
            columns["shard"],
            columns["offset"],
            labelled,
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"data.root: {source} is damaged ({reason}); delete it, or run `heterokd data push` again"
        ) from None


def sorted_index(
    kind: Kind,
    shards: Sequence[StoredFile],
    rows: Sequence[tuple[bytes, int, int, int]],
    labels: Sequence[tuple[int, int]] | None = None,
    classes: tuple[str, ...] = (),
    *,
    is_numbered: bool = False,
) -> DataIndex:
    """Make an index of files in any order.

    Args:
        kind: see `DataIndex`.
        shards: the objects.
        rows: name, size, shard and offset of each file.
        labels: class number and split of each file, `NO_IMAGE` for others.
        classes: name of each class number.
        is_numbered: see `Labelled`.
    """
    names = np.array([name for name, _, _, _ in rows], np.bytes_)
    order = np.argsort(names, kind="stable")
    numbers = np.array([row[1:] for row in rows], np.int64).reshape(-1, 3)[order]
    names, labelled = names[order], None
    if labels is not None:
        given = np.array(labels, np.int64).reshape(-1, 2)[order]
        images = given[:, 0] != NO_IMAGE
        labelled = Labelled(names[images], given[images, 0], given[images, 1], classes, is_numbered)
    return DataIndex(kind, tuple(shards), names, numbers[:, 0], numbers[:, 1].astype(np.int32), numbers[:, 2], labelled)
