"""Read label files: one number or colour per pixel.

Numbers come from grey images (1 to 16 bits) and palette images, and from colour images whose channels are equal. The
colour of a pixel is the number red * 65536 + green * 256 + blue.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heterokd.datasets.io.read_image import Reading, open_image
from heterokd.datasets.io.value_range import raw_mode
from heterokd.datasets.masks.settings import LARGEST_VALUE
from heterokd.errors import DataError

ANY_SIZE = Reading(max_megapixels=float("inf"))
"""Label maps have the size of their images, which is limited."""
FORMATS = ("PNG", "BMP", "DIB", "TIFF", "GIF", "PPM")
"""Pillow's names of formats that keep every value."""
# PIL scales grey of fewer than 8 bits to 255.
SCALED = {"L;2": 85, "L;4": 17}
OPAQUE = 255
LOSSY = ("jpeg", "webp", "jpeg2000")
GREY, PALETTE, COLOURS = ("1", "L", "I", "I;16", "I;16B", "I;16L"), ("P", "PA"), ("RGB", "RGBA", "LA")


def read_values(path: Path, advice: str) -> tuple[NDArray[np.int32], bool]:
    """Read the values of a label file; return them, [H, W], and whether they are colours.

    Raises:
        DataError: the file is damaged, missing, of a lossy format, transparent, or has no numbers or colours.
    """
    with open_image(path, ANY_SIZE) as opened:
        _check(path, opened, advice)
        if opened.mode not in COLOURS:
            return _numbers(path, opened), False
        pixels = np.asarray(opened)
        if opened.mode != "RGB":
            if pixels[..., -1].min() < OPAQUE:
                raise DataError(
                    f"{path}: has transparent pixels, whose class is unknown; save it without transparency; {advice}"
                )
            pixels = pixels[..., :-1]
    if pixels.shape[-1] == 1 or (pixels == pixels[..., :1]).all():
        return pixels[..., 0].astype(np.int32), False
    return _codes(pixels), True


def read_numbers(path: Path, advice: str) -> NDArray[np.int32]:
    """Read the numbers of a label file, [H, W]; those of a palette, not its colours.

    Raises:
        DataError: as `read_values`, or the file has colours.
    """
    values, colours = read_values(path, advice)
    if colours:
        raise DataError(
            f"{path}: is a colour image, but the classes are numbers; give the colour of each class in "
            f"data.masks.classes, such as 'car: \"#000080\"'; {advice}"
        )
    return values


def read_colours(path: Path, advice: str) -> NDArray[np.int32]:
    """Read the colours of a label file, [H, W]; of a palette image its colours.

    Raises:
        DataError: as `read_values`.
    """
    with open_image(path, ANY_SIZE) as opened:
        _check(path, opened, advice)
        if opened.mode in PALETTE:
            return _codes(np.asarray(opened.convert("RGB")))
    values, colours = read_values(path, advice)
    return values if colours else values * 0x010101


def _check(path: Path, opened: Image.Image, advice: str) -> None:
    compression = str(opened.info.get("compression", "")) if opened.format == "TIFF" else ""
    if opened.format not in FORMATS or compression in LOSSY:
        kind = f"{opened.format}{f' with {compression} compression' if compression else ''}"
        raise DataError(
            f"{path}: is a {kind}, which changes the numbers of pixels when it compresses; save label maps as PNG; "
            f"{advice}"
        )
    if opened.mode not in (*GREY, *PALETTE, *COLOURS):
        raise DataError(f"{path}: has pixels of mode {opened.mode}, expected integers, a palette or RGB; {advice}")


def _codes(pixels: NDArray[np.generic]) -> NDArray[np.int32]:
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return np.asarray(red << 16 | green << 8 | blue, np.int32)


def _numbers(path: Path, opened: Image.Image) -> NDArray[np.int32]:
    scale = SCALED.get(raw_mode(opened)) if opened.format == "PNG" and opened.mode == "L" else None
    pixels = np.asarray(opened)
    if opened.mode == "PA":
        pixels = pixels[..., 0]
    numbers = pixels.astype(np.int32)
    if opened.mode == "I" and (numbers.min() < 0 or numbers.max() > LARGEST_VALUE):
        raise DataError(f"{path}: holds numbers from {numbers.min()} to {numbers.max()}, expected 0 to {LARGEST_VALUE}")
    return numbers // scale if scale else numbers
