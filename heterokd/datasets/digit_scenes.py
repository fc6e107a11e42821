"""Digit scenes: handwritten digits on textured canvases, labelled pixel by pixel; nothing to download.

Each scene is 64 pixels a side unless asked otherwise: two to four of scikit-learn's digits (see `datasets/digits.py`)
of unlike size, turn, colour and intensity over a texture of smooth noise, stripes and gradients, among bars, blobs and
arcs that are no digits. What is drawn later covers what was drawn before. Eleven classes: background and 0 to 9. A
border of one pixel around what is seen of a digit is IGNORE, and so is a digit of which less than `LEAST_SEEN` shows.

The digits are split 60/20/20 by class and seed, and the scenes of a split are made of its own digits. Scenes are a
function of seed, split and place alone: the draws come from the counter-based generator of `heterokd.datasets.views`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.digits import read_digits
from heterokd.datasets.io.split import (
    SHARES,
    SPLIT_NAMES,
    ArrayImages,
    Dataset,
    Split,
    SplitName,
    Splits,
    stratified_split,
)
from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import philox_key
from heterokd.tasks import TaskName

SCENES: dict[SplitName, int] = {"train": 1600, "val": 200, "test": 300}


class DigitScenes(Dataset):
    """Scenes of several handwritten digits with a class for every pixel, eleven classes; embedded."""

    tasks: ClassVar[TaskName] = "segmentation"
    licence: ClassVar[str] = "CC BY 4.0 (made of the digits of the UCI Machine Learning Repository)"
    # A mirrored digit is another digit.
    default_policy: ClassVar[AugmentPolicy] = AugmentPolicy(
        scale=(0.7, 1.2), rotation=10.0, brightness=0.2, contrast=0.2
    )

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
        nothing = np.zeros(len(images), np.int64)
        splits[name] = Split(ArrayImages(images), nothing, name, ArrayImages(maps))
    return Splits(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        class_names=("background", *map(str, range(10))),
        image_size=image_size,
        fingerprint=digest.hexdigest(),
    )
