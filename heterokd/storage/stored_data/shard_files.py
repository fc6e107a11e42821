"""Read shards: WebDataset tars, and tables of images in Parquet and Arrow files."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from heterokd.datasets.io.read_image import image_suffixes
from heterokd.errors import DataError
from heterokd.storage.filesystem import RemoteDir, StoredFile

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_bytes", "bytes")
LABEL_BYTES = 2**20
"""Maximum size of KEY.cls and KEY.json."""
BATCH_ROWS = 64


@dataclass(frozen=True)
class Sample:
    """An image of a shard.

    Attributes:
        name: unique in the data set.
        label: class number or name.
        size: in bytes; -1 if the shard does not say.
        offset: where it begins in the shard, in bytes; in a table its row.
        classes: names of class numbers, if the shard gives them.
    """

    name: str
    label: int | str
    size: int
    offset: int
    classes: tuple[str, ...] = ()


@dataclass
class _Parts:
    """Parts of a WebDataset sample: KEY.jpg, KEY.cls, KEY.json."""

    image: tuple[str, int, int] | None = None
    label: int | str | None = None


def read_tar_labels(store: RemoteDir, shard: StoredFile, names: Sequence[str]) -> list[Sample]:
    """Read where the images of a WebDataset tar lie, and their labels; a tar in a store is read once as a whole.

    Args:
        store: folder of the shard.
        shard: the tar.
        names: names of a label's key in KEY.json.

    Raises:
        DataError: the tar is truncated or damaged, or an image has no label.
    """
    parts: dict[str, _Parts] = {}
    stem = shard.name.rpartition(".")[0]
    try:
        with _opened_tar(store, shard) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                key, _, ending = base.partition(".")
                sample = parts.setdefault(f"{folder}/{key}", _Parts())
                if f".{ending.lower().rpartition('.')[2]}" in image_suffixes():
                    if sample.image is None:
                        sample.image = member.name, member.size, member.offset_data
                elif ending.lower() in ("cls", "json") and member.size <= LABEL_BYTES:
                    content = tar.extractfile(member)
                    found = _label(ending.lower(), b"" if content is None else content.read(), names)
                    sample.label = found if sample.label is None or ending.lower() == "cls" else sample.label
            if shard.size < tar.offset + tarfile.BLOCKSIZE:  # tarfile takes the beginning of a header for the end
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"data.root: {store}/{shard.name}: is no whole tar file ({error}); upload it again") from None
    found_samples = []
    for key, sample in parts.items():
        if sample.image is None:
            continue
        if sample.label is None:
            raise DataError(
                f"data.root: {store}/{shard.name}: {sample.image[0]} has no label; add {key.lstrip('/')}.cls with a "
                f"class, or {key.lstrip('/')}.json with the key 'label'"
            )
        name, size, offset = sample.image
        found_samples.append(Sample(f"{stem}/{name.lstrip('./')}", sample.label, size, offset))
    return found_samples


@contextmanager
def _opened_tar(store: RemoteDir, shard: StoredFile) -> Iterator[tarfile.TarFile]:
    if store.local is not None:
        with tarfile.open(store.local / shard.name, "r:") as tar:
            yield tar
        return
    with (
        store.filesystem.open_input_stream(f"{store.path}/{shard.name}") as stream,
        tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|", bufsize=2**20) as tar,
    ):
        yield tar


def _label(ending: str, content: bytes, names: Sequence[str]) -> int | str | None:
    text = content.decode("utf-8", "replace").strip()
    if ending == "json":
        with suppress(ValueError):
            found = json.loads(text)
            for name in names:
                if isinstance(found, dict) and isinstance(found.get(name), int | str):
                    return _number_or_name(str(found[name]))
        return None
    return _number_or_name(text)


def _number_or_name(text: str) -> int | str | None:
    return int(text) if text.isdecimal() else text.strip() or None


def read_table_labels(store: RemoteDir, shard: StoredFile, names: Sequence[str]) -> list[Sample]:
    """Read the labels of a table's images; of a Parquet file only the columns of labels and paths are read.

    Args:
        store: folder of the shard.
        shard: the table.
        names: names of the column of labels.

    Raises:
        DataError: the table is damaged, has no column of images or labels, or a row has no label.
    """
    with _reading(store, shard):
        schema = _schema(store, shard)
        image = image_column(schema, f"{store}/{shard.name}")
        label = next((name for name in names if name in schema.names), None)
        if label is None:
            raise DataError(
                f"data.root: {store}/{shard.name}: has no column 'label', only "
                f"{', '.join(map(repr, schema.names))}; rename a column"
            )
        has_path = (
            pa.types.is_struct(schema.field(image).type) and schema.field(image).type.get_field_index("path") >= 0
        )
        table = _columns(store, shard, [label, f"{image}.path"] if has_path else [label])
    classes = _class_names(schema, label)
    paths = [None if row is None else row["path"] for row in table.column(image).to_pylist()] if has_path else None
    stem, samples = shard.name.rpartition(".")[0], []
    for row, value in enumerate(table.column(label).to_pylist()):
        if value is None or (isinstance(value, int) and value < 0):
            raise DataError(f"data.root: {store}/{shard.name}: row {row} has no label; complete or remove it")
        suffix = Path(paths[row] or "").suffix.lower() if paths is not None else ""
        ending = suffix if suffix in image_suffixes() else ""
        known = value if isinstance(value, int) and not isinstance(value, bool) else str(value)
        samples.append(Sample(f"{stem}/{row:08d}{ending}", known, -1, row))
    return [replace(samples[0], classes=classes), *samples[1:]] if samples else []


def image_column(schema: pa.Schema, source: str) -> str:
    """Return the column of images: a struct of `bytes` and `path`, or bytes.

    Raises:
        DataError: there is none.
    """
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            holds = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            if holds or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    raise DataError(
        f"data.root: {source}: has no column 'image' with the bytes of images, only "
        f"{', '.join(map(repr, schema.names))}; write the files' bytes into the table"
    )


def table_images(store: RemoteDir, shard: StoredFile, around: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the image of each row of a table.

    Args:
        store: folder of the shard.
        shard: the table.
        around: of a Parquet file, only the group of rows that this row is in.

    Raises:
        DataError: the table is damaged, or a row holds a path only.
    """
    source = f"{store}/{shard.name}"
    with _reading(store, shard):
        column = image_column(_schema(store, shard), source)
        for first, batch in _batches(store, shard, column, around):
            for row, value in enumerate(batch.column(column).to_pylist(), first):
                content = value.get("bytes") if isinstance(value, dict) else value
                if content is None:
                    raise DataError(f"data.root: {source}: row {row} holds no bytes of an image; write them into it")
                yield row, content


def _batches(
    store: RemoteDir, shard: StoredFile, column: str, around: int | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    if not _is_parquet(shard):
        first = 0
        for batch in _columns(store, shard, [column]).to_batches(BATCH_ROWS):
            yield first, batch
            first += len(batch)
        return
    with store.filesystem.open_input_file(f"{store.path}/{shard.name}") as file:
        opened, first = pq.ParquetFile(file), 0
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            if around is None or first <= around < first + count:
                start = first
                for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                    yield start, batch
                    start += len(batch)
            first += count


def _is_parquet(shard: StoredFile) -> bool:
    return not shard.name.lower().endswith(".arrow")


def _schema(store: RemoteDir, shard: StoredFile) -> pa.Schema:
    with store.filesystem.open_input_file(f"{store.path}/{shard.name}") as file:
        if _is_parquet(shard):
            return pq.read_schema(file)
        return _arrow(file).schema


def _arrow(file: pa.NativeFile) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
    """Open an Arrow file: of Hugging Face `datasets` it is a stream, of other programs also a file."""
    if file.read(6) == b"ARROW1":
        file.seek(0)
        return pa.ipc.open_file(file)
    file.seek(0)
    return pa.ipc.open_stream(file)


def _columns(store: RemoteDir, shard: StoredFile, columns: list[str]) -> pa.Table:
    with store.filesystem.open_input_file(f"{store.path}/{shard.name}") as file:
        if _is_parquet(shard):
            return pq.ParquetFile(file).read(columns=columns)
        whole = _arrow(file).read_all()
        return whole.select(list(dict.fromkeys(name.partition(".")[0] for name in columns)))


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Return the names of a `ClassLabel` of Hugging Face `datasets`; empty without."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        return tuple(map(str, feature["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


@contextmanager
def _reading(store: RemoteDir, shard: StoredFile) -> Iterator[None]:
    """Say which shard is damaged."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and not _is_of_content(error):
            raise
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"data.root: {store}/{shard.name}: cannot be read as a table ({reason}); upload it again"
        ) from None


def _is_of_content(error: OSError) -> bool:
    """Whether pyarrow found damaged content, which it raises as an OSError without a number."""
    text = str(error)
    return error.errno is None and "AWS Error" not in text and "google::cloud" not in text.lower()
