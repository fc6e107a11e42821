"""Data sets of image files with a label map each (segmentation).

A label map is a PNG with one channel (8-bit grey, or palette: its numbers, not its colours) and the size of its image.
EXIF orientations are ignored, since label maps have none. All images of a data set are read onto a canvas of one size:
larger images are shrunk to fit (images bilinearly with antialiasing, label maps to the nearest pixel), smaller ones lie
in the top left corner, and the rest is black and IGNORE. Nothing is enlarged.
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

from heterokd.datasets.io.decoded_files import DecodedFiles, memory_budget
from heterokd.datasets.io.image_files import SIZES_SAMPLE
from heterokd.datasets.io.read_image import to_rgb
from heterokd.datasets.io.split import SPLIT_NAMES, Split, SplitName, Splits
from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError
from heterokd.outputs import IGNORE

UNKNOWN = -1
"""Value of `class_table` for numbers that no label map may hold."""

Canvas = tuple[int, int]


@dataclass(frozen=True, eq=False)
class SceneFiles:
    """Pairs of image file and label file.

    Attributes:
        folder: folder that the names are relative to.
        images: [N] paths of the images below `folder`, see `path_array`.
        labels: [N] paths of their label maps.
    """

    folder: Path
    images: NDArray[np.bytes_]
    labels: NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, position: int) -> Path:
        """Return the path of the image at a position."""
        return self.folder / os.fsdecode(self.images[position])

    def label(self, position: int) -> Path:
        """Return the path of the image's label map."""
        return self.folder / os.fsdecode(self.labels[position])

    def chosen(self, index: NDArray[np.int64]) -> SceneFiles:
        """Select the pairs at `index`; positions start at 0 again."""
        return SceneFiles(self.folder, self.images[index], self.labels[index])

    def hold_out(self, share: float, seed: int) -> tuple[SceneFiles, SceneFiles]:
        """Split off a seeded share, at least one pair; return the rest and the share."""
        order = permutation(len(self), 0, "split", seed)
        count = max(1, round(share * len(self)))
        return self.chosen(np.sort(order[count:])), self.chosen(np.sort(order[:count]))


class SceneImages(DecodedFiles):
    """Images on a canvas, [Hc, Wc, 3] each."""

    def __init__(self, files: SceneFiles, canvas: Canvas, *, kept: bool) -> None:
        super().__init__(len(files), (*canvas, 3), kept=kept)
        self.files, self.canvas = files, canvas

    def decode(self, position: int) -> NDArray[np.uint8]:
        """Read the image at a position, [Hc, Wc, 3]."""
        return read_scene(self.files.image(position), self.canvas)


class SceneLabels(DecodedFiles):
    """Label maps on a canvas, [Hc, Wc] each."""

    def __init__(
        self, files: SceneFiles, canvas: Canvas, class_table: NDArray[np.int16], advice: str, *, kept: bool
    ) -> None:
        super().__init__(len(files), canvas, kept=kept)
        self.files, self.canvas, self.class_table, self.advice = files, canvas, class_table, advice

    def decode(self, position: int) -> NDArray[np.uint8]:
        """Read the label map at a position, [Hc, Wc]."""
        path, image = self.files.label(position), self.files.image(position)
        numbers = read_numbers(path, self.advice)
        with _opened(image) as opened:
            if opened.size != numbers.shape[::-1]:
                raise DataError(
                    f"{path}: is {numbers.shape[1]} x {numbers.shape[0]} pixels, its image {image} {opened.width} x "
                    f"{opened.height}; {self.advice}"
                )
        classes = self.class_table[numbers]
        if classes.min() == UNKNOWN:
            number = numbers[classes == UNKNOWN][0]
            raise DataError(f"{path}: holds the label {number}, expected {_ranges(self.class_table)}; {self.advice}")
        inside = _fitted(numbers.shape[0], numbers.shape[1], self.canvas)
        fitted = Image.fromarray(classes.astype(np.uint8)).resize(inside[::-1], Image.Resampling.NEAREST)
        return _on_canvas(np.asarray(fitted), self.canvas, IGNORE)


def class_table(class_of: Mapping[int, int]) -> NDArray[np.int16]:
    """Return the class number (or IGNORE) of every number [256] in a label file; `UNKNOWN` for other numbers."""
    table = np.full(256, UNKNOWN, np.int16)
    for number, label in class_of.items():
        table[number] = label
    return table


def read_scene(path: Path, canvas: Canvas) -> NDArray[np.uint8]:
    """Read an image onto a canvas, [Hc, Wc, 3] uint8.

    Raises:
        DataError: the file is damaged, missing or not an image.
    """
    with _opened(path) as opened:
        inside = _fitted(opened.height, opened.width, canvas)
        try:
            opened.draft("RGB", inside[::-1])  # a large JPEG is decoded at half or quarter size
            image = to_rgb(opened, path)
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(path, error) from None
    if image.size != inside[::-1]:
        image = image.resize(inside[::-1], Image.Resampling.BILINEAR)
    return _on_canvas(np.asarray(image), canvas, 0)


def read_numbers(path: Path, advice: str) -> NDArray[np.uint8]:
    """Read the numbers of a label file, [H, W].

    Raises:
        DataError: the file is damaged, missing, or not a PNG with one channel of 8 bits.
    """
    with _opened(path) as opened:
        # PIL scales grey of fewer bits to 255; it does not scale the numbers of a palette.
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
    canvas: Canvas,
    table: NDArray[np.int16],
    advice: str,
) -> Splits:
    """Make a data set of image files with label files; both are decoded when they are read.

    Args:
        dataset: name of the data set, part of the fingerprint.
        files: files of each split.
        class_names: name of each class number.
        canvas: height and width of every image that is read, in pixels; the height is `data.image_size`.
        table: see `class_table`.
        advice: how to get the files, for error messages.

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
        for position, names in enumerate(zip(chosen.images.tolist(), chosen.labels.tolist(), strict=True)):
            sizes = _sizes(chosen, position, advice) if position % every == 0 else ""
            digest.update(b"\0".join((name.encode(), *names, sizes.encode(), b"\n")))
        kept = len(chosen) * canvas[0] * canvas[1] * 4 <= memory_budget()
        splits[name] = Split(
            SceneImages(chosen, canvas, kept=kept),
            np.zeros(len(chosen), np.int64),
            name,
            SceneLabels(chosen, canvas, table, advice, kept=kept),
        )
    return Splits(**splits, class_names=class_names, image_size=canvas[0], fingerprint=digest.hexdigest())


def _sizes(files: SceneFiles, position: int, advice: str) -> str:
    image, label = files.image(position), files.label(position)
    sizes = []
    for path, problem in ((image, "is missing"), (label, f"is missing, the label map of {image}")):
        try:
            sizes.append(str(os.stat(path).st_size))
        except OSError:
            raise DataError(f"{path}: {problem}; {advice}") from None
    return ",".join(sizes)


def _opened(path: Path) -> ImageFile.ImageFile:
    """Open an image file without decoding its pixels."""
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read as an image ({error}); replace it by the original")


def _fitted(height: int, width: int, canvas: Canvas) -> tuple[int, int]:
    """Return the height and width at which an image fits in the canvas; unchanged if it fits already."""
    scale = min(1.0, canvas[0] / height, canvas[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _on_canvas(pixels: NDArray[np.uint8], canvas: Canvas, rest: int) -> NDArray[np.uint8]:
    whole = np.full((*canvas, *pixels.shape[2:]), rest, np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole


def _ranges(table: NDArray[np.int16]) -> str:
    """Describe the numbers that a label file may hold: "0 to 20 or 255"."""
    known = np.flatnonzero(table != UNKNOWN)
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    return " or ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
