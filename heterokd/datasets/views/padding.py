"""Padding of images on a canvas: which pixels of a view show no image.

An image lies in the top left corner of its canvas, see `heterokd/datasets/io/label_maps.py`. Pixels of the padding are
NaN in images for networks: each network replaces them by the mean colour that it subtracts, so that padding is zero
after its normalisation, as in an exported network.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.random import to_device


def pixel_bounds(extents: NDArray[np.int64], width: int, flipped: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return left, right, top and bottom of images on their canvases, [4, B]; the ends are exclusive.

    Args:
        extents: [B, 2] height and width of the images, in pixels.
        width: of the canvas.
        flipped: positions of the images whose canvas is mirrored left and right.
    """
    left = np.zeros(len(extents), np.int64)
    left[flipped] = width - extents[flipped, 1]
    return np.stack((left, left + extents[:, 1], np.zeros_like(left), extents[:, 0]))


def beyond_images(bounds: NDArray[np.int64], size: tuple[int, int], device: torch.device) -> Tensor:
    """Return the pixels of canvases [Hc, Wc] that show no image, boolean [B, 1, Hc, Wc]; see `pixel_bounds`."""
    left, right, top, bottom = to_device(bounds, device)[:, :, None]
    rows, columns = (torch.arange(side, device=device) for side in size)
    across, down = (columns < left) | (columns >= right), (rows < top) | (rows >= bottom)
    beyond: Tensor = (across[:, None, :] | down[:, :, None])[:, None]
    return beyond


def clamp_to_images(grid: Tensor, bounds: NDArray[np.int64], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Move positions that are beyond their image to its nearest pixel, so that no colour of the canvas is sampled.

    Args:
        grid: [B, h, w, 2] positions of pixels on the canvas, in [-1, 1]; overwritten.
        bounds: see `pixel_bounds`.
        canvas: height and width, in pixels.

    Returns:
        The grid, and the positions that were beyond their image, boolean [B, 1, h, w].
    """
    beyond = torch.zeros(grid.shape[:3], dtype=torch.bool, device=grid.device)
    for axis, side, (first, end) in ((0, canvas[1], bounds[:2]), (1, canvas[0], bounds[2:])):
        low, high = (
            to_device((2 * edge / side - 1).astype(np.float32), grid.device)[:, None, None] for edge in (first, end)
        )
        positions = grid[..., axis]
        beyond |= (positions < low) | (positions > high)
        positions.copy_(positions.clamp(low + 1 / side, high - 1 / side))
    return grid, beyond[:, None]


def without_colour(images: Tensor, beyond: Tensor) -> Tensor:
    """Return images [B, 3, H, W] whose pixels in the padding [B, 1, H, W] are NaN."""
    return images.masked_fill(beyond, math.nan)
