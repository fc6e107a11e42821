"""Pixels of each class in label maps, as they are trained on: what a user should know before work begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.io.images import read_pieces
from heterokd.datasets.io.split import Split, Splits
from heterokd.errors import DataError
from heterokd.outputs import IGNORE

COUNTED = 2000
"""Maximum number of label maps of a split that are counted; of more, evenly spaced ones."""
LISTED = 24
"""Number of classes that are listed; of more, the rarest in train."""


@dataclass(frozen=True, eq=False)
class ClassPixels:
    """Pixels in a split's label maps.

    Attributes:
        pixels: [K] number of pixels of each class.
        images: [K] number of label maps with the class.
        around: [K] number of labelled pixels in the label maps with the class.
        ignored: share of the images' pixels that are ignored; the padding of their canvases does not count.
        counted: number of label maps that were counted.
    """

    pixels: NDArray[np.int64]
    images: NDArray[np.int64]
    around: NDArray[np.int64]
    ignored: float
    counted: int


@lru_cache(maxsize=4)
def class_pixels(splits: Splits) -> tuple[ClassPixels, ClassPixels]:
    """Count the pixels of each class in train and val.

    Raises:
        DataError: a label map is damaged or holds a value that is no class; names the file.
    """
    return split_pixels(splits.train, splits.num_classes), split_pixels(splits.val, splits.num_classes)


@lru_cache(maxsize=4)
def split_pixels(split: Split, classes: int) -> ClassPixels:
    """Count the pixels of each class in a split; see `class_pixels`."""
    assert split.label_maps is not None
    index = np.unique(np.linspace(0, len(split) - 1, min(COUNTED, len(split))).astype(np.int64))
    counts = np.concatenate(
        [
            np.stack([np.bincount(labels.ravel(), minlength=IGNORE + 1) for labels in maps])
            for maps in read_pieces(split.label_maps, index)
        ]
    )
    known = counts[:, :classes]
    shown = known > 0
    around = (shown * known.sum(1, keepdims=True)).sum(0)
    every, ignored = counts.sum(), counts[:, IGNORE].sum()
    if split.extents is not None:
        padding = every - split.extents.read(index).prod(1).sum()
        every, ignored = every - padding, ignored - padding
    return ClassPixels(known.sum(0), shown.sum(0), around, float(ignored / every), len(index))


def check_classes(splits: Splits) -> None:
    """Check that train shows two classes.

    Raises:
        DataError: all labelled pixels of train have the same class.
    """
    if splits.train.label_maps is None:
        return
    train, _ = class_pixels(splits)
    present = np.flatnonzero(train.pixels)
    if len(present) < 2:
        what = f"of class {splits.class_names[present[0]]!r}" if len(present) else "ignored"
        raise DataError(
            f"data: all labelled pixels of train are {what} ({train.ignored:.0%} of all pixels are ignored), so there "
            "is nothing to learn; if an ignored value such as 255 is a class, list it: data.masks.classes: "
            "{background: 0, object: 255}"
        )


def describe_classes(splits: Splits) -> list[str]:
    """Describe the classes of train and val, a sentence or a table's row per line; empty without label maps."""
    if splits.train.label_maps is None:
        return []
    train, val = class_pixels(splits)
    names, total = splits.class_names, splits.num_classes
    lines = [
        f"{len(splits.train)} training images, {len(splits.val)} val, {len(splits.test)} test; {total} classes; "
        f"{train.ignored:.1%} of the pixels of train are ignored, {val.ignored:.1%} of val"
    ]
    if train.counted < len(splits.train):
        lines.append(f"classes are counted in {train.counted} label maps of train and {val.counted} of val")
    order = np.arange(total) if total <= LISTED else np.sort(np.argsort(train.pixels, kind="stable")[:LISTED])
    width = max(len(names[number]) for number in order.tolist())
    lines.append(f"{'class' if total <= LISTED else 'rarest':<{width}}  {'train':>20}  {'val':>20}")
    for number in order.tolist():
        cells = (_cell(part, number) for part in (train, val))
        lines.append(f"{names[number]:<{width}}  {'  '.join(cells)}")
    for name, part in (("train", train), ("val", val)):
        absent = [names[number] for number in np.flatnonzero(part.pixels == 0)]
        if absent:
            shown = ", ".join(absent[:LISTED]) + (", ..." if len(absent) > LISTED else "")
            lines.append(f"{name} has no pixel of {len(absent)} of {total} classes: {shown}")
    return lines


def _cell(part: ClassPixels, number: int) -> str:
    share = part.pixels[number] / max(1, part.pixels.sum())
    return f"{share:>7.2%} {int(part.images[number]):>5} images"
