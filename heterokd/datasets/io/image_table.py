"""Tables of images: CSV or Parquet with the columns path and label, and optionally split, group and weight."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from heterokd.datasets.io.class_order import order_classes
from heterokd.datasets.io.layout import SPLIT_FOLDERS, FoundImage, FoundImages
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {
    "path": ("path", "file", "file_name", "filename", "image", "image_path"),
    "label": ("label", "class", "class_name", "target", "category"),
    "split": ("split", "subset", "set"),
    "group": ("group", "group_id"),
    "weight": ("weight", "sample_weight"),
}
"""Names of each column, in any case; the first that is found is read."""


def read_table(root: Path | StoredFiles, table: Path, options: DataOptions) -> FoundImages:
    """Read a table; paths in it are relative to `root`, and a relative `table` as well.

    Raises:
        DataError: the file is missing or no table, a column is missing or repeated, or a row is incomplete, names an
            unknown split, repeats a path, or has a weight that is no number of at least 0.
    """
    file = root / str(table)
    content = _opened(file)
    columns = {key: _column(content, key, file) for key in COLUMNS}
    paths, labels = columns["path"], columns["label"]
    if paths is None or labels is None:
        key = "path" if paths is None else "label"
        raise DataError(
            f"{file}: has no column {key!r}, only {', '.join(map(repr, content.column_names))}; rename a column"
        )
    splits, groups = (columns[key] or [""] * len(paths) for key in ("split", "group"))
    weights = columns["weight"]
    images = []
    for row, (path, label, split, group) in enumerate(zip(paths, labels, splits, groups, strict=True), 1):
        if not path or not label:
            raise DataError(f"{file}: row {row} has no {'label' if path else 'path'}; complete or remove it")
        if columns["split"] is not None and split.lower() not in SPLIT_FOLDERS:
            hint = "leave the column out to have the images split" if not split else did_you_mean(split, SPLIT_FOLDERS)
            raise DataError(f"{file}: row {row} has the split {split!r}; {hint}")
        weight = 1.0 if weights is None else _weight(weights[row - 1], f"{file}: row {row}")
        images.append(FoundImage(path.replace("\\", "/"), label, SPLIT_FOLDERS.get(split.lower()), group, weight))
    repeated = [name for name, count in Counter(image.name for image in images).items() if count > 1]
    if repeated:
        raise DataError(f"{file}: names {repeated[0]!r} in more than one row; keep one")
    known = {image.label for image in images if image.split in (None, "train")}
    for image in images:
        if image.label not in known:
            raise DataError(f"{file}: class {image.label!r} has images of {image.split} but none of train; add some")
    if len(known) < 2:
        raise DataError(f"{file}: expected two or more classes, found {len(known)}")
    folder = root.folder if isinstance(root, StoredFiles) else root
    classes, notes = order_classes(known, options.class_order, (file.parent, folder))
    place = {label: number for number, label in enumerate(classes)}
    images.sort(key=lambda image: (image.split or "", place[image.label], image.name))
    known_names = {name for names in COLUMNS.values() for name in names}
    unread = [name for name in content.column_names if name.strip().lower() not in known_names]
    listed = f"images are listed in {file}"
    if unread:
        listed += f", whose columns {', '.join(map(repr, unread))} are not read"
    return FoundImages(root, folder, classes, tuple(images), {}, (listed, *_weight_notes(images), *notes))


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


def _opened(file: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    if not file.is_file():
        raise DataError(f"data.table: there is no file {file}; paths are relative to data.root")
    try:
        if file.suffix.lower() in (".parquet", ".pq"):
            return pyarrow.parquet.read_table(file)
        separator = "\t" if file.suffix.lower() in (".tsv", ".tab") else ","
        text = pyarrow.csv.ConvertOptions(include_missing_columns=False, strings_can_be_null=False)
        return pyarrow.csv.read_csv(
            file, parse_options=pyarrow.csv.ParseOptions(delimiter=separator), convert_options=text
        )
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
            values = content.column(found[0]).to_pylist()
            return ["" if value is None else str(value).strip() for value in values]
    return None
