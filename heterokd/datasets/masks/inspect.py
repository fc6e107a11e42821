"""Inspect a folder of images with label maps before a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from heterokd.datasets import load_dataset
from heterokd.datasets.io.label_maps import SceneImages, SceneLabels
from heterokd.datasets.io.read_image import open_image
from heterokd.datasets.io.split import Splits
from heterokd.datasets.masks.class_pixels import check_classes, describe_classes
from heterokd.datasets.masks.settings import colour_name
from heterokd.outputs import IGNORE

DECODED = 64
"""Side of the canvas on which classes are counted."""
SIZES = 200
"""Maximum number of images whose size is read."""


@dataclass(frozen=True)
class MaskInspection:
    """Content of a folder of images with label maps.

    Attributes:
        folder: the folder.
        splits: images and label maps on a small canvas.
        side: median of the images' longer sides, in pixels.
    """

    folder: Path
    splits: Splits
    side: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.splits.class_names

    def sentences(self) -> list[str]:
        """Describe the folder, a sentence or a table's row per line."""
        return [*self.splits.notes, *describe_classes(self.splits), f"longer sides of {self.side} pixels (median)"]

    def settings(self) -> Mapping[str, object]:
        """Return the section `data.masks` that fixes the classes found, so that label maps are not read for them."""
        labels = self.splits.train.label_maps
        assert isinstance(labels, SceneLabels)
        values: dict[str, list[object]] = {name: [] for name in self.classes}
        ignored: list[object] = []
        for value, label in zip(labels.table.values.tolist(), labels.table.classes.tolist(), strict=True):
            shown = colour_name(value) if labels.table.colours else value
            (ignored if label == IGNORE else values[self.classes[label]]).append(shown)
        classes = {name: found[0] if len(found) == 1 else found for name, found in values.items()}
        plain = ignored in ([], [IGNORE])
        return {"classes": classes} if plain else {"classes": classes, "ignore": ignored}


def inspect_masks(folder: Path) -> MaskInspection:
    """Find the images and label maps of a folder, and count the pixels of each class.

    Raises:
        DataError: as `mask_folder`, or train shows a single class.
    """
    splits = load_dataset("mask_folder", folder, DECODED)
    check_classes(splits)
    images = splits.train.images
    assert isinstance(images, SceneImages)
    sides = []
    for position in np.unique(np.linspace(0, len(images) - 1, min(SIZES, len(images))).astype(np.int64)).tolist():
        with open_image(images.files.image(position)) as opened:
            sides.append(max(opened.size))
    return MaskInspection(folder, splits, int(median(sides)))
