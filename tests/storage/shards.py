"""Data sets in the forms in which others ship them: Hugging Face's tables and WebDataset's tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("zebra", "ant")
"""Not sorted: the numbers decide."""
COUNTS = {"train": 16, "validation": 6, "test": 6}


def picture(seed: int, kind: str) -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pictures(split: str, kind: str = "PNG") -> list[tuple[bytes, int]]:
    """Images of a split with their class numbers."""
    first = list(COUNTS).index(split) * 100
    return [(picture(first + place, kind), place % 2) for place in range(COUNTS[split])]


def hugging_face(split: str) -> pa.Table:
    """A table as `datasets` writes it: the image as bytes and path, and the class names in the schema's metadata."""
    shown = pictures(split)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": content, "path": f"{n}.png"} for n, (content, _) in enumerate(shown)], kind)
    table = pa.table({"image": images, "label": pa.array([label for _, label in shown], pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(root: Path) -> None:
    """Two files for train; groups of 4 rows."""
    (root / "data").mkdir(parents=True)
    for split in COUNTS:
        table = hugging_face(split)
        parts = [table.slice(0, 8), table.slice(8)] if split == "train" else [table]
        for number, part in enumerate(parts):
            pq.write_table(part, root / f"data/{split}-{number:05d}-of-{len(parts):05d}.parquet", row_group_size=4)
    (root / "README.md").write_text("a card")


def write_arrow(root: Path) -> None:
    """As `DatasetDict.save_to_disk`."""
    for split in COUNTS:
        (root / split).mkdir(parents=True)
        table = hugging_face(split)
        with pa.ipc.new_stream(root / split / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
        (root / split / "state.json").write_text("{}")
    (root / "dataset_dict.json").write_text("{}")


def write_webdataset(root: Path, ending: str = "cls") -> None:
    """Tars of KEY.jpg with KEY.cls, or with KEY.json."""
    root.mkdir(parents=True)
    for split in COUNTS:
        entries = {}
        for number, (content, label) in enumerate(pictures(split, "JPEG")):
            entries[f"{number:04d}.jpg"] = content
            text = str(label) if ending == "cls" else json.dumps({"label": CLASSES[label], "caption": "noise"})
            entries[f"{number:04d}.{ending}"] = text.encode()
        write_tar(root / f"noise-{split}-000000.tar", entries)
    if ending == "cls":
        (root / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def write_tar(file: Path, entries: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def upload(folder: Path, bucket: str, prefix: str) -> str:
    """Put a folder's files into a bucket as they are; its URL."""
    import boto3

    client = boto3.client("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")
    return f"s3://{bucket}/{prefix}"
