"""Colours that colour-blind readers can tell apart, and class maps painted in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from heterokd.outputs import IGNORE

STUDENT, TEACHER, SCRATCH = "#0072B2", "#7F7F7F", "#E69F00"
"""Colours of the roles in all figures."""

PALETTE = (
    "#CCCCCC", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
    "#0000FF", "#242400", "#240092", "#490049", "#496DFF", "#24FF92", "#494949", "#924924",
    "#6D92FF", "#6DB66D", "#B6DBFF", "#49006D", "#2449B6", "#FF0049", "#242424", "#24FFB6",
)  # fmt: skip
"""Colours of classes: a grey, those of Okabe and Ito (https://jfly.uni-koeln.de/color/) that no role has, then colours
of an 8x8x8 RGB grid, chosen greedily: each has the largest distance to all before it, in CIELAB and for the worst of
normal, protanope and deuteranope vision (simulated after Machado et al., IEEE TVCG 2009)."""
OTHERS = "#FFFFFF"
"""For classes beyond the palette."""


def class_colours(maps: Sequence[NDArray[np.integer]], num_classes: int) -> dict[int, str]:
    """Assign a colour to each class in the maps, in the order of the area that the classes cover.

    Args:
        maps: class maps of any shape; `IGNORE` has no colour.
        num_classes: K.

    Returns:
        Class number to `#RRGGBB`, the most frequent class first.
    """
    counts = np.zeros(num_classes, np.int64)
    for classes in maps:
        counts += np.bincount(classes[classes < num_classes].ravel(), minlength=num_classes)
    shown = [int(number) for number in np.argsort(-counts, kind="stable") if counts[number]]
    return {number: PALETTE[place] if place < len(PALETTE) else OTHERS for place, number in enumerate(shown)}


def paint(classes: NDArray[np.integer], colours: dict[int, str]) -> NDArray[np.uint8]:
    """Paint a class map [H, W] as an image [H, W, 3]; `IGNORE` is white with grey stripes."""
    table = np.full((256, 3), 255, np.uint8)
    for number, colour in colours.items():
        table[number] = rgb(colour)
    image: NDArray[np.uint8] = table[classes]
    rows, columns = np.indices(classes.shape)
    period = max(4, min(classes.shape) // 16)
    striped = (classes == IGNORE) & ((rows + columns) % period < max(1, period // 4))
    image[striped] = rgb("#7F7F7F")
    return image


def rgb(colour: str) -> tuple[int, int, int]:
    """Convert `#RRGGBB` to three levels of 0 to 255."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return red, green, blue
