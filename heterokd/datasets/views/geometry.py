"""Geometric augmentation: crop, rotation and shift in a single bilinear resampling."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.policy import AugmentPolicy, Fill
from heterokd.datasets.views.random import Draws, between, between_log, spread, to_device

# A position that is closer to the centre than the border by this much is inside after any rounding.
ROUNDING = 1e-5


def flip(pixels: Tensor, chosen: NDArray[np.int64]) -> Tensor:
    """Mirror the images at some positions of [B, C, H, W] left and right."""
    places = to_device(chosen, pixels.device)
    return pixels.index_copy(0, places, pixels[places].flip(3))


def warp(pixels: Tensor, policy: AugmentPolicy, draws: Draws) -> Tensor:
    """Crop, rotate and shift images [B, C, H, W] in a single bilinear resampling; black outside the image."""
    size = (pixels.shape[2], pixels.shape[3])
    return resample(pixels, crop_rows(policy, draws, size, (1.0, 1.0)), 0.0)


def resample(pixels: Tensor, rows: NDArray[np.float64], fill: float) -> Tensor:
    """Apply affine maps, see `affine_grid`, to images [B, C, H, W]; bilinear, `fill` outside the image."""
    size = (pixels.shape[2], pixels.shape[3])
    grid = affine_grid(rows, size, pixels.device)
    moved = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved if stays_inside(rows, size) else filled(moved, outside(grid), fill)


def filled(pixels: Tensor, places: Tensor, fill: float | Fill) -> Tensor:
    """Fill some places [B, 1, H, W] of images [B, C, H, W] in place, with a level or a colour."""
    # Ten times faster than `masked_fill_` with a mask that is broadcast over channels.
    pixels.mul_(~places)
    if isinstance(fill, float):
        return pixels.add_(places, alpha=fill) if fill else pixels
    if any(fill):
        for channel, level in enumerate(fill):
            pixels[:, channel].add_(places[:, 0], alpha=level)
    return pixels


def stays_inside(rows: NDArray[np.float64], size: tuple[int, int]) -> bool:
    """Return whether no pixel of any view comes from outside its image, as with most crops; False if uncertain."""
    u, v = 1 - 1 / size[1], 1 - 1 / size[0]
    xx, xy, x0, yx, yy, y0 = np.abs(rows)
    return bool((np.maximum(xx * u + xy * v + x0, yx * u + yy * v + y0) < 1 - ROUNDING).all())


def outside(grid: Tensor) -> Tensor:
    """Return the positions [B, 1, h, w] of views that are outside their image."""
    return (torch.maximum(grid[..., 0].abs(), grid[..., 1].abs()) > 1)[:, None]


def crop_rows(
    policy: AugmentPolicy, draws: Draws, size: tuple[int, int], share: tuple[float, float]
) -> NDArray[np.float64]:
    """Return the affine map from each view to its image, [6, B]: see `affine_grid`.

    With u the position in the view and x in the image, both in [-1, 1]:   x = centre + diag(w, h) R(angle) u
    (if a view's sides differ, R rotates in units of pixels, not of half sides).

    Args:
        policy: augmentation policy.
        draws: see `view_draws`.
        size: height and width of the views.
        share: height and width of an unscaled crop as shares of the image.
    """
    area, ratio = between(draws["scale"], policy.scale), between_log(draws["ratio"], policy.ratio)
    width, height = share[1] * np.sqrt(area * ratio), share[0] * np.sqrt(area / ratio)
    if share == (1.0, 1.0):
        # A long crop of nearly the whole area would exceed the image: it is cut at the border.
        width, height = (np.where(area <= 1, np.minimum(side, 1), side) for side in (width, height))
    if policy.zoom != (1.0, 1.0):
        zoom = between(draws["scale"], policy.zoom)
        width, height = width / zoom, height / zoom
    angle = np.deg2rad(spread(draws["rotation"], policy.rotation))
    shift = 2 * policy.translate  # the image is 2 units wide
    centre_x = spread(draws["crop_x"], 1) * np.abs(1 - width) + spread(draws["translate_x"], shift)
    centre_y = spread(draws["crop_y"], 1) * np.abs(1 - height) + spread(draws["translate_y"], shift)
    cos, sin = np.cos(angle), np.sin(angle)
    # A rotation keeps right angles only if both axes have the same unit.
    aspect = size[0] / size[1]
    return np.stack((width * cos, -width * sin * aspect, centre_x, height * sin / aspect, height * cos, centre_y))


def photo_crops(policy: AugmentPolicy, draws: Draws) -> NDArray[np.float64]:
    """Return area, ratio, x and y of the crop of each view, [4, B]: as of `crop_rows`, but of a photo of any shape."""
    area, ratio = between(draws["scale"], policy.scale), between_log(draws["ratio"], policy.ratio)
    return np.stack((area, ratio, draws["crop_x"], draws["crop_y"]))


def affine_grid(rows: NDArray[np.float64], size: tuple[int, int], device: torch.device) -> Tensor:
    """Return positions [B, h, w, 2] in [-1, 1]: x = xx u + xy v + x0, y = yx u + yy v + y0 of each pixel (u, v).

    Args:
        rows: xx, xy, x0, yx, yy, y0: [6, B].
        size: h and w.
        device: device of the grid.
    """
    xx, xy, x0, yx, yy, y0 = to_device(rows.astype(np.float32), device).unsqueeze(2)
    u, v = ((torch.arange(side, device=device, dtype=torch.float32) * 2 + 1) / side - 1 for side in size[::-1])
    # Elementwise, because a batched matrix product may round differently for another batch size.
    grid = torch.empty(rows.shape[1], *size, 2, device=device)
    torch.add((xy * v + x0)[:, :, None], (xx * u)[:, None, :], out=grid[..., 0])
    torch.add((yy * v + y0)[:, :, None], (yx * u)[:, None, :], out=grid[..., 1])
    return grid
