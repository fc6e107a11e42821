"""Share decoded images between the processes of a machine in a memory-mapped file.

The first process decodes while others wait; later processes use the file, which is renamed to its final name when it is
complete. Memory pages are shared: no pixels are copied between trials or decoded twice.

The file: a line of JSON (what it holds), filled up to `HEADER` bytes; a checksum of each image; the pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from heterokd.datasets.io.decoded_files import DecodedFiles, machine_memory
from heterokd.datasets.io.image_files import are_photos
from heterokd.datasets.io.images import Images, image_shape, read_pieces, source_of, sources_of
from heterokd.datasets.io.split import Split, Splits
from heterokd.errors import DataError

logger = logging.getLogger(__name__)

FORMAT = 1
HEADER = 4096
# Free space of the disk that writing a file needs, in sizes of the file.
FREE_SHARE = 2.0
# Files of up to this share of the machine's memory stay in memory. Larger ones are read from the disk, which takes a
# fraction of the time of decoding, if the user's limit and the disk allow them.
SHARED_MEMORY = 1 / 4


def share_splits(folder: Path, splits: Splits, max_bytes: float = 0.0, in_memory: float | None = None) -> Splits:
    """Decode train and val once for all processes of this machine.

    Images in memory, test, and splits that exceed both limits are left unchanged.

    Args:
        folder: folder on a local disk; created if missing.
        splits: splits of the data set.
        max_bytes: maximum size of train and val together if either is larger than `in_memory`.
        in_memory: size of a split up to which it is always shared; None: `SHARED_MEMORY` of the machine's memory.

    Raises:
        DataError: an image is damaged or missing; names the file.
    """
    limit = SHARED_MEMORY * machine_memory() if in_memory is None else in_memory
    if sum(_bytes_of(split.images) for split in (splits.seen, splits.val)) <= max_bytes:
        limit = max(limit, max_bytes)
    train, val = (_share_split(folder, split, splits.fingerprint, limit) for split in (splits.train, splits.val))
    others = splits.unlabelled
    if others is not None:
        others = _share_split(folder, others, splits.fingerprint, limit, "unlabelled")
    return replace(splits, train=train, val=val, unlabelled=others)


def unused_pixels(folder: Path, seconds: float) -> dict[Path, int]:
    """Find files of decoded images that no training has opened for `seconds`; return their sizes in bytes.

    A file that a training has mapped may be deleted: its content stays until that training ends.
    """
    found = {path: path.stat() for path in sorted(folder.glob("*.pixels"))}
    return {path: stat.st_size for path, stat in found.items() if time.time() - stat.st_mtime >= seconds}


def _bytes_of(images: Images) -> int:
    is_decoded = any(isinstance(source, DecodedFiles) for source in sources_of(images))
    return len(images) * math.prod(image_shape(images)) if is_decoded and len(images) else 0


def _share_split(folder: Path, split: Split, fingerprint: str, limit: float, name: str = "") -> Split:
    images, maps, name = split.images, split.label_maps, name or split.name
    try:
        if _fits(images, limit):
            images = shared_pixels(folder, images, fingerprint, name)
        if maps is not None and _fits(maps, limit):
            maps = shared_pixels(folder, maps, fingerprint, f"{name}-labels")
    except OSError as error:
        logger.warning("decoded images are not shared between trainings (%s): each training decodes all images", error)
    return replace(split, images=images, label_maps=maps)


def _fits(images: Images, limit: float) -> bool:
    if not isinstance(source_of(images), DecodedFiles) or not len(images) or are_photos(images):
        return False
    return _bytes_of(images) <= limit


def shared_pixels(folder: Path, images: Images, fingerprint: str, split: str) -> Images:
    """Decode images or label maps once for all processes of this machine.

    Args:
        folder: folder on a local disk; created if missing.
        images: images or label maps to decode.
        fingerprint: fingerprint of the data set, part of the file's name.
        split: name of the file's content, part of the file's name.

    Returns:
        The images from the file, or the given images if the disk has too little space.

    Raises:
        DataError: an image is damaged or missing; names the file.
    """
    if not len(images):
        return images
    shape = (len(images), *image_shape(images))
    name = hashlib.sha256(f"{FORMAT}:{fingerprint}:{split}:{shape}".encode()).hexdigest()[:24]
    path = folder / f"{split}-{name}.pixels"
    folder.mkdir(parents=True, exist_ok=True)
    shared = SharedImages(path, shape)
    if shared.is_whole():
        with suppress(OSError):  # records when it was last used
            os.utime(path)
        return shared
    with FileLock(path.with_suffix(".lock")):
        if not shared.is_whole():  # no other process wrote it in the meantime
            for unfinished in folder.glob(f"{path.name}.*.part"):  # of a killed process: running writers hold the lock
                unfinished.unlink()
            if shutil.disk_usage(folder).free < shared.size * FREE_SHARE:
                return images
            _write(shared, images)
    return shared


class SharedImages:
    """Images or label maps in a file that is mapped into memory; each is checked when it is first read.

    Args:
        path: the file.
        shape: shape of the uint8 content, [N, ...].
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self._checked = np.zeros(shape[0], np.bool_)
        self._mapped: tuple[NDArray[np.uint64], NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, object]:
        """Pickle only the path: another process maps the file again."""
        return {**self.__dict__, "_mapped": None}

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.start + math.prod(self.shape)

    @property
    def start(self) -> int:
        """Offset of the pixels, aligned to a page."""
        return HEADER + -(-len(self) * 8 // HEADER) * HEADER

    @property
    def header(self) -> bytes:
        """Header of the file."""
        line = json.dumps({"heterokd": "pixels", "format": FORMAT, "shape": self.shape}) + "\n"
        return line.encode().ljust(HEADER, b"\0")

    def is_whole(self) -> bool:
        """Whether the file exists with the expected size and header."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_size == self.size and file.read(HEADER) == self.header
        except OSError:
            return False

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the images or label maps at `index` [B] into a new array [B, ...].

        Raises:
            DataError: the file is missing, or an image in it is damaged.
        """
        if self._mapped is None:
            self._mapped = self._map()
        sums, pixels = self._mapped
        chosen: NDArray[np.uint8] = pixels[index]
        new = ~self._checked[index]
        if new.any():
            wrong = index[new][checksums(chosen[new]) != sums[index[new]]]
            if len(wrong):
                raise DataError(f"{self.path}: image {wrong[0]} is damaged; remove the file, and it is written again")
            self._checked[index] = True
        return chosen

    def _map(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        if not self.is_whole():
            raise DataError(f"{self.path}: is missing or damaged; start again, and it is written again")
        sums = np.memmap(self.path, np.uint64, "r", HEADER, (len(self),))
        return np.array(sums), np.memmap(self.path, np.uint8, "r", self.start, self.shape)


def checksums(pixels: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Compute a 64-bit checksum [B] of images [B, ...].

    Words are multiplied by different odd numbers, so that a change of any single word changes the sum.
    """
    flat = pixels.reshape(len(pixels), -1)
    words = np.zeros((len(flat), -(-flat.shape[1] // 8)), np.uint64)
    words.view(np.uint8)[:, : flat.shape[1]] = flat
    factors = np.arange(1, 2 * words.shape[1], 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words *= factors
    # The sum of zeros is not zero, so that a hole in a file is detected.
    return np.asarray(words.sum(axis=1, dtype=np.uint64) + np.uint64(1))


def _write(shared: SharedImages, images: Images) -> None:
    """Decode all images into a file next to the final one, and rename it when it is complete."""
    part = shared.path.with_name(f"{shared.path.name}.{os.getpid()}.part")
    sums: list[NDArray[np.uint64]] = []
    try:
        with part.open("wb") as file:
            file.truncate(shared.size)
            file.seek(shared.start)
            for pixels in read_pieces(images, np.arange(len(shared))):
                sums.append(checksums(pixels))
                file.write(np.ascontiguousarray(pixels).data)
            file.seek(0)
            file.write(shared.header)
            file.write(np.concatenate(sums).data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(shared.path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
