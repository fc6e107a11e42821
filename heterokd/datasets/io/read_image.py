"""Decode an image file as a square of pixels.

The image is rotated as its EXIF orientation says. Of its region (the whole image unless a data set says otherwise) the
centre square is resized to `image_size`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from heterokd.errors import DataError

# EXIF orientations that swap width and height.
QUARTER_TURNS = (5, 6, 7, 8)

Region = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""
WHOLE: Region = (0, 0, 0, 0)


def read_image(path: Path, image_size: int, region: Region = WHOLE) -> NDArray[np.uint8]:
    """Read the centre square of an image file's region, [S, S, 3] uint8.

    Args:
        path: the file.
        image_size: S.
        region: edges in the upright image; as in slices, a right or bottom edge of 0 or less counts from the image's
            edge. What lies outside the image is cut off.

    Raises:
        DataError: the file is damaged, missing or not an image, or its region is empty.
    """
    try:
        with Image.open(path) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in QUARTER_TURNS
            width, height = opened.size[::-1] if turned else opened.size
            left, top, right, bottom = _inside(region, (width, height))
            side = min(right - left, bottom - top)
            if side >= 1:  # a large JPEG is decoded at half or quarter size
                opened.draft("RGB", (int(image_size * opened.width / side), int(image_size * opened.height / side)))
            image = to_rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None
    if side < 1:
        edges = ", ".join(f"{edge:g}" for edge in region)
        raise DataError(
            f"{path}: its {width} x {height} pixels hold nothing of the region ({edges}); replace it by the original"
        )
    if region != WHOLE:  # crop before resizing, because the filter reads across the region's edges
        image = image.crop(_whole_pixels((left, top, right, bottom), image.width / width, image.height / height))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(
        image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to red, green and blue."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to white
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _inside(region: Region, size: tuple[int, int]) -> Region:
    """Clip a region to an image of `size` (width, height)."""
    left, top, right, bottom = region
    right, bottom = (edge if edge > 0 else edge + side for edge, side in zip((right, bottom), size, strict=True))
    return max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))


def _whole_pixels(region: Region, scale_x: float, scale_y: float) -> tuple[int, int, int, int]:
    """Return the pixels entirely within a region, at least one, of an image that was decoded at a smaller scale."""
    left, top = math.ceil(region[0] * scale_x), math.ceil(region[1] * scale_y)
    return left, top, max(math.floor(region[2] * scale_x), left + 1), max(math.floor(region[3] * scale_y), top + 1)
