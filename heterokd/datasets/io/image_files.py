"""Data sets of image files with a class each: find, list and fingerprint the files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.io.decoded_files import DecodedFiles, decoding_threads, memory_budget
from heterokd.datasets.io.images import Images, JoinedImages, positions_in_source, source_of, sources_of
from heterokd.datasets.io.read_image import FIRST_READING, WHOLE, Crop, Reading, Region, read_crop, read_image
from heterokd.datasets.io.split import SPLIT_NAMES, Split, SplitName, Splits, stratified_split
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Number of evenly spaced files of a split whose size is part of the fingerprint; the names and labels of all files are.
SIZES_SAMPLE = 2**16


@dataclass(frozen=True, eq=False)
class LabelledFiles:
    """Image files with labels.

    Attributes:
        folder: folder that the names are relative to.
        names: [N] paths below `folder`, see `path_array`.
        labels: [N] class numbers.
        region: region of every image that is read, see `read_image`.
        reading: how the files become pixels.
        weights: [N] weight of each image in the task loss; None: all are 1.
    """

    folder: Path | StoredFiles
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    region: Region = WHOLE
    reading: Reading = FIRST_READING
    weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, position: int) -> Path:
        """Return the path of the image at a position; a stored file is fetched."""
        return self.folder / self.name(position)

    def size(self, position: int) -> int | None:
        """Return the size in bytes of the image at a position; None if it is missing."""
        if isinstance(self.folder, StoredFiles):
            return self.folder.size(self.name(position))
        try:
            return os.stat(self.path(position)).st_size
        except OSError:
            return None

    def name(self, position: int) -> str:
        """Return the image's path below `folder`."""
        return os.fsdecode(self.names[position])

    def chosen(self, index: NDArray[np.int64]) -> LabelledFiles:
        """Select the files at `index`; positions start at 0 again."""
        weights = None if self.weights is None else self.weights[index]
        return replace(self, names=self.names[index], labels=self.labels[index], weights=weights)

    def hold_out(self, share: float, seed: int, class_names: Sequence[str]) -> tuple[LabelledFiles, LabelledFiles]:
        """Split off a seeded share of each class; return the rest and the share.

        Raises:
            DataError: a class has a single image.
        """
        kept, held_out = stratified_split(self.labels, (1 - share, share), seed, class_names)
        return self.chosen(kept), self.chosen(held_out)


class FileImages(DecodedFiles):
    """Centre squares of image files, kept in memory if the whole split fits in `budget` bytes.

    The default budget is `memory_budget()`.
    """

    def __init__(self, files: LabelledFiles, image_size: int, budget: int | None = None) -> None:
        limit = memory_budget() if budget is None else budget
        super().__init__(len(files), (image_size, image_size, 3), kept=len(files) * image_size**2 * 3 <= limit)
        self.files, self.image_size = files, image_size

    def decode(self, position: int) -> NDArray[np.uint8]:
        """Read the image at a position, [S, S, 3]."""
        return read_image(self.files.path(position), self.image_size, self.files.region, self.files.reading)

    @property
    def are_photos(self) -> bool:
        """Whether training crops are cut from the photos: then squares are not kept for training."""
        return self.files.reading.photo_crops

    def read_crops(self, index: NDArray[np.int64], crops: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Read a crop of each image at `index` [B], [B, S, S, 3].

        Args:
            index: positions.
            crops: area, ratio, x and y of each crop, [4, B]; see `Crop`.

        Raises:
            DataError: a file is damaged, missing or not an image.
        """
        pixels = np.empty((len(index), *self._shape[1:]), np.uint8)

        def decode(row: int) -> None:
            crop = Crop(*crops[:, row].tolist())
            pixels[row] = read_crop(self.files.path(index[row]), self.image_size, crop, self.files.reading)

        with decoding_threads() as pool:
            for _ in pool.map(decode, range(len(index))):  # raises the exceptions of the threads
                pass
        return pixels


def are_photos(images: Images) -> bool:
    """Whether training crops are cut from the photos that all of the images are."""
    return all(isinstance(source, FileImages) and source.are_photos for source in sources_of(images))


def read_photo_crops(images: Images, index: NDArray[np.int64], crops: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Read crops of the photos that `images` are, or are chosen from; see `FileImages.read_crops`."""
    index, source = positions_in_source(images, index), source_of(images)
    if isinstance(source, JoinedImages):
        return source.merged(index, lambda part, chosen, places: read_photo_crops(part, chosen, crops[:, places]))
    assert isinstance(source, FileImages)  # checked by the caller with `are_photos`
    return source.read_crops(index, crops)


def path_array(paths: Iterable[str]) -> NDArray[np.bytes_]:
    """Return paths as an array of bytes: a million `Path`s would take half a gigabyte."""
    return np.array([os.fsencode(path) for path in paths], np.bytes_)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders in `folder`; a class's number is its position.

    Raises:
        DataError: there are fewer than two.
    """
    with os.scandir(folder) as entries:
        names = tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
    if len(names) < 2:
        raise DataError(f"{folder}: expected a folder for each of two or more classes, found {len(names)}")
    return names


def present_splits(root: Path) -> list[SplitName]:
    """Return which of train, val and test are folders of `root`; none if it holds class folders directly.

    Raises:
        DataError: val or test is present, but not train.
    """
    present = [name for name in SPLIT_NAMES if (root / name).is_dir()]
    if present and "train" not in present:
        raise DataError(f"{root}: has {' and '.join(present)} but no train; add {root / 'train'}")
    return present


def file_names(folder: Path, suffixes: tuple[str, ...]) -> tuple[list[str], int]:
    """Return the sorted names of a folder's files with some suffixes, and the number of its other files.

    Hidden files are ignored, and upper and lower case are the same.
    """
    with os.scandir(folder) as entries:  # distinguishes files and folders without another access to the disk
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    found = sorted(name for name in names if name.lower().endswith(suffixes))
    return found, len(names) - len(found)


def list_classes(root: Path, subfolder: str, class_names: tuple[str, ...]) -> LabelledFiles:
    """List the image files of ROOT/SUBFOLDER/CLASS, or of ROOT/CLASS if `subfolder` is empty, by class and by name.

    Raises:
        DataError: the classes are not `class_names`, or a class has no images.
    """
    folder = root / subfolder
    present = frozenset(class_folders(folder))
    for name in class_names:
        if name not in present:
            raise DataError(f"{folder}: class {name!r} of train is missing; add {folder / name} or remove the class")
    for name in sorted(present.difference(class_names)):
        raise DataError(f"{folder}: class {name!r} is not in train; add it there or remove {folder / name}")
    paths: list[str] = []
    counts: list[int] = []
    for name in class_names:
        files, _ = file_names(folder / name, SUFFIXES)
        if not files:
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{folder / name}: holds no images ({kinds}); add some or remove the folder")
        prefix = f"{subfolder}/{name}" if subfolder else name
        paths += [f"{prefix}/{file}" for file in files]
        counts.append(len(files))
    return LabelledFiles(root, path_array(paths), np.repeat(np.arange(len(class_names), dtype=np.int64), counts))


def file_splits(
    dataset: str,
    files: Mapping[SplitName, LabelledFiles],
    class_names: tuple[str, ...],
    image_size: int,
    advice: str = "restore or remove it",
    sizes: int = SIZES_SAMPLE,
) -> Splits:
    """Make a data set of image files, which are decoded when they are read.

    Args:
        dataset: name of the data set, part of the fingerprint.
        files: image files of each split.
        class_names: name of each class number.
        image_size: height = width of the images in pixels.
        advice: what to do about a missing file, for error messages.
        sizes: number of files of a split whose size is part of the fingerprint, see `SIZES_SAMPLE`.

    Raises:
        DataError: a file is missing or empty.
    """
    readings = dict.fromkeys(files[name].reading.identity for name in SPLIT_NAMES)
    digest = hashlib.sha256(f"{dataset}:{image_size}{''.join(readings)}".encode())
    splits: dict[SplitName, Split] = {}
    for name in SPLIT_NAMES:
        chosen = files[name]
        every = -(-len(chosen) // sizes) or 1
        for position, label in enumerate(chosen.labels.tolist()):
            size = file_size(chosen, position, advice) if position % every == 0 else ""
            region = "" if chosen.region == WHOLE else f"\0{chosen.region}"
            line = f"{name}\0{chosen.name(position)}\0{size}\0{label}{region}\n"
            digest.update(line.encode(errors="surrogateescape"))
        weights = chosen.weights if name == "train" else None
        if weights is not None and (weights == weights[0]).all():
            weights = None
        if weights is not None:
            digest.update(b"weights\0" + np.ascontiguousarray(weights, "<f4").tobytes())
        splits[name] = Split(FileImages(chosen, image_size), chosen.labels, name, weights=weights)
    return Splits(**splits, class_names=class_names, image_size=image_size, fingerprint=digest.hexdigest(), notes=())


def file_size(files: LabelledFiles, position: int, advice: str) -> int:
    """Return the size in bytes of the file at a position.

    Raises:
        DataError: it is missing or empty.
    """
    size = files.size(position)
    if not size:
        problem = "is missing" if size is None else "is empty"
        raise DataError(f"{files.folder}/{files.name(position)}: {problem}; {advice}")
    return size
