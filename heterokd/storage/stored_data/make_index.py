"""Make the index of a folder that has none: list its files, or read the labels of its shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from heterokd.datasets.io.image_table import COLUMNS
from heterokd.datasets.io.read_image import image_suffixes
from heterokd.datasets.io.split import SPLIT_NAMES
from heterokd.datasets.io.split_names import split_named
from heterokd.datasets.io.walk import is_hidden
from heterokd.errors import DataError
from heterokd.storage.filesystem import RemoteDir, StoredFile
from heterokd.storage.stored_data.data_index import NO_IMAGE, DataIndex, Kind, sorted_index
from heterokd.storage.stored_data.shard_files import Sample, read_table_labels, read_tar_labels

CLASS_LISTS = ("classes.txt", "classnames.txt")
"""Files next to shards with a class name per line, in the order of class numbers; the first one found is read."""
LABELS = ("cls", *COLUMNS["label"], "labels", "fine_label")
"""Names of a label's column, and of its key in KEY.json; the first one found is read."""
TAR, TABLES = (".tar",), (".parquet", ".pq", ".arrow")
THREADS = 8


def kind_of(names: Sequence[str]) -> Kind:
    """Return what the files of a data set are: shards if there are some and no images, or else files."""
    lower = [name.lower() for name in names]
    if any(name.endswith(image_suffixes()) for name in lower):
        return "files"
    for kind, suffixes in (("tar", TAR), ("table", TABLES)):
        if any(name.endswith(suffixes) for name in lower):
            return kind  # type: ignore[return-value]
    return "files"


def make_index(store: RemoteDir, files: Sequence[StoredFile], *, may_be_shards: bool) -> DataIndex:
    """Make the index of a folder's files; shards are read for their labels.

    Args:
        store: the folder.
        files: all files in it.
        may_be_shards: whether tars and tables are shards of images; otherwise they are files of the data set.

    Raises:
        DataError: a shard is damaged, or an image in it has no label.
    """
    shown = [file for file in files if not is_hidden(file.name.split("/"))]
    kind = kind_of([file.name for file in shown]) if may_be_shards else "files"
    if kind == "files":
        rows = [(os.fsencode(file.name), file.size, place, 0) for place, file in enumerate(shown)]
        return sorted_index("files", shown, rows)
    suffixes, read = (TAR, read_tar_labels) if kind == "tar" else (TABLES, read_table_labels)
    shards = [file for file in shown if file.name.lower().endswith(suffixes)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda shard: read(store, shard, LABELS), shards))
    samples = [(place, sample) for place, of_shard in enumerate(found) for sample in of_shard]
    listed = _listed_classes(store, shown)
    names, is_numbered = _classes([sample for _, sample in samples], listed, store)
    number_of = {name: number for number, name in enumerate(names)}
    splits = [_split_of(shard.name) for shard in shards]
    rows = [(os.fsencode(sample.name), sample.size, place, sample.offset) for place, sample in samples]
    labels = [
        (sample.label if isinstance(sample.label, int) else number_of[sample.label], splits[place])
        for place, sample in samples
    ]
    repeated = len(rows) - len({name for name, _, _, _ in rows})
    if repeated:
        raise DataError(f"data.root: {repeated} keys are in a shard of {store} more than once; keep one of each")
    return sorted_index(kind, shards, rows, labels, names, is_numbered=is_numbered)


def _classes(samples: Sequence[Sample], listed: tuple[str, ...], store: RemoteDir) -> tuple[tuple[str, ...], bool]:
    """Return the classes of class numbers in their order, or of names, sorted.

    Raises:
        DataError: shards give numbers and names, other names than each other, or a number beyond the listed names.
    """
    given = {sample.classes for sample in samples if sample.classes}
    if len(given) > 1:
        raise DataError(f"data.root: the tables of {store} have different class names; give all of them the same")
    names = next(iter(given), listed)
    labels = {sample.label for sample in samples}
    numbers = [label for label in labels if isinstance(label, int)]
    if not numbers:
        return tuple(sorted(map(str, labels))), False
    if len(numbers) < len(labels):
        raise DataError(f"data.root: the shards of {store} give numbers and names as labels; keep one of both")
    if names and max(numbers) >= len(names):
        raise DataError(
            f"data.root: a label in {store} is {max(numbers)}, and there are {len(names)} class names; correct the list"
        )
    return names or tuple(map(str, range(max(numbers) + 1))), True


def _listed_classes(store: RemoteDir, files: Sequence[StoredFile]) -> tuple[str, ...]:
    for wanted in CLASS_LISTS:
        for file in files:
            if file.name.rpartition("/")[2] == wanted:
                lines = store.read(file.name).decode("utf-8", "replace").splitlines()
                return tuple(line.strip() for line in lines if line.strip())
    return ()


def _split_of(shard: str) -> int:
    """Return the split that a shard's path names: `train/0001.tar`, `data/val-00000-of-00002.parquet`."""
    for part in reversed(shard.lower().replace("/", "-").replace(".", "-").split("-")):
        for word in (part, *part.split("_")):
            if split := split_named(word):
                return SPLIT_NAMES.index(split)
    return NO_IMAGE
