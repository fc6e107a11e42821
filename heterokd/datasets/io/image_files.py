"""Image files: finding, reading and fingerprinting images that lie one a file, for every data set that ships them so.

An image is turned as its EXIF says, and the middle square of its region (the whole image unless a data set says
otherwise) is resized to the data set's `image_size`: the shorter side becomes `image_size`, the longer one is cropped.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from heterokd.datasets.io.split import SPLIT_NAMES, Split, SplitName, Splits
from heterokd.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Decoded images of a split are kept when all of them fit in this many bytes, and in this share of the machine's memory:
# two trials on one machine, each with train and val, then hold an eighth of it at most.
MEMORY_BUDGET = 2**30
MEMORY_SHARE = 1 / 32
# PIL decodes outside the interpreter's lock; more threads than this wait for the disk.
MAX_THREADS = 16
# Files of a split whose size enters the fingerprint, evenly spread; names and labels of all of them do.
SIZES_SAMPLE = 2**16

# EXIF orientations that swap width and height.
QUARTER_TURNS = (5, 6, 7, 8)

Region = tuple[float, float, float, float]
WHOLE: Region = (0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class LabelledFiles:
    """Image files with labels.

    Attributes:
        folder: what the names are relative to.
        names: [N] paths below `folder` as bytes: an array, as a million `Path`s would take half a gigabyte.
        labels: [N] class numbers.
        regions: [N, 4] see `read_image`; None for whole images.
    """

    folder: Path
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    regions: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, place: int) -> Path:
        """Where the image at a position lies."""
        return self.folder / self.name(place)

    def name(self, place: int) -> str:
        """Its path below `folder`."""
        return os.fsdecode(self.names[place])

    def region(self, place: int) -> Region:
        """What is read of it."""
        if self.regions is None:
            return WHOLE
        left, top, right, bottom = (float(edge) for edge in self.regions[place])
        return left, top, right, bottom

    def chosen(self, index: NDArray[np.int64]) -> LabelledFiles:
        """The files at `index`; positions count anew from 0."""
        regions = None if self.regions is None else self.regions[index]
        return LabelledFiles(self.folder, self.names[index], self.labels[index], regions)


class DecodedFiles(ABC):
    """Pixels that lie in files, one array a file; decoded by threads, and kept if asked for."""

    def __init__(self, count: int, shape: tuple[int, ...], *, kept: bool) -> None:
        self._shape = (count, *shape)
        self._pixels: NDArray[np.uint8] | None = None
        self._decoded = np.zeros(count, np.bool_)
        self._kept = kept

    @abstractmethod
    def decode(self, place: int) -> NDArray[np.uint8]:
        """The pixels of the file at a position.

        Raises:
            DataError: the file is damaged, is no image or has gone.
        """

    def __len__(self) -> int:
        return self._shape[0]

    def __getstate__(self) -> dict[str, Any]:
        """Paths alone: another process decodes for itself."""
        return {**self.__dict__, "_pixels": None, "_decoded": np.zeros(len(self), np.bool_)}

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The pixels at `index` [B], as a new array [B, ...].

        Raises:
            DataError: a file is damaged, is no image or has gone.
        """
        if not self._kept:
            return self._decode(index)
        if self._pixels is None:
            self._pixels = np.empty(self._shape, np.uint8)
        missing = np.unique(index[~self._decoded[index]])
        if len(missing):
            self._pixels[missing] = self._decode(missing)
            self._decoded[missing] = True
        chosen: NDArray[np.uint8] = self._pixels[index]
        return chosen

    def _decode(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        pixels = np.empty((len(index), *self._shape[1:]), np.uint8)

        def decode(place: int) -> None:
            pixels[place] = self.decode(index[place])

        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(decode, range(len(index))):  # raises what a thread raised
                pass
        return pixels


class FileImages(DecodedFiles):
    """Images that lie in files, as middle squares; kept when the whole split fits in `budget` bytes.

    Without a budget it is `memory_budget()`.
    """

    def __init__(self, files: LabelledFiles, image_size: int, budget: int | None = None) -> None:
        room = memory_budget() if budget is None else budget
        super().__init__(len(files), (image_size, image_size, 3), kept=len(files) * image_size**2 * 3 <= room)
        self.files, self.image_size = files, image_size

    def decode(self, place: int) -> NDArray[np.uint8]:
        """The image at a position, [S, S, 3]."""
        return read_image(self.files.path(place), self.image_size, self.files.region(place))


def memory_budget() -> int:
    """Bytes that the decoded images of one split may take on this machine."""
    return min(MEMORY_BUDGET, int(machine_memory() * MEMORY_SHARE))


def machine_memory() -> int:
    """Bytes of memory that this machine, or the container that this process is in, has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit; "max" says that it has none
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        memory = min(memory, int(text))
    return memory


def read_image(path: Path, image_size: int, region: Region = WHOLE) -> NDArray[np.uint8]:
    """The middle square of an image file's region, [S, S, 3] uint8.

    Args:
        path: the file.
        image_size: S.
        region: left, top, right and bottom edge in pixels of the upright image; as in slices, a right or bottom edge of
            0 or less counts from the image's own edge. What lies outside the image is cut off.

    Raises:
        DataError: the file is damaged, is no image or has gone, or its region is empty.
    """
    try:
        with Image.open(path) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in QUARTER_TURNS
            width, height = opened.size[::-1] if turned else opened.size
            left, top, right, bottom = _inside(region, (width, height))
            side = min(right - left, bottom - top)
            if side >= 1:  # a large JPEG is decoded at half or quarter size
                opened.draft("RGB", (int(image_size * opened.width / side), int(image_size * opened.height / side)))
            image = to_rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None
    if side < 1:
        edges = ", ".join(f"{edge:g}" for edge in region)
        raise DataError(
            f"{path}: its {width} x {height} pixels hold nothing of the region ({edges}); replace it by the original"
        )
    if region != WHOLE:  # cut before resizing, whose filter would look across the region's edges
        image = image.crop(_whole_pixels((left, top, right, bottom), image.width / width, image.height / height))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(
        image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    )


def _whole_pixels(region: Region, scale_x: float, scale_y: float) -> tuple[int, int, int, int]:
    """The pixels that lie within a region as a whole, at least one, in an image that was decoded at a smaller scale."""
    left, top = math.ceil(region[0] * scale_x), math.ceil(region[1] * scale_y)
    return left, top, max(math.floor(region[2] * scale_x), left + 1), max(math.floor(region[3] * scale_y), top + 1)


def _inside(region: Region, size: tuple[int, int]) -> Region:
    """A region's edges within an image of `size` (width, height)."""
    left, top, right, bottom = region
    right, bottom = (edge if edge > 0 else edge + side for edge, side in zip((right, bottom), size, strict=True))
    return max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as red, green and blue."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to white
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in `folder`, sorted: a class's number is its place.

    Raises:
        DataError: there are fewer than two.
    """
    with os.scandir(folder) as entries:
        names = tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
    if len(names) < 2:
        raise DataError(f"{folder}: expected a folder for each of two or more classes, found {len(names)}")
    return names


def image_names(folder: Path) -> tuple[list[str], int]:
    """Sorted names of a folder's image files, and the number of its other files; hidden files do not count."""
    with os.scandir(folder) as entries:  # knows files from folders without another access to the disk
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    images = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    return images, len(names) - len(images)


def list_classes(root: Path, subfolder: str, class_names: tuple[str, ...]) -> LabelledFiles:
    """The image files of ROOT/SUBFOLDER/CLASS, by class and then by name; "" lists ROOT/CLASS.

    Raises:
        DataError: the classes are not `class_names`, or one has no images.
    """
    folder = root / subfolder
    own = frozenset(class_folders(folder))
    for name in class_names:
        if name not in own:
            raise DataError(f"{folder}: class {name!r} of train is missing; add {folder / name} or remove the class")
    for name in sorted(own.difference(class_names)):
        raise DataError(f"{folder}: class {name!r} is not in train; add it there or remove {folder / name}")
    found: list[bytes] = []
    counts: list[int] = []
    for name in class_names:
        files, _ = image_names(folder / name)
        if not files:
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{folder / name}: holds no images ({kinds}); add some or remove the folder")
        prefix = f"{subfolder}/{name}" if subfolder else name
        found += [os.fsencode(f"{prefix}/{file}") for file in files]
        counts.append(len(files))
    labels = np.repeat(np.arange(len(class_names), dtype=np.int64), counts)
    return LabelledFiles(root, np.array(found, np.bytes_), labels)


def read_pairs(path: Path, advice: str) -> dict[str, str]:
    """The lines `<key> <value>` of a text file, in their order; a value may hold spaces.

    Args:
        path: the file.
        advice: how to get it, for the error's sentence.

    Raises:
        DataError: the file is missing, a line has no value, or a key comes twice.
    """
    pairs: dict[str, str] = {}
    for number, line in enumerate(read_lines(path, advice), 1):
        key, _, value = line.partition(" ")
        if not key or not value.strip():
            raise DataError(f"{path}: line {number} is {line[:40]!r}, expected `<key> <value>`; {advice}")
        if key in pairs:
            raise DataError(f"{path}: line {number} gives {key!r} a second value; {advice}")
        pairs[key] = value.strip()
    return pairs


def read_lines(path: Path, advice: str) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: the file is missing, empty or no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise DataError(f"{path}: is missing; {advice}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text file; {advice}") from None
    if not lines:
        raise DataError(f"{path}: is empty; {advice}")
    return lines


def file_splits(
    dataset: str,
    files: Mapping[SplitName, LabelledFiles],
    class_names: tuple[str, ...],
    image_size: int,
    advice: str = "restore or remove it",
    sizes: int = SIZES_SAMPLE,
) -> Splits:
    """A data set of image files; they are decoded when they are read.

    Args:
        dataset: its name, part of the fingerprint.
        files: of each split.
        class_names: name of each class number.
        image_size: height = width of the images to give, in pixels.
        advice: what to do about a missing file, for the error's sentence.
        sizes: files of a split whose size enters the fingerprint, evenly spread; names and labels of all of them do.

    Raises:
        DataError: a file is missing.
    """
    digest = hashlib.sha256(f"{dataset}:{image_size}".encode())
    splits: dict[SplitName, Split] = {}
    for name in SPLIT_NAMES:
        chosen = files[name]
        every = -(-len(chosen) // sizes) or 1
        for place, label in enumerate(chosen.labels.tolist()):
            size = _size(chosen.path(place), advice) if place % every == 0 else ""
            region = "" if chosen.regions is None else f"\0{chosen.region(place)}"
            digest.update(f"{name}\0{chosen.name(place)}\0{size}\0{label}{region}\n".encode(errors="surrogateescape"))
        splits[name] = Split(FileImages(chosen, image_size), chosen.labels, name)
    return Splits(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        class_names=class_names,
        image_size=image_size,
        fingerprint=digest.hexdigest(),
    )


def _size(path: Path, advice: str) -> int:
    try:
        size = os.stat(path).st_size
    except OSError:
        raise DataError(f"{path}: is missing; {advice}") from None
    if not size:
        raise DataError(f"{path}: is empty; {advice}")
    return size
