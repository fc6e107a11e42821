"""Pixels of more than 8 bits: which range of values a set of files uses, and its 256 levels.

Files of 10, 12 and 16 bits, signed integers and floats say which numbers they can hold, not which they use: 12-bit data
in a 16-bit file would be nearly black. So one range for the whole set becomes 0 to 255.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from heterokd.datasets.io.decoded_files import decoding_threads
from heterokd.datasets.io.stored_files import StoredFiles

# Maximum number of files, evenly spaced, whose values decide the range of a set.
SCANNED = 2048

# Pillow keeps the high byte of 16-bit colours. With the byte order swapped, it reads the low byte.
SWAPPED = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B"))
}


class ValueRange(Protocol):
    """The values that become 0 and 255."""

    @property
    def identity(self) -> str:
        """Text of the settings."""
        ...

    def bounds(self, *, is_float: bool) -> tuple[float, float]:
        """Return the lowest and the highest value of files of floats, or of integers of more than 8 bits."""
        ...


@dataclass(frozen=True)
class GivenRange:
    """A range from the settings, for all files."""

    low: float
    high: float

    @property
    def identity(self) -> str:
        """Lowest and highest value."""
        return f"{self.low!r}..{self.high!r}"

    def bounds(self, *, is_float: bool) -> tuple[float, float]:
        """Return the range."""
        return self.low, self.high


class ScannedRange:
    """The range that files use; they are opened when the first file of more than 8 bits is read.

    Args:
        folder: folder that the names are relative to.
        names: [N] paths of the files below it; of more than `SCANNED`, evenly spaced ones are opened.
    """

    identity = "auto"

    def __init__(self, folder: Path | StoredFiles, names: NDArray[np.bytes_]) -> None:
        self.folder = folder
        self.names = names[:: -(-len(names) // SCANNED) or 1].copy()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, object]:
        """Pickle the names only: another process scans again."""
        return {"folder": self.folder, "names": self.names}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore the names."""
        self.__dict__ |= state
        self._lock = Lock()

    def bounds(self, *, is_float: bool) -> tuple[float, float]:
        """Return the lowest and highest finite value in the files; (0, 1) without any."""
        with self._lock:
            return self._found[is_float]

    @cached_property
    def _found(self) -> tuple[tuple[float, float], tuple[float, float]]:
        with decoding_threads() as pool:  # which also fetch stored files
            found = list(pool.map(lambda name: _used(self.folder / os.fsdecode(name)), self.names))
        integers, floats = ([range_ for kind, range_ in found if kind is is_float] for is_float in (False, True))
        return _union(integers), _union(floats)


def _union(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    if not ranges:
        return 0.0, 1.0
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _used(path: Path) -> tuple[bool | None, tuple[float, float]]:
    """Return whether a file holds floats, and its range; None for 8 bits, and for a file that cannot be read."""
    nothing = None, (0.0, 0.0)
    try:
        with Image.open(path) as opened:
            values = deep_values(path, opened)
    except Exception:  # noqa: BLE001 - Pillow's formats raise anything; reading the file names it
        return nothing
    if values is None:
        return nothing
    finite = values[..., :3][np.isfinite(values[..., :3])] if values.ndim == 3 else values[np.isfinite(values)]
    if not finite.size:
        return nothing
    return values.dtype.kind == "f", (float(finite.min()), float(finite.max()))


def deep_values(path: Path, opened: Image.Image) -> NDArray[np.generic] | None:
    """Return the values [H, W] or [H, W, C] of an opened file with more than 8 bits per channel; None for other files.

    C is 3, or 4 with alpha of 16 bits.
    """
    if opened.mode.startswith("I") or opened.mode == "F":
        return np.asarray(opened)
    order = SWAPPED.get(raw_mode(opened))
    if order is None:
        return None
    high = np.asarray(opened).astype(np.uint16)
    with Image.open(path) as again:
        assert isinstance(again, ImageFile.ImageFile)
        again.tile = [
            tile._replace(args=(order, *tile.args[1:]) if isinstance(tile.args, tuple) else order)
            for tile in again.tile
        ]
        both: NDArray[np.generic] = high << 8 | np.asarray(again)
        return both


def raw_mode(opened: Image.Image) -> str:
    """Return how the pixels of an opened file are packed, before they are decoded: `RGB;16B`."""
    tiles = opened.tile if isinstance(opened, ImageFile.ImageFile) else []
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def levels(values: NDArray[np.generic], value_range: ValueRange) -> NDArray[np.uint8]:
    """Scale values to 256 levels; what lies outside of the range is clipped, and what is no number is the lowest."""
    low, high = value_range.bounds(is_float=values.dtype.kind == "f")
    scaled = (values.astype(np.float64) - low) / (high - low if high > low else np.inf)
    whole: NDArray[np.float64] = np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    return np.rint(whole * 255).astype(np.uint8)
