"""Upload a folder as shards with an index: `heterokd data push`.

Shards are tars, in the form of WebDataset, and not Parquet files: a tar holds files of any kind as they are (images,
label maps, tables, lists of classes), each of them can be read alone from its place in the tar, and other programs read
them too. Images that have a class also get KEY.cls with its number, for these programs. An image's shard is drawn, so
that every shard has images of all classes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heterokd.datasets.io.layout import find_images
from heterokd.datasets.io.options import DEFAULT_OPTIONS
from heterokd.datasets.io.split_names import split_named
from heterokd.datasets.io.walk import is_hidden
from heterokd.datasets.masks.pairs import has_label_maps
from heterokd.datasets.views.random import permutation
from heterokd.errors import ConfigError, DataError
from heterokd.storage.filesystem import RemoteDir, StoredFile, open_folder
from heterokd.storage.stored_data.data_index import INDEX, DataIndex, sorted_index
from heterokd.storage.stored_data.refusals import refused

SHARD_BYTES = 256 * 10**6
"""Size of a shard: large enough for a store's bandwidth, small enough that a node fetches many at once."""
SHARD_NAME = re.compile(r"(train|val|test|data)-\d{6}-[0-9a-f]{12}\.tar")
THREADS = 4
"""Number of shards that are written at the same time, each first to a temporary file."""
ALL = "data"
"""Part of the names of shards whose files have no split."""


@dataclass(frozen=True)
class LocalFile:
    """A file that is pushed.

    Attributes:
        name: path below the folder, with `/`.
        size: in bytes.
        modified: in nanoseconds since 1970.
        label: class number of an image; None for other files.
    """

    name: str
    size: int
    modified: int
    label: int | None = None


@dataclass(frozen=True)
class Shard:
    """A shard that is pushed.

    Attributes:
        name: with a hash of its files, so that a shard that is in the store is known.
        files: in their order.
        offsets: where each file begins, in bytes.
        size: of the shard, in bytes.
    """

    name: str
    files: tuple[LocalFile, ...]
    offsets: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        url: where the data set lies; `data.root` reads it.
        files: number of files.
        images: number of images with a class among them.
        shards: number of shards.
        bytes: size of all shards.
        uploaded: number of shards that were not in the store.
    """

    url: str
    files: int
    images: int
    shards: int
    bytes: int
    uploaded: int


def push_data(
    folder: Path, url: str, shard_bytes: int = SHARD_BYTES, say: Callable[[str], None] = lambda text: None
) -> Pushed:
    """Upload a folder as shards; run again, it uploads the shards that are missing or changed.

    Args:
        folder: the data set.
        url: s3://BUCKET/..., gs://BUCKET/..., file:///FOLDER, or a folder.
        shard_bytes: size of a shard.
        say: called with what is being done.

    Raises:
        DataError: the folder is missing or empty, or the target holds other files, or cannot be written.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the folder that holds the images")
    try:
        store = open_folder(url)
    except ConfigError as error:
        raise DataError(str(error)) from None
    if store.local is not None and folder.resolve() in (store.local.resolve(), *store.local.resolve().parents):
        raise DataError(f"{url}: lies in {folder}; push to another place")
    files = list_files(folder)
    if not files:
        raise DataError(f"{folder}: holds no files; give the folder that holds the images")
    shards = make_shards(files, shard_bytes)
    with refused(url, "with the right to write it, too"):
        if store.local is not None:
            store.local.mkdir(parents=True, exist_ok=True)
        known = {file.name: file.size for file in store.files()}
        foreign = [name for name in known if name != INDEX and not SHARD_NAME.fullmatch(name)]
        if foreign:
            raise DataError(f"{url}: holds other files (such as {foreign[0]}); push to an empty place")
        missing = [shard for shard in shards if known.get(shard.name) != shard.size]
        say(f"{len(files)} files in {len(shards)} shards, {len(missing)} of them to upload to {url}")
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for done, shard in enumerate(pool.map(lambda shard: _upload(store, folder, shard), missing), 1):
                    say(f"[{done}/{len(missing)}] {shard.name}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # the shards that are whole stay
                raise
        with tempfile.TemporaryDirectory() as place:
            _index(shards).write(Path(place) / INDEX)
            store.copy_from(Path(place) / INDEX, INDEX)
        for name in known.keys() - {INDEX} - {shard.name for shard in shards}:
            store.delete(name)  # of an earlier push of other files
    images = sum(file.label is not None for file in files)
    total = sum(shard.size for shard in shards)
    return Pushed(url, len(files), images, len(shards), total, len(missing))


def list_files(folder: Path) -> list[LocalFile]:
    """List the files below a folder, also behind links, except hidden ones; with classes where folders are classes."""
    labels = _labels(folder)
    found = []
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden([name]))
        for name in sorted(names):
            path = Path(place, name)
            if is_hidden([name]) or not path.is_file():
                continue
            relative = path.relative_to(folder).as_posix()
            facts = path.stat()
            found.append(LocalFile(relative, facts.st_size, facts.st_mtime_ns, labels.get(relative)))
    return found


def _labels(folder: Path) -> Mapping[str, int]:
    if has_label_maps(folder):
        return {}
    try:
        found = find_images(folder, DEFAULT_OPTIONS)
    except DataError:
        return {}  # a table, or another layout: readers find the labels as in the folder
    number_of = {label: number for number, label in enumerate(found.classes)}
    return {image.name: number_of[image.label] for image in found.images}


def make_shards(files: Sequence[LocalFile], shard_bytes: int) -> list[Shard]:
    """Distribute files to shards, those of a split to the same ones, in a drawn order."""
    parts: dict[str, list[LocalFile]] = {}
    for place in permutation(len(files), 0, "shards").tolist():
        top, _, rest = files[place].name.partition("/")
        parts.setdefault((split_named(top) or ALL) if rest else ALL, []).append(files[place])
    shards = []
    for split, members in sorted(parts.items()):
        sizes = np.cumsum([len(_header(file.name, file.size)) + _padded(file.size) for file in members])
        number_of = (sizes - 1) // shard_bytes
        for number in np.unique(number_of).tolist():
            chosen = [members[place] for place in np.flatnonzero(number_of == number).tolist()]
            shards.append(_shard(split, number, chosen))
    return shards


def _shard(split: str, number: int, files: Sequence[LocalFile]) -> Shard:
    digest = hashlib.sha256()
    offsets, place = [], 0
    for file in files:
        line = f"{file.name}\0{file.size}\0{file.modified}\0{file.label}\n"
        digest.update(line.encode(errors="surrogateescape"))
        place += len(_header(file.name, file.size))
        offsets.append(place)
        place += _padded(file.size)
        place += len(_class_entry(file))
    name = f"{split}-{number:06d}-{digest.hexdigest()[:12]}.tar"
    return Shard(name, tuple(files), tuple(offsets), place + 2 * tarfile.BLOCKSIZE)


def _upload(store: RemoteDir, folder: Path, shard: Shard) -> Shard:
    """Write a shard; a store shows it when it is complete."""
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / shard.name
        with whole.open("wb") as file:
            for part in _parts(folder, shard):
                file.write(part)
            assert file.tell() == shard.size, (shard.name, file.tell(), shard.size)
        store.copy_from(whole, shard.name)
    return shard


def _parts(folder: Path, shard: Shard) -> Iterator[bytes]:
    for file in shard.files:
        content = (folder / file.name).read_bytes()
        if len(content) != file.size:
            raise DataError(f"{folder / file.name}: has changed meanwhile; run the command again")
        yield _header(file.name, file.size)
        yield content
        yield bytes(_padded(file.size) - file.size)
        yield _class_entry(file)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _class_entry(file: LocalFile) -> bytes:
    """Return the entry KEY.cls of an image with a class; empty for others."""
    if file.label is None:
        return b""
    folder, slash, base = file.name.rpartition("/")
    content = str(file.label).encode()
    name = f"{folder}{slash}{base.partition('.')[0]}.cls"
    return _header(name, len(content)) + content + bytes(_padded(len(content)) - len(content))


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _index(shards: Sequence[Shard]) -> DataIndex:
    rows = [
        (os.fsencode(file.name), file.size, place, offset)
        for place, shard in enumerate(shards)
        for file, offset in zip(shard.files, shard.offsets, strict=True)
    ]
    return sorted_index("tar", [StoredFile(shard.name, shard.size, 0.0) for shard in shards], rows)
