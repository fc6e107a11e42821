"""Sources of images and label maps, read by position, and the arrays among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from heterokd.errors import DataError

# Limits of the images that are read at once.
READ_AT_ONCE = 512
READ_BYTES = 2**28
# Images are alike if no pixel differs by more levels of 255 than this from the first of them.
ALIKE_LEVELS = 3
# A data set in which more than this share of the images is alike is refused.
ALIKE_SHARE = 0.9


class Images(Protocol):
    """Images, or label maps of segmentation, that are read by position."""

    def __len__(self) -> int: ...

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read images [B, H, W, 3] at `index` [B], or label maps [B, H, W] with 255 for ignored pixels, as a new array.

        Raises:
            DataError: a file is damaged, missing, or a label map that does not fit its image; names the file.
        """
        ...


class OwnLabels(Protocol):
    """Label maps at their own size, before they were fitted to the canvas; read by position."""

    def read(self, position: int) -> NDArray[np.uint8]:
        """Read a label map [H, W], 255 for ignored pixels.

        Raises:
            DataError: the file is damaged, missing, or holds a value that is no class; names the file.
        """
        ...

    def chosen(self, index: NDArray[np.int64]) -> OwnLabels:
        """Select the label maps at `index`; positions start at 0 again."""
        ...


class Extents(Protocol):
    """Height and width of images on their canvas, before it is padded; read by position."""

    def read(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the heights and widths [B, 2] of the images at `index` [B], in pixels of the canvas.

        Raises:
            DataError: a file is damaged or missing; names the file.
        """
        ...

    def chosen(self, index: NDArray[np.int64]) -> Extents:
        """Select the images at `index`; positions start at 0 again."""
        ...


class ArrayImages:
    """Images [N, H, W, 3] or label maps [N, H, W] in memory, uint8."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the images or label maps at `index` [B] into a new array."""
        chosen: NDArray[np.uint8] = self.array[index]
        return chosen


class ResizedImages:
    """Images in memory, [N, H, W, 3] uint8, resized when they are read."""

    def __init__(self, array: NDArray[np.uint8], image_size: int) -> None:
        self.array, self.image_size = array, image_size
        self.array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the images at `index` [B] into a new array [B, S, S, 3], resized bilinearly with antialiasing."""
        import torch  # lazily: experiments are checked without torch
        import torch.nn.functional as F

        size = (self.image_size, self.image_size)
        planes = torch.from_numpy(self.array[index]).permute(0, 3, 1, 2)
        resized = F.interpolate(planes, size, mode="bilinear", antialias=True)
        return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())


class ChosenImages:
    """A subset of images or label maps, in a given order."""

    def __init__(self, images: Images, index: NDArray[np.int64]) -> None:
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the images or label maps at `index` [B] into a new array."""
        return self.images.read(self.index[index])


class JoinedImages:
    """Images of equal size from two sources, the second after the first."""

    def __init__(self, first: Images, second: Images) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the images at `index` [B] into a new array."""
        return self.merged(index, lambda images, chosen, _: images.read(chosen))

    def merged(
        self,
        index: NDArray[np.int64],
        read: Callable[[Images, NDArray[np.int64], NDArray[np.bool_]], NDArray[np.uint8]],
    ) -> NDArray[np.uint8]:
        """Read the images at `index` [B] by a function of a source, positions in it, and their places [B]."""
        is_first = index < len(self.first)
        if is_first.all():
            return read(self.first, index, is_first)
        second = read(self.second, index[~is_first] - len(self.first), ~is_first)
        if not is_first.any():
            return second
        pixels = np.empty((len(index), *second.shape[1:]), np.uint8)
        pixels[is_first], pixels[~is_first] = read(self.first, index[is_first], is_first), second
        return pixels


def join(first: Images, second: Images) -> Images:
    """Return the images of two sources; a subset of the source if both are chosen from the same."""
    source = source_of(first)
    if source is not source_of(second):
        return JoinedImages(first, second)
    parts = [positions_in_source(images, np.arange(len(images))) for images in (first, second)]
    return ChosenImages(source, np.concatenate(parts))


def source_of(images: Images) -> Images:
    """Return the images that a subset is selected from."""
    while isinstance(images, ChosenImages):
        images = images.images
    return images


def fitted_size(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width at which an image fits in a canvas; unchanged if it fits already."""
    scale = min(1.0, canvas[0] / height, canvas[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def placed_size(height: int, width: int, canvas: tuple[int, int], drawn_at: int | None = None) -> tuple[int, int]:
    """Return the height and width of an image on a canvas: `fitted_size`, but enlarged with the canvas.

    Args:
        height: of the image, in pixels.
        width: of the image.
        canvas: height and width.
        drawn_at: height of another canvas, on which the image covers the same part; None: this canvas.
    """
    if drawn_at is None:
        return fitted_size(height, width, canvas)
    factor = canvas[0] / drawn_at
    rows, columns = fitted_size(height, width, (drawn_at, round(canvas[1] / factor)))
    return min(canvas[0], max(1, round(rows * factor))), min(canvas[1], max(1, round(columns * factor)))


def sources_of(images: Images) -> tuple[Images, ...]:
    """Return all sources that images are joined and selected from."""
    source = source_of(images)
    if isinstance(source, JoinedImages):
        return (*sources_of(source.first), *sources_of(source.second))
    return (source,)


def positions_in_source(images: Images, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions in `source_of(images)` of the images at `index`."""
    while isinstance(images, ChosenImages):
        index, images = images.index[index], images.images
    return index


def image_shape(images: Images) -> tuple[int, ...]:
    """Return the shape of an image, which all images of a source share; reads the first image."""
    return images.read(np.zeros(1, np.int64)).shape[1:]


def read_pieces(images: Images, index: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Yield the images at `index`: first a single one, then a few hundred at a time, as its size allows."""
    start, count = 0, 1
    while start < len(index):
        pixels = images.read(index[start : start + count])
        yield pixels
        start += count
        count = max(1, min(READ_AT_ONCE, READ_BYTES // pixels[0].nbytes))


def images_alike(pieces: Iterable[NDArray[np.uint8]]) -> int:
    """Return how many images are like the first, or like the first that is not: the larger number of the two."""
    examples: list[NDArray[np.int16]] = []
    counts = [0, 0]
    for pixels in pieces:
        for image in pixels.astype(np.int16):
            place = next((i for i, seen in enumerate(examples) if np.abs(image - seen).max() <= ALIKE_LEVELS), None)
            if place is not None:
                counts[place] += 1
            elif len(examples) < len(counts):
                examples.append(image)
                counts[len(examples) - 1] = 1
    return max(counts)


def refuse_alike(alike: int, count: int) -> None:
    """Raise DataError if nearly all of `count` training images are alike."""
    if alike > max(1, ALIKE_SHARE * count):
        raise DataError(
            f"data.root: {alike} of {count} training images are alike after reading, nothing can be "
            "learned from them; look at the files, and at data.background and data.value_range"
        )
