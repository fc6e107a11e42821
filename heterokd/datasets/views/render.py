"""Views of images, and of images with their label maps."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.color import change_colours, plain_images
from heterokd.datasets.views.erasing import erase
from heterokd.datasets.views.geometry import (
    affine_grid,
    crop_rows,
    crop_share,
    filled,
    flip,
    outside,
    stays_inside,
    warp,
)
from heterokd.datasets.views.operations import operate
from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import as_numbers, view_draws
from heterokd.outputs import IGNORE


def view_images(
    images: Tensor,
    index: NDArray[np.int64] | Tensor,
    view: NDArray[np.int64] | Tensor | int,
    policy: AugmentPolicy,
    seed: int = 0,
) -> Tensor:
    """The given view of each image.

    Args:
        images: [B, S, S, 3], uint8, or float in [0, 1]; on any device.
        index: [B] the images' positions in the training split.
        view: [B] view numbers, or one for all.
        policy: how views differ.
        seed: other views of the same policy.

    Returns:
        [B, 3, S, S] float32 in [0, 1]; with a policy that is off, the images to the last bit.

    Raises:
        ValueError: the policy mixes images: such a view is made of two, as `TrainLoader.views_of` does.
    """
    if policy.mixes:
        raise ValueError("the policy mixes images, and a view of it is made of two; take TrainLoader.views_of")
    return unmixed_views(images, index, view, policy, seed)


def unmixed_views(
    images: Tensor,
    index: NDArray[np.int64] | Tensor,
    view: NDArray[np.int64] | Tensor | int,
    policy: AugmentPolicy,
    seed: int = 0,
) -> Tensor:
    """As `view_images`, of any policy: what `mix_views` makes mixed views of."""
    if not (policy.warps or policy.flip or policy.colours or policy.operations or policy.erasing):
        return plain_images(images)
    index, view = as_numbers(index), as_numbers(view)
    draws = view_draws(policy, seed, index, view)
    pixels = plain_images(images)
    if policy.flip:
        pixels = flip(pixels, np.flatnonzero(draws["flip"] < policy.flip))
    if policy.warps:
        pixels = warp(pixels, policy, draws)
    if policy.operations:
        pixels = operate(pixels, policy, seed, index, view)
    if policy.colours:
        pixels = change_colours(pixels, images, policy, draws)
    if policy.erasing:
        pixels = erase(pixels, policy, seed, index, view, draws)
    return pixels


def view_scenes(
    images: Tensor,
    label_maps: Tensor,
    index: NDArray[np.int64] | Tensor,
    view: NDArray[np.int64] | Tensor | int,
    policy: AugmentPolicy,
    size: tuple[int, int],
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The given view of each image with its label map: a crop of the canvas.

    A crop of area 1 has the canvas's own scale; at area 4 the image is shown at half its size. Labels are those of the
    nearest pixel; what lies outside the canvas is black and counts nowhere. RandAugment and mixing are for images with
    one class: they are not done here, and an experiment that sets them is refused.

    Args:
        images: [B, Hc, Wc, 3], uint8, or float in [0, 1]; on any device.
        label_maps: [B, Hc, Wc] class numbers.
        index: [B] the images' positions in the training split.
        view: [B] view numbers, or one for all.
        policy: how views differ; `scale` is the crop's area as a share of `size`'s.
        size: height and width of the views, in pixels.
        seed: other views of the same policy.

    Returns:
        Images [B, 3, h, w] float32 in [0, 1] and label maps [B, h, w] int64. Where the policy is off and the canvas
        has the view's size, both are the given ones to the last bit.
    """
    index, view = as_numbers(index), as_numbers(view)
    draws = view_draws(policy, seed, index, view)
    pixels, labels = plain_images(images), label_maps[:, None]
    if policy.flip:
        flipped = np.flatnonzero(draws["flip"] < policy.flip)
        pixels, labels = flip(pixels, flipped), flip(labels, flipped)
    if policy.warps or tuple(pixels.shape[-2:]) != size:
        rows = crop_rows(policy, draws, size, crop_share(pixels, size))
        grid = affine_grid(rows, size, pixels.device)
        # Class numbers are below 256: exact in float32, the only kind that can be sampled.
        nearest = F.grid_sample(labels.float(), grid, mode="nearest", padding_mode="border", align_corners=False)
        labels = nearest.to(torch.uint8)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
        if not stays_inside(rows, size):
            beyond = outside(grid)
            labels, pixels = labels.masked_fill_(beyond, IGNORE), filled(pixels, beyond, 0.0)
    if policy.colours:
        pixels = change_colours(pixels, images, policy, draws)
    if policy.erasing:
        pixels = erase(pixels, policy, seed, index, view, draws)
    return pixels, labels[:, 0].long()
