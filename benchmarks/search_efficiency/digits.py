"""The images: few labels for the students, more for the teachers, and many to validate on.

1797 digits of 8x8 pixels ship with scikit-learn. 200 of them (20 of each class) teach the students, 1197 (those
included) the teachers; 300 are val and 300 test, so that one image is a third of a per cent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from heterokd.datasets.digits import MAX_LEVEL, read_digits

CLASSES = 10
SIDE = 8
LABELS_PER_CLASS = 20
VAL = TEST = 300
VIEWS = 8
"""Augmented versions of each training image; what the teacher says of them is computed once, as in a real search."""

SHIFT = 0.7
"""Largest shift of a view in pixels, in both directions: mild, as the teacher's opinion of a view hardly changes."""

NOISE = 0.06
"""Deviation of the noise that is added to a view; ink is between 0 and 1."""


@dataclass(frozen=True)
class Digits:
    """The splits, standardised. Images are flat: [N, 64].

    Attributes:
        views: [VIEWS, 200, 64] of the students' images.
        labels: theirs.
        teacher_levels: [1197, 8, 8], ink between 0 and 1, not standardised.
        teacher_labels: theirs.
        val_images: [300, 64]
        val_labels: theirs.
        test_images: [300, 64]
        test_labels: theirs.
    """

    views: Tensor
    labels: Tensor
    teacher_levels: Tensor
    teacher_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@lru_cache(maxsize=1)
def load() -> Digits:
    """The splits; the same on every machine."""
    levels, labels = read_digits()
    images, classes = torch.tensor(levels / MAX_LEVEL, dtype=torch.float32), torch.tensor(labels)
    order = torch.tensor(np.random.default_rng(0).permutation(len(images)))
    rest, val, test = order[: -VAL - TEST], order[-VAL - TEST : -TEST], order[-TEST:]
    few = torch.cat([rest[classes[rest] == label][:LABELS_PER_CLASS] for label in range(CLASSES)])
    generator = torch.Generator().manual_seed(1)
    views = torch.stack([augment(images[few], generator) for _ in range(VIEWS)])
    return Digits(
        views,
        classes[few],
        images[rest],
        classes[rest],
        *(part for index in (val, test) for part in (standardise(images[index]), classes[index])),
    )


def augment(images_NHW: Tensor, generator: torch.Generator) -> Tensor:
    """One view of each image, shifted by parts of a pixel and noisy; standardised and flat."""
    count = len(images_NHW)
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * (2 * SHIFT / SIDE)
    theta = torch.cat([torch.eye(2).expand(count, 2, 2), shift.unsqueeze(2)], dim=2)
    grid = torch.nn.functional.affine_grid(theta, [count, 1, SIDE, SIDE], align_corners=False)
    moved = torch.nn.functional.grid_sample(images_NHW.unsqueeze(1), grid, align_corners=False).squeeze(1)
    return standardise(moved + NOISE * torch.randn(moved.shape, generator=generator))


def standardise(images_NHW: Tensor) -> Tensor:
    """Flat, and about mean 0 and deviation 1 over all digits."""
    return ((images_NHW - 0.305) / 0.376).flatten(1)
