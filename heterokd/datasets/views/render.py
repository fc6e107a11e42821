"""Views of images, and of images with their label maps."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.color import change_colours, plain_images
from heterokd.datasets.views.erasing import erase
from heterokd.datasets.views.geometry import affine_grid, crop_rows, filled, flip, outside, stays_inside, warp
from heterokd.datasets.views.operations import operate
from heterokd.datasets.views.padding import beyond_images, clamp_to_images, pixel_bounds, without_colour
from heterokd.datasets.views.policy import BLACK, NETWORK_MEAN, AugmentPolicy, Fill
from heterokd.datasets.views.random import view_draws
from heterokd.outputs import IGNORE


def view_images(
    images: Tensor,
    index: NDArray[np.int64],
    view: NDArray[np.int64] | int,
    policy: AugmentPolicy,
    seed: int = 0,
    *,
    is_cropped: bool = False,
) -> Tensor:
    """Render the given view of each image. With a policy that mixes images, `mix_views` makes mixed views of these.

    Args:
        images: [B, S, S, 3], uint8, or float in [0, 1]; on any device.
        index: [B] positions of the images in the training split.
        view: [B] view numbers, or one for all images.
        policy: augmentation policy.
        seed: seed of the views.
        is_cropped: whether the images are the views' crops already, see `photo_crops`.

    Returns:
        [B, 3, S, S] float32 in [0, 1]; with a policy that is off, exactly the images.
    """
    if not (policy.warps or policy.flip or policy.colours or policy.operations or policy.erasing):
        return plain_images(images)
    draws = view_draws(policy, seed, index, view)
    pixels = plain_images(images)
    if policy.flip:
        pixels = flip(pixels, np.flatnonzero(draws["flip"] < policy.flip))
    if policy.warps and not is_cropped:
        pixels = warp(pixels, policy, draws)
    if policy.operations:
        pixels = operate(pixels, policy, seed, index, view)
    if policy.colours:
        pixels = change_colours(pixels, images, policy, draws)
    if policy.erasing:
        pixels = erase(pixels, policy, seed, index, view, draws)
    return pixels


# Nine parameters: those of `view_images`, the label maps, the size of the crop, the padding and where it begins.
def view_scenes(
    images: Tensor,
    label_maps: Tensor,
    index: NDArray[np.int64],
    view: NDArray[np.int64] | int,
    policy: AugmentPolicy,
    size: tuple[int, int],
    seed: int = 0,
    fill: Fill = BLACK,
    extents: NDArray[np.int64] | None = None,
) -> tuple[Tensor, Tensor]:
    """Render the given view of each image with its label map: a crop of the canvas.

    A crop of area 1 has the scale of the canvas; with area 4, or a zoom of 0.5, the image is shown at half its size.
    Labels are those of the nearest pixel; outside the canvas, images have the colour `fill` and labels are IGNORE.
    RandAugment and mixing need images with one class: they are not applied here, and an experiment that sets them is
    refused.

    Args:
        images: [B, Hc, Wc, 3], uint8, or float in [0, 1]; on any device.
        label_maps: [B, Hc, Wc] class numbers.
        index: [B] positions of the images in the training split.
        view: [B] view numbers, or one for all images.
        policy: augmentation policy; `scale` is the area of the crop as a share of `size`, `zoom` enlarges the image.
        size: height and width of the views, in pixels.
        seed: seed of the views.
        fill: colour outside the canvas; with `NETWORK_MEAN`, pixels outside the image are NaN.
        extents: [B, 2] height and width of the images on the canvas; None: they fill it.

    Returns:
        Images [B, 3, h, w] float32 in [0, 1] and label maps [B, h, w] int64; exactly the given ones if the policy is
        off and the canvas has the size of the views.
    """
    draws = view_draws(policy, seed, index, view)
    pixels, labels = plain_images(images), label_maps[:, None]
    flipped = np.flatnonzero(draws["flip"] < policy.flip) if policy.flip else np.zeros(0, np.int64)
    if policy.flip:
        pixels, labels = flip(pixels, flipped), flip(labels, flipped)
    height, width = pixels.shape[2:]
    bounds = None if extents is None else pixel_bounds(extents, width, flipped)
    beyond: Tensor | None = None
    if policy.warps or (height, width) != size:
        rows = crop_rows(policy, draws, size, (size[0] / height, size[1] / width))
        grid = affine_grid(rows, size, pixels.device)
        if bounds is not None:
            grid, beyond = clamp_to_images(grid, bounds, (height, width))
        elif not stays_inside(rows, size):
            beyond = outside(grid)
        # Class numbers are below 256: exact in float32, the only type that can be sampled.
        nearest = F.grid_sample(labels.float(), grid, mode="nearest", padding_mode="border", align_corners=False)
        labels = nearest.to(torch.uint8)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    elif bounds is not None:
        beyond = beyond_images(bounds, size, pixels.device)
    if beyond is not None:
        labels = labels.masked_fill(beyond, IGNORE)
        pixels = pixels if fill == NETWORK_MEAN else filled(pixels, beyond, fill)
    if policy.colours:
        pixels = change_colours(pixels, images, policy, draws)
    if policy.erasing:
        pixels = erase(pixels, policy, seed, index, view, draws)
    if beyond is not None and fill == NETWORK_MEAN:  # no colour of the image changes that of the padding
        pixels = without_colour(pixels, beyond)
    return pixels, labels[:, 0].long()
