"""Options of data sets in users' folders: keys of the section `data` by the same names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heterokd.datasets.masks.settings import MaskSettings

FIRST_READER, NEWEST_READER = 1, 2

MEGAPIXELS = 180.0
"""Default limit of an image's size, close to Pillow's protection against decompression bombs."""

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

WHITE: Color = (255, 255, 255)
BLACK_CANVAS: Color = (0, 0, 0)
PADDING: Color = (124, 116, 104)
"""Mean of ImageNet, which networks subtract: padding is then zero, as in an exported network."""


@dataclass(frozen=True)
class DataOptions:
    """How files are found and read.

    Attributes:
        reader: version of these rules. 1: PNG, JPEG, WebP and BMP, directly in the folders of classes; folders `train`,
            `val` and `test`; transparency is ignored; the high byte of 16 bits is read. 2: as the other options say.
        background: color below transparent pixels.
        value_range: values that become 0 and 255 in files of more than 8 bits; `auto`: the range that the files use.
        max_megapixels: larger images are refused, in millions of pixels.
        class_order: order of the classes; None: that of `classes.txt`, or sorted.
        table: CSV or Parquet file with paths, labels and splits; None: folders are classes.
        group: regular expression; images whose paths agree in its match are in the same split.
        padding: color of the canvas beyond images with label maps, see `heterokd/datasets/io/label_maps.py`.
        crops: source of training crops: the centre square at `image_size`, or the photo, as in the papers' recipes.
        val_crop: share of the shorter side that the centre square of val and test has.
        drawn_at: of images with label maps, `data.image_size` of the student, of which a teacher of another size sees
            the same part of each image, at the same place; None: `image_size`.
        masks: classes of label maps, and how images without splits are split.
    """

    reader: int = NEWEST_READER
    background: Color = WHITE
    value_range: Literal["auto"] | tuple[float, float] = "auto"
    max_megapixels: float = MEGAPIXELS
    class_order: Literal["sorted", "natural"] | tuple[str, ...] | None = None
    table: Path | None = None
    group: str | None = None
    padding: Color = PADDING
    crops: Literal["square", "photo"] = "square"
    val_crop: float = 1.0
    drawn_at: int | None = None
    masks: MaskSettings | None = None


DEFAULT_OPTIONS = DataOptions()
