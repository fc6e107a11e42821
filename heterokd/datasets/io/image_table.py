"""Tables of images: CSV, TSV or Parquet with a column of paths, of labels, and optionally of split, group and weight.

Columns are found by their names (`COLUMNS`) or, with other names, by what is in them: the only column that names files
below the root, and then the only other column, or columns of 0 and 1 with a single 1 per row, a column per class.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from heterokd.datasets.io.class_order import order_classes
from heterokd.datasets.io.layout import FoundImage, FoundImages
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.split_names import SPLIT_WORDS, split_named
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.datasets.io.walk import walked
from heterokd.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {
    "path": (
        *("path", "file", "file_name", "filename", "file_path", "filepath", "image", "image_path", "img_path"),
        *("image_name", "img", "image_id", "id"),
    ),
    "label": ("label", "labels", "class", "class_name", "target", "category", "class_id", "label_name"),
    "split": ("split", "subset", "set"),
    "group": ("group", "group_id"),
    "weight": ("weight", "sample_weight"),
}
"""Names of each column, in any case; the first that is found is read."""

NUMBERS = frozenset(name for key, names in COLUMNS.items() for name in names if key != "path")
"""Columns whose values are compared as numbers if all are."""

SUFFIXES = (".csv", ".tsv", ".tab", ".parquet", ".pq")

TRIED = 64
"""Number of rows, evenly spaced, whose files are looked for before paths are matched by name."""

Columns = Mapping[str, list[str] | None]


def find_tables(root: Path) -> list[str]:
    """Return the names of the tables directly in a folder that list images below it with their labels."""
    names = sorted(path.name for path in root.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    found = []
    for name in names:
        try:
            files = _Files(root)
            columns, _ = _read_columns(files, root / name)
            files.matched(columns["path"] or [], root / name)
        except DataError:
            continue
        found.append(name)
    return found


def read_table(root: Path | StoredFiles, table: Path, options: DataOptions) -> FoundImages:
    """Read a table; paths in it are relative to `root`, and a relative `table` as well.

    Raises:
        DataError: the file is missing or no table, a column is missing or repeated, or a row is incomplete, names an
            unknown split, repeats a path, has no file, or has a weight that is no number of at least 0.
    """
    file = root / str(table)
    files = _Files(root)
    columns, notes = _read_columns(files, file)
    paths, labels = columns["path"], columns["label"]
    assert paths is not None  # otherwise `_read_columns` raises
    assert labels is not None
    splits, groups = (columns[key] or [""] * len(paths) for key in ("split", "group"))
    weights = columns["weight"]
    images = []
    for row, (path, label, split, group) in enumerate(zip(paths, labels, splits, groups, strict=True), 1):
        if not path or not label:
            raise DataError(f"{file}: row {row} has no {'label' if path else 'path'}; complete or remove it")
        if columns["split"] is not None and split_named(split) is None:
            hint = "leave the column out to have the images split" if not split else did_you_mean(split, SPLIT_WORDS)
            raise DataError(f"{file}: row {row} has the split {split!r}; {hint}")
        weight = 1.0 if weights is None else _weight(weights[row - 1], f"{file}: row {row}")
        images.append(FoundImage(path, label, split_named(split), group, weight))
    found, matched = files.matched([image.name for image in images], file)
    images = [replace(image, name=name) for image, name in zip(images, found, strict=True)] if matched else images
    repeated = [name for name, count in Counter(found).items() if count > 1]
    if repeated:
        raise DataError(f"{file}: names {repeated[0]!r} in more than one row; keep one")
    known = {image.label for image in images if image.split in (None, "train")}
    for image in images:
        if image.label not in known:
            raise DataError(f"{file}: class {image.label!r} has images of {image.split} but none of train; add some")
    if len(known) < 2:
        raise DataError(f"{file}: expected two or more classes, found {len(known)}")
    folder = root.folder if isinstance(root, StoredFiles) else root
    classes, order_notes = order_classes(known, options.class_order, (file.parent, folder))
    place = {label: number for number, label in enumerate(classes)}
    images.sort(key=lambda image: (image.split or "", place[image.label], image.name))
    sentences = (*notes, *matched, *_weight_notes(images), *order_notes)
    return FoundImages(root, folder, classes, tuple(images), {}, sentences)


def write_rows(file: Path, names: Sequence[str], labels: Sequence[str], splits: Sequence[str]) -> None:
    """Write a table, which `read_table` reads; its format is that of the suffix.

    Args:
        file: to write.
        names: [N] paths.
        labels: [N] names of classes.
        splits: [N] names of splits; empty: no column.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    content = {"path": list(names), "label": list(labels), **({"split": list(splits)} if splits else {})}
    if file.suffix.lower() in (".parquet", ".pq"):
        pyarrow.parquet.write_table(pa.table(content), file)
    else:
        pyarrow.csv.write_csv(pa.table(content), file)


def _weight(text: str, place: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise DataError(f"{place} has the weight {text!r}; expected a number of at least 0")
    return weight


def _weight_notes(images: list[FoundImage]) -> list[str]:
    weights = [image.weight for image in images if image.split in (None, "train")]
    low, high = min(weights), max(weights)
    if low == high:
        return []
    return [f"weights of training images in the task loss are those of the table, {low:g} to {high:g}"]


def _read_columns(files: _Files, file: Path) -> tuple[Columns, list[str]]:
    """Return the columns of a table, and sentences about them.

    Raises:
        DataError: the file is missing or no table, or a column is missing or repeated.
    """
    content = _opened(file)
    columns = {key: _column(content, key, file) for key in COLUMNS}
    known_names = {name for names in COLUMNS.values() for name in names}
    others = [name for name in content.column_names if name.strip().lower() not in known_names]
    used: list[str] = []
    if columns["path"] is None:
        naming = [name for name in others if files.are_named(_texts(content, name))]
        if len(naming) != 1:
            raise _no_column("path", content, file)
        columns["path"] = _texts(content, naming[0])
        used += naming
    if columns["label"] is None:
        left = [name for name in others if name not in used]
        if len(left) > 1 and (chosen := _one_hot(content, left)) is not None:
            columns["label"] = chosen
            used += left
        elif len(left) == 1:
            columns["label"] = _texts(content, left[0])
            used += left
        else:
            raise _no_column("label", content, file)
    columns["path"] = list(map(_posix, columns["path"] or []))
    unread = [name for name in others if name not in used]
    listed = f"images are listed in {file}"
    if unread:
        listed += f", whose columns {', '.join(map(repr, unread))} are not read"
    return columns, [listed]


def _no_column(key: str, content: pa.Table, file: Path) -> DataError:
    names = ", ".join(map(repr, content.column_names))
    return DataError(f"{file}: has no column {key!r}, only {names}; rename a column")


def _one_hot(content: pa.Table, names: Sequence[str]) -> list[str] | None:
    """Return the name of the column with a 1 in each row; None if the columns have other values than one 1 and 0."""
    labels: list[str] = []
    try:
        rows = zip(*([float(text) for text in _texts(content, name)] for name in names), strict=True)
        for row in rows:
            if sorted(row) != [0.0] * (len(names) - 1) + [1.0]:
                return None
            labels.append(names[row.index(1.0)].strip())
    except ValueError:
        return None
    return labels


class _Files:
    """The images below a root, to match the paths of a table with."""

    def __init__(self, root: Path | StoredFiles) -> None:
        self.root = root
        self._places: dict[str, list[str]] | None = None

    def are_named(self, values: Sequence[str]) -> bool:
        """Whether values, or evenly spaced ones of many, name images."""
        tried = [_posix(value) for value in _spaced(values)]
        return bool(tried) and all(self._exists(value) or len(self._found(value)) == 1 for value in tried)

    def matched(self, values: Sequence[str], file: Path) -> tuple[list[str], tuple[str, ...]]:
        """Return paths below the root; values that are none are matched with names of images, with a sentence.

        Raises:
            DataError: a value names no image, or several.
        """
        if all(map(self._exists, _spaced(values))):
            return list(values), ()
        found = []
        for row, path in enumerate(values, 1):
            places = [path] if self._exists(path) else self._found(path)
            if not places:
                raise DataError(f"{file}: row {row}: there is no image {path!r} in {self.root}; add or remove it")
            if len(places) > 1:
                raise DataError(
                    f"{file}: row {row}: {path!r} may be {places[0]!r} or {places[1]!r}; give paths below data.root"
                )
            found += places
        example = next(row for row, path in enumerate(values) if path != found[row])
        return found, (f"images are found by their names, such as {values[example]!r} as {found[example]}",)

    def _exists(self, path: str) -> bool:
        if isinstance(self.root, StoredFiles):
            return self.root.size(path) is not None
        return (self.root / path).is_file()

    def _found(self, path: str) -> list[str]:
        """Return the images that a value may mean: by the path without its suffix, or by the name alone."""
        if self._places is None:
            self._places = {}
            for name in walked(self.root, "data.root").images:
                base = name.rpartition("/")[2]
                for key in {os.path.splitext(name)[0], base, os.path.splitext(base)[0]}:
                    self._places.setdefault(key, []).append(name)
        return self._places.get(path) or self._places.get(path.rpartition("/")[2]) or []


def _posix(path: str) -> str:
    return path.replace("\\", "/")


def _spaced(values: Sequence[str]) -> Sequence[str]:
    return values[:: -(-len(values) // TRIED) or 1]


def _opened(file: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    if not file.is_file():
        raise DataError(f"data.table: there is no file {file}; paths are relative to data.root")
    try:
        if file.suffix.lower() in (".parquet", ".pq"):
            return pyarrow.parquet.read_table(file)
        with file.open("rb") as opened:
            head = opened.readline(2**16)
        separator = max(",;\t|", key=lambda character: head.count(character.encode()))
        parse = pyarrow.csv.ParseOptions(delimiter=separator)
        with pyarrow.csv.open_csv(file, parse_options=parse) as opened:
            columns = opened.schema.names
        # Paths such as 000123 keep their zeros.
        texts = [name for name in columns if name.strip().lower() not in NUMBERS]
        convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()), strings_can_be_null=False)
        return pyarrow.csv.read_csv(file, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file}: cannot be read as a table ({reason}); give a CSV or Parquet file") from None


def _column(content: pa.Table, key: str, file: Path) -> list[str] | None:
    """Return a column's values as text, empty for null; None if there is none."""
    for wanted in COLUMNS[key]:
        found = [name for name in content.column_names if name.strip().lower() == wanted]
        if len(found) > 1:
            raise DataError(f"{file}: has the column {found[0]!r} twice; remove one")
        if found:
            return _texts(content, found[0])
    return None


def _texts(content: pa.Table, name: str) -> list[str]:
    """Return a column's values as text, empty for null."""
    return ["" if value is None else str(value).strip() for value in content.column(name).to_pylist()]
