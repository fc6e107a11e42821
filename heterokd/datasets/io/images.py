"""Sources of images and label maps, read by position, and the arrays among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Limits of the images that are read at once.
READ_AT_ONCE = 512
READ_BYTES = 2**28
# Images are alike if no pixel differs by more levels of 255 than this.
ALIKE_LEVELS = 3


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


def source_of(images: Images) -> Images:
    """Return the images that a subset is selected from."""
    while isinstance(images, ChosenImages):
        images = images.images
    return images


def fitted_size(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width at which an image fits in a canvas; unchanged if it fits already."""
    scale = min(1.0, canvas[0] / height, canvas[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


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
