"""Decode an image file as a square of pixels.

The image is rotated as its EXIF orientation says. Of its region (the whole image unless a data set says otherwise) the
centre square is resized to `image_size`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from heterokd.datasets.io.options import MEGAPIXELS, Color
from heterokd.datasets.io.value_range import ValueRange, deep_values, levels
from heterokd.errors import DataError

# EXIF orientations that swap width and height.
QUARTER_TURNS = (5, 6, 7, 8)
# The transposition that makes an image of each EXIF orientation upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats that Pillow opens but does not decode by itself: EPS starts Ghostscript, the others need a handler.
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})

Region = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""
WHOLE: Region = (0, 0, 0, 0)

_LIMIT_LOCK = Lock()


@dataclass(frozen=True)
class Reading:
    """How files become pixels. The default is that of `data.reader: 1`.

    Attributes:
        background: color below transparent pixels; None: transparency is ignored.
        values: range of the values of files with more than 8 bits; None: their highest byte is read.
        max_megapixels: larger images are refused.
        photo_crops: whether training crops are cut from the photo, see `read_crop`.
        shown: share of the shorter side that the centre square has.
    """

    background: Color | None = None
    values: ValueRange | None = None
    max_megapixels: float = MEGAPIXELS
    photo_crops: bool = False
    shown: float = 1.0

    @property
    def identity(self) -> str:
        """Text of the settings that decide pixels; empty for the first reader."""
        if self.values is None:
            return ""
        crops = f":photo={self.photo_crops}:shown={self.shown!r}" if self.photo_crops or self.shown != 1 else ""
        return f"background={self.background}:values={self.values.identity}{crops}"


FIRST_READING = Reading()


def read_image(
    path: Path, image_size: int, region: Region = WHOLE, reading: Reading = FIRST_READING
) -> NDArray[np.uint8]:
    """Read the centre square of an image file's region, [S, S, 3] uint8.

    Args:
        path: the file.
        image_size: S.
        region: edges in the upright image; as in slices, a right or bottom edge of 0 or less counts from the image's
            edge. What lies outside the image is cut off.
        reading: how the file becomes pixels.

    Raises:
        DataError: the file is damaged, missing, too large or not an image, or its region is empty.
    """
    with open_image(path, reading) as opened:
        # The square of a whole image is the same either way; EXIF of a PNG would decode it before its size is known.
        turned = region != WHOLE and orientation(opened) in QUARTER_TURNS
        width, height = opened.size[::-1] if turned else opened.size
        left, top, right, bottom = _inside(region, (width, height))
        side = min(right - left, bottom - top) * reading.shown
        if side >= 1:  # a large JPEG is decoded at half or quarter size
            opened.draft("RGB", (int(image_size * opened.width / side), int(image_size * opened.height / side)))
        image = upright(path, opened, reading)
    if side < 1:
        edges = ", ".join(f"{edge:g}" for edge in region)
        raise DataError(
            f"{path}: its {width} x {height} pixels hold nothing of the region ({edges}); replace it by the original"
        )
    if region != WHOLE:  # crop before resizing, because the filter reads across the region's edges
        image = image.crop(_whole_pixels((left, top, right, bottom), image.width / width, image.height / height))
    side = min(image.size) * reading.shown
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(
        image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    )


@dataclass(frozen=True)
class Crop:
    """A random crop of a photo, as of torchvision's RandomResizedCrop; cut off at the photo's edges.

    Attributes:
        area: share of the photo's area.
        ratio: width / height in pixels.
        x: position of the left edge, from 0 (leftmost) to 1.
        y: position of the top edge.
    """

    area: float
    ratio: float
    x: float
    y: float

    def box(self, width: int, height: int) -> Region:
        """Return the edges in a photo of this size."""
        side = math.sqrt(self.area * width * height)
        wide, high = min(side * math.sqrt(self.ratio), width), min(side / math.sqrt(self.ratio), height)
        left, top = self.x * (width - wide), self.y * (height - high)
        return left, top, left + wide, top + high


def read_crop(path: Path, image_size: int, crop: Crop, reading: Reading = FIRST_READING) -> NDArray[np.uint8]:
    """Read a crop of a photo, [S, S, 3] uint8, resized bilinearly with antialiasing.

    A JPEG is decoded at the smallest scale that has all of the crop's detail.

    Raises:
        DataError: see `read_image`.
    """
    with open_image(path, reading) as opened:
        # EXIF of a PNG would decode it before its packing is known, and only JPEGs are decoded at a smaller scale.
        if opened.format in ("JPEG", "MPO"):
            turned = orientation(opened) in QUARTER_TURNS
            left, top, right, bottom = crop.box(*(opened.size[::-1] if turned else opened.size))
            scale = (image_size / (right - left), image_size / (bottom - top))
            across, down = scale[::-1] if turned else scale
            opened.draft("RGB", (math.ceil(opened.width * across), math.ceil(opened.height * down)))
        image = upright(path, opened, reading)
    resized = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=crop.box(*image.size))
    return np.asarray(resized)


@contextmanager
def open_image(path: Path, reading: Reading = FIRST_READING) -> Iterator[Image.Image]:
    """Open an image file; of several frames or pages, the first. Its pixels are decoded when they are first used.

    Raises:
        DataError: the file is damaged, missing, too large or not an image, also if that is found while it is decoded.
    """
    try:
        with _opened(path) as opened:
            if opened.width * opened.height > reading.max_megapixels * 1e6:
                raise DataError(
                    f"{path}: has {opened.width} x {opened.height} pixels, data.max_megapixels allows "
                    f"{reading.max_megapixels:g} million; raise it, or shrink the image"
                )
            yield opened
    except DataError:
        raise
    except Exception as error:  # Pillow's formats raise anything: struct.error, KeyError, MemoryError, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from error


def _opened(path: Path) -> Image.Image:
    formats = sorted(readable_formats())
    try:
        return Image.open(path, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's limit is a global: it is lifted for this file only. `open_image` checks the size of every file.
        with _LIMIT_LOCK:
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(path, formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = before


@lru_cache(maxsize=1)
def readable_formats() -> frozenset[str]:
    """Return the formats that Pillow decodes here."""
    Image.init()
    return frozenset(Image.OPEN) - NOT_DECODED


@lru_cache(maxsize=1)
def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of files that Pillow decodes here, in lower case."""
    readable = readable_formats() | {"MPO"}  # several JPEGs in a file, opened as a JPEG
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in readable))


def orientation(opened: Image.Image) -> int:
    """Return an image's EXIF orientation, 1 to 8; 1 if it has none or a broken one."""
    try:
        found = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - broken EXIF raises anything, and the pixels do not depend on it
        return 1
    return found if isinstance(found, int) and found in UPRIGHT else 1


def upright(path: Path, opened: Image.Image, reading: Reading = FIRST_READING) -> Image.Image:
    """Decode an opened image as red, green and blue, rotated as its EXIF orientation says."""
    image = to_rgb(opened, path, reading)
    turn = UPRIGHT.get(orientation(opened))  # after decoding, because TIFF files are rotated by it
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, path: Path, reading: Reading = FIRST_READING) -> Image.Image:
    """Convert an opened image of any mode to red, green and blue.

    Args:
        image: the opened file.
        path: the file, which 16-bit colours are read from again.
        reading: background and range of values.
    """
    if reading.values is not None:
        deep = deep_values(path, image)
        if deep is not None:
            image = _from_levels(deep, reading.values)
    elif image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to white
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if reading.background is not None and image.has_transparency_data:
        colors = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*reading.background, 255))
        return Image.alpha_composite(below, colors).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGB":
        image.load()  # a conversion would copy it
        return image
    return image.convert("RGB")


def _from_levels(values: NDArray[np.generic], value_range: ValueRange) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 4:  # alpha has its full range
        alpha = (values[..., 3:].astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(np.concatenate((levels(values[..., :3], value_range), alpha), axis=2))
    return Image.fromarray(levels(values, value_range))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    assert converted is not None  # it would be None if the image were changed in place
    return converted


def _inside(region: Region, size: tuple[int, int]) -> Region:
    """Clip a region to an image of `size` (width, height)."""
    left, top, right, bottom = region
    right, bottom = (edge if edge > 0 else edge + side for edge, side in zip((right, bottom), size, strict=True))
    return max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))


def _whole_pixels(region: Region, scale_x: float, scale_y: float) -> tuple[int, int, int, int]:
    """Return the pixels entirely within a region, at least one, of an image that was decoded at a smaller scale."""
    left, top = math.ceil(region[0] * scale_x), math.ceil(region[1] * scale_y)
    return left, top, max(math.floor(region[2] * scale_x), left + 1), max(math.floor(region[3] * scale_y), top + 1)
