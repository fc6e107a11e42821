"""Digit scenes: handwritten digits on textured canvases, with a class for every pixel; no download.

A scene shows two to four of scikit-learn's digits (see `datasets/digits.py`), of different size, rotation, colour and
intensity, on a texture of smooth noise, stripes and gradients, among bars, blobs and arcs that are not digits. Later
objects cover earlier ones. Eleven classes: background and 0 to 9. A border of one pixel around the visible part of a
digit is IGNORE, and so is a digit of which less than `LEAST_SEEN` is visible.

The digits are split 60/20/20, seeded and stratified by class, and the scenes of a split show only digits of that split.
Scenes are a function of seed, split and position: the draws come from the generator of `heterokd.datasets.views`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.digits import read_digits
from heterokd.datasets.io.images import ArrayImages
from heterokd.datasets.io.split import SHARES, SPLIT_NAMES, Dataset, Split, SplitName, Splits, stratified_split
from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import philox_key

SCENES: dict[SplitName, int] = {"train": 1600, "val": 200, "test": 300}


class DigitScenes(Dataset):
    """Scenes of several handwritten digits with a class for every pixel, eleven classes; embedded."""

    tasks = "segmentation"
    licence = "CC BY 4.0 (made of the digits of the UCI Machine Learning Repository)"
    # A mirrored digit is another digit.
    default_policy = AugmentPolicy(scale=(0.7, 1.2), rotation=10.0, brightness=0.2, contrast=0.2)

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """Draw all scenes into memory."""
        return scene_splits(*read_digits(), image_size, seed)


def scene_splits(levels: NDArray[np.float64], labels: NDArray[np.int64], image_size: int, seed: int) -> Splits:
    """Draw and split scenes of the given digits.

    Args:
        levels: [M, 8, 8] see `read_digits`.
        labels: [M] class numbers of the digits.
        image_size: S.
        seed: seed of splits and scenes.
    """
    from heterokd.datasets._scene_drawing import draw_scenes, enlarged_digits  # lazily: imports torch

    glyphs = enlarged_digits(np.asarray(levels, np.float32))
    digest = hashlib.sha256(f"digit_scenes:{image_size}".encode())
    splits: dict[SplitName, Split] = {}
    for name, index in zip(SPLIT_NAMES, stratified_split(labels, SHARES, seed), strict=True):
        key = philox_key("digit_scenes", seed, name)
        images, maps = draw_scenes(glyphs[index], labels[index], SCENES[name], image_size, key)
        for part in (images, maps):
            digest.update(part.tobytes())
        splits[name] = Split(ArrayImages(images), np.zeros(len(images), np.int64), name, ArrayImages(maps))
    names = ("background", *map(str, range(10)))
    return Splits(**splits, class_names=names, image_size=image_size, fingerprint=digest.hexdigest(), notes=())
