"""Data sets of image files with a label map each (segmentation).

A label map has the size of its image, and a number or a colour per pixel, see `heterokd/datasets/masks/read.py`. EXIF
orientations are ignored, since label maps have none. All images of a data set are read onto a canvas of one size:
larger images are shrunk to fit (images bilinearly with antialiasing, label maps to the nearest pixel), smaller ones lie
in the top left corner, and the rest is padding and IGNORE. Nothing is enlarged, except for a teacher of a larger size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heterokd.datasets.io.decoded_files import DecodedFiles, memory_budget
from heterokd.datasets.io.grouping import groups_of
from heterokd.datasets.io.image_files import SIZES_SAMPLE
from heterokd.datasets.io.images import placed_size
from heterokd.datasets.io.options import BLACK_CANVAS, Color
from heterokd.datasets.io.read_image import FIRST_READING, Reading, open_image, to_rgb
from heterokd.datasets.io.split import SPLIT_NAMES, Split, SplitName, Splits
from heterokd.datasets.masks.classes import LabelTable, MaskClasses
from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError
from heterokd.outputs import IGNORE

Canvas = tuple[int, int]


@dataclass(frozen=True, eq=False)
class SceneFiles:
    """Pairs of image file and label file.

    Attributes:
        folder: folder that the names are relative to.
        images: [N] paths of the images below `folder`, see `path_array`.
        labels: [N] paths of their label maps.
        reading: how the files of images become pixels.
        padding: color of the canvas beyond an image.
        drawn_at: height of the canvas on which an image covers the same part, see `placed_size`.
    """

    folder: Path
    images: NDArray[np.bytes_]
    labels: NDArray[np.bytes_]
    reading: Reading = FIRST_READING
    padding: Color = BLACK_CANVAS
    drawn_at: int | None = None

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
        return replace(self, images=self.images[index], labels=self.labels[index])

    def hold_out(self, share: float, seed: int, group: str | None = None) -> tuple[SceneFiles, SceneFiles]:
        """Split off a seeded share, at least one pair or one group; return the rest and the share.

        Args:
            share: share of the pairs.
            seed: seed of the order in which pairs or groups are taken.
            group: regular expression on an image's path; images with the same match stay together.

        Raises:
            DataError: an image's path does not match, or there is a single group.
        """
        if group is not None:
            return self._hold_out_groups(share, seed, group)
        order = permutation(len(self), 0, "split", seed)
        count = max(1, round(share * len(self)))
        return self.chosen(np.sort(order[count:])), self.chosen(np.sort(order[:count]))

    def _hold_out_groups(self, share: float, seed: int, group: str) -> tuple[SceneFiles, SceneFiles]:
        """Take groups in seeded order while that brings the number of pairs closer to the share."""
        members: dict[str, list[int]] = {}
        for position, name in enumerate(groups_of([os.fsdecode(image) for image in self.images], group)):
            members.setdefault(name, []).append(position)
        if len(members) < 2:
            raise DataError(f"data.group: {group!r} puts all images into one group; two are needed")
        groups = sorted(members)
        taken: list[int] = []
        for place in permutation(len(groups), 0, "split", seed)[:-1].tolist():
            more = len(taken) + len(members[groups[place]])
            if not taken or abs(more - share * len(self)) < abs(len(taken) - share * len(self)):
                taken += members[groups[place]]
        rest = np.setdiff1d(np.arange(len(self)), taken)
        return self.chosen(rest), self.chosen(np.sort(np.array(taken, np.int64)))


class SceneImages(DecodedFiles):
    """Images on a canvas, [Hc, Wc, 3] each."""

    def __init__(self, files: SceneFiles, canvas: Canvas, *, kept: bool) -> None:
        super().__init__(len(files), (*canvas, 3), kept=kept)
        self.files, self.canvas = files, canvas

    def decode(self, position: int) -> NDArray[np.uint8]:
        """Read the image at a position, [Hc, Wc, 3]."""
        files = self.files
        return read_scene(files.image(position), self.canvas, files.reading, files.padding, files.drawn_at)


class SceneLabels(DecodedFiles):
    """Label maps on a canvas, [Hc, Wc] each."""

    def __init__(self, files: SceneFiles, canvas: Canvas, table: LabelTable, advice: str, *, kept: bool) -> None:
        super().__init__(len(files), canvas, kept=kept)
        self.files, self.canvas, self.table, self.advice = files, canvas, table, advice

    def decode(self, position: int) -> NDArray[np.uint8]:
        """Read the label map at a position, [Hc, Wc]."""
        path, image = self.files.label(position), self.files.image(position)
        classes = self.table.read(path, self.advice)
        with open_image(image, self.files.reading) as opened:
            if opened.size != classes.shape[::-1]:
                raise DataError(
                    f"{path}: is {classes.shape[1]} x {classes.shape[0]} pixels, its image {image} {opened.width} x "
                    f"{opened.height}; {self.advice}"
                )
        inside = placed_size(classes.shape[0], classes.shape[1], self.canvas, self.files.drawn_at)
        fitted = Image.fromarray(classes).resize(inside[::-1], Image.Resampling.NEAREST)
        return _on_canvas(np.asarray(fitted), self.canvas, IGNORE)


class OwnLabelFiles:
    """Label maps at their own size; read once if all of a split fit in the memory that it may take."""

    def __init__(self, files: SceneFiles, table: LabelTable, advice: str) -> None:
        self.files, self.table, self.advice = files, table, advice
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._bytes = 0

    def __getstate__(self) -> dict[str, object]:
        """Pickle only the paths: another process reads the files again."""
        return {**self.__dict__, "_kept": {}, "_bytes": 0}

    def read(self, position: int) -> NDArray[np.uint8]:
        """Read the label map at a position, [H, W]."""
        if position in self._kept:
            return self._kept[position]
        labels = self.table.read(self.files.label(position), self.advice)
        if self._bytes + labels.nbytes <= memory_budget():
            self._kept[position], self._bytes = labels, self._bytes + labels.nbytes
        return labels

    def chosen(self, index: NDArray[np.int64]) -> OwnLabelFiles:
        """Select the label maps at `index`; positions start at 0 again."""
        return OwnLabelFiles(self.files.chosen(index), self.table, self.advice)


class SceneExtents:
    """Sizes of images on their canvas, from the heads of the files; each is read once by a process."""

    def __init__(self, files: SceneFiles, canvas: Canvas) -> None:
        self.files, self.canvas = files, canvas
        self._known: dict[int, tuple[int, int]] = {}

    def read(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read heights and widths [B, 2]."""
        return np.array([self._size(position) for position in index.tolist()], np.int64).reshape(-1, 2)

    def chosen(self, index: NDArray[np.int64]) -> SceneExtents:
        """Select the images at `index`; positions start at 0 again."""
        return SceneExtents(self.files.chosen(index), self.canvas)

    def _size(self, position: int) -> tuple[int, int]:
        if position not in self._known:
            with open_image(self.files.image(position), self.files.reading) as opened:
                size = placed_size(opened.height, opened.width, self.canvas, self.files.drawn_at)
                self._known[position] = size
        return self._known[position]


def label_files(files: Mapping[SplitName, SceneFiles]) -> list[Path]:
    """Return the paths of all label maps."""
    return [files[name].label(position) for name in SPLIT_NAMES for position in range(len(files[name]))]


def read_scene(
    path: Path,
    canvas: Canvas,
    reading: Reading = FIRST_READING,
    padding: Color = BLACK_CANVAS,
    drawn_at: int | None = None,
) -> NDArray[np.uint8]:
    """Read an image onto a canvas, [Hc, Wc, 3] uint8; see `SceneFiles` for the last three arguments.

    Raises:
        DataError: the file is damaged, missing, too large or not an image.
    """
    with open_image(path, reading) as opened:
        inside = placed_size(opened.height, opened.width, canvas, drawn_at)
        opened.draft("RGB", inside[::-1])  # a large JPEG is decoded at half or quarter size
        image = to_rgb(opened, path, reading)
    if image.size != inside[::-1]:
        image = image.resize(inside[::-1], Image.Resampling.BILINEAR)
    return _on_canvas(np.asarray(image), canvas, padding)


def scene_splits(
    dataset: str,
    files: Mapping[SplitName, SceneFiles],
    classes: MaskClasses,
    canvas: Canvas,
    advice: str,
    notes: tuple[str, ...] = (),
) -> Splits:
    """Make a data set of image files with label files; both are decoded when they are read.

    Args:
        dataset: name of the data set, part of the fingerprint.
        files: files of each split.
        classes: names of the classes, and the class of each value in label files.
        canvas: height and width of every image that is read, in pixels; the height is `data.image_size`.
        advice: how to get the files, for error messages.
        notes: sentences on how files were found, see `Splits.notes`.

    Raises:
        DataError: a split has no images, or a file is missing.
    """
    digest = hashlib.sha256(f"{dataset}:{canvas}".encode())
    digest.update(classes.identity())
    splits: dict[SplitName, Split] = {}
    for name in SPLIT_NAMES:
        chosen = files[name]
        digest.update(chosen.reading.identity.encode())
        if chosen.padding != BLACK_CANVAS:
            digest.update(bytes(chosen.padding))
        if chosen.drawn_at is not None:
            digest.update(f"drawn_at={chosen.drawn_at}".encode())
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
            SceneLabels(chosen, canvas, classes.table, advice, kept=kept),
            own_labels=None if name == "train" else OwnLabelFiles(chosen, classes.table, advice),
            extents=SceneExtents(chosen, canvas),
        )
    return Splits(
        **splits,
        class_names=classes.names,
        image_size=canvas[0],
        fingerprint=digest.hexdigest(),
        notes=(*notes, *classes.notes),
    )


def _sizes(files: SceneFiles, position: int, advice: str) -> str:
    image, label = files.image(position), files.label(position)
    sizes = []
    for path, problem in ((image, "is missing"), (label, f"is missing, the label map of {image}")):
        try:
            sizes.append(str(os.stat(path).st_size))
        except OSError:
            raise DataError(f"{path}: {problem}; {advice}") from None
    return ",".join(sizes)


def _on_canvas(pixels: NDArray[np.uint8], canvas: Canvas, rest: int | Color) -> NDArray[np.uint8]:
    whole = np.full((*canvas, *pixels.shape[2:]), rest, np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole
