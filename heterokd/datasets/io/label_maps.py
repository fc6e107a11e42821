"""Label files: images with a label map each, both in files, for every data set of segmentation that ships them so.

A label map is a PNG of one channel (8-bit grey, or palette: its numbers, not its colours), as large as its image and as
it lies in the file (EXIF does not turn images here, as it does not turn label maps). All images of a data set are read
onto one canvas: what is larger is shrunk to fit within it (images bilinearly and smoothed, label maps to the nearest
pixel), what is smaller lies at its top left corner, and the rest is black and IGNORE. Nothing is ever enlarged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from heterokd.datasets.io.image_files import SIZES_SAMPLE, DecodedFiles, memory_budget, to_rgb
from heterokd.datasets.io.split import SPLIT_NAMES, Split, SplitName, Splits
from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError
from heterokd.outputs import IGNORE

UNKNOWN = -1
"""What `class_table` holds for numbers that no label map may hold."""

Canvas = tuple[int, int]


@dataclass(frozen=True, eq=False)
class SceneFiles:
    """Pairs of image file and label file.

    Attributes:
        folder: what the names are relative to.
        images: [N] paths below `folder` as bytes.
        labels: [N] the same of their label maps.
    """

    folder: Path
    images: NDArray[np.bytes_]
    labels: NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, place: int) -> Path:
        """Where the image at a position lies."""
        return self.folder / os.fsdecode(self.images[place])

    def label(self, place: int) -> Path:
        """Where its label map lies."""
        return self.folder / os.fsdecode(self.labels[place])

    def chosen(self, index: NDArray[np.int64]) -> SceneFiles:
        """The pairs at `index`; positions count anew from 0."""
        return SceneFiles(self.folder, self.images[index], self.labels[index])

    def parted(self, share: float, seed: int) -> tuple[SceneFiles, SceneFiles]:
        """The pairs without a seeded share of them, and that share, at least one."""
        order = permutation(len(self), 0, "split", seed)
        count = max(1, round(share * len(self)))
        return self.chosen(np.sort(order[count:])), self.chosen(np.sort(order[:count]))


class SceneImages(DecodedFiles):
    """Images on a canvas, [Hc, Wc, 3] each."""

    def __init__(self, files: SceneFiles, canvas: Canvas, *, kept: bool) -> None:
        super().__init__(len(files), (*canvas, 3), kept=kept)
        self.files, self.canvas = files, canvas

    def decode(self, place: int) -> NDArray[np.uint8]:
        """The image at a position, [Hc, Wc, 3]."""
        return read_scene(self.files.image(place), self.canvas)


class SceneLabels(DecodedFiles):
    """Label maps on a canvas, [Hc, Wc] each."""

    def __init__(
        self, files: SceneFiles, canvas: Canvas, class_table: NDArray[np.int16], advice: str, *, kept: bool
    ) -> None:
        super().__init__(len(files), canvas, kept=kept)
        self.files, self.canvas, self.class_table, self.advice = files, canvas, class_table, advice

    def decode(self, place: int) -> NDArray[np.uint8]:
        """The label map at a position, [Hc, Wc]."""
        path = self.files.label(place)
        numbers = read_numbers(path, self.advice)
        image = self.files.image(place)
        with _opened(image) as opened:
            if opened.size != numbers.shape[::-1]:
                sizes = f"{numbers.shape[1]} x {numbers.shape[0]} pixels, its image {image} {opened.width} x"
                raise DataError(f"{path}: is {sizes} {opened.height}; {self.advice}")
        classes = self.class_table[numbers]
        if classes.min() == UNKNOWN:
            number = numbers[classes == UNKNOWN][0]
            raise DataError(f"{path}: holds the label {number}, expected {_ranges(self.class_table)}; {self.advice}")
        inside = _fitted((classes.shape[0], classes.shape[1]), self.canvas)
        fitted = Image.fromarray(classes.astype(np.uint8)).resize(inside[::-1], Image.Resampling.NEAREST)
        return _on_canvas(np.asarray(fitted), self.canvas, IGNORE)


def class_table(class_of: Mapping[int, int]) -> NDArray[np.int16]:
    """Class number or IGNORE of every number [256] that a label file may hold; `UNKNOWN` for the others."""
    table = np.full(256, UNKNOWN, np.int16)
    for number, label in class_of.items():
        table[number] = label
    return table


def read_scene(path: Path, canvas: Canvas) -> NDArray[np.uint8]:
    """An image on a canvas, [Hc, Wc, 3] uint8.

    Raises:
        DataError: the file is damaged, is no image or has gone.
    """
    with _opened(path) as opened:
        inside = _fitted((opened.height, opened.width), canvas)
        try:
            opened.draft("RGB", inside[::-1])  # a large JPEG is decoded at half or quarter size
            image = to_rgb(opened)
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(path, error) from None
    if image.size != inside[::-1]:
        image = image.resize(inside[::-1], Image.Resampling.BILINEAR)
    return _on_canvas(np.asarray(image), canvas, 0)


def read_numbers(path: Path, advice: str) -> NDArray[np.uint8]:
    """The numbers of a label file as they are, [H, W].

    Raises:
        DataError: the file is damaged, is no PNG of one channel of 8 bits, or has gone.
    """
    with _opened(path) as opened:
        # Grey of fewer bits would be stretched to 255; a palette's numbers never are.
        kind = f"{opened.format} of mode {opened.tile[0][3] if opened.tile else opened.mode}"
        if opened.format != "PNG" or not (opened.mode == "P" or kind.endswith(" L")):
            raise DataError(f"{path}: is a {kind}, expected a PNG of palette or 8-bit grey; {advice}")
        try:
            return np.asarray(opened)
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(path, error) from None


def scene_splits(
    dataset: str,
    files: Mapping[SplitName, SceneFiles],
    class_names: tuple[str, ...],
    image_size: int,
    canvas: Canvas,
    table: NDArray[np.int16],
    advice: str,
) -> Splits:
    """A data set of image files with label files; both are decoded when they are read.

    Args:
        dataset: its name, part of the fingerprint.
        files: of each split.
        class_names: name of each class number.
        image_size: what the canvas follows from.
        canvas: height and width that every image is read at, in pixels.
        table: see `class_table`.
        advice: how to get the files, for the errors' sentences.

    Raises:
        DataError: a split has no images, or a file is missing.
    """
    digest = hashlib.sha256(f"{dataset}:{canvas}".encode())
    digest.update(np.ascontiguousarray(table, "<i2").tobytes())
    splits: dict[SplitName, Split] = {}
    for name in SPLIT_NAMES:
        chosen = files[name]
        if not len(chosen):
            raise DataError(f"{chosen.folder}: has too few images, none is left for {name}; {advice}")
        every = -(-len(chosen) // SIZES_SAMPLE)
        for place in range(len(chosen)):
            sizes = _sizes(chosen, place, advice) if place % every == 0 else ""
            digest.update(
                b"\0".join((name.encode(), chosen.images[place], chosen.labels[place], sizes.encode(), b"\n"))
            )
        kept = len(chosen) * canvas[0] * canvas[1] * 4 <= memory_budget()
        splits[name] = Split(
            SceneImages(chosen, canvas, kept=kept),
            np.zeros(len(chosen), np.int64),
            name,
            SceneLabels(chosen, canvas, table, advice, kept=kept),
        )
    return Splits(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        class_names=class_names,
        image_size=image_size,
        fingerprint=digest.hexdigest(),
    )


def _sizes(files: SceneFiles, place: int, advice: str) -> str:
    image, label = files.image(place), files.label(place)
    sizes = []
    for path, what in ((image, "is missing"), (label, f"is missing, the label map of {image}")):
        try:
            sizes.append(os.stat(path).st_size)
        except OSError:
            raise DataError(f"{path}: {what}; {advice}") from None
    return ",".join(map(str, sizes))


def _opened(path: Path) -> ImageFile.ImageFile:
    """A file whose pixels are not decoded yet."""
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read as an image ({error}); replace it by the original")


def _fitted(size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
    """Height and width at which an image of `size` fits within the canvas, its own where it does already."""
    scale = min(1.0, canvas[0] / size[0], canvas[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _on_canvas(pixels: NDArray[np.uint8], canvas: Canvas, rest: int) -> NDArray[np.uint8]:
    whole = np.full((*canvas, *pixels.shape[2:]), rest, np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole


def _ranges(table: NDArray[np.int16]) -> str:
    """The numbers that a label file may hold, as words: "0 to 20 or 255"."""
    known = np.flatnonzero(table != UNKNOWN)
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    return " or ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
