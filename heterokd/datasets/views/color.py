"""Colour augmentation: brightness, contrast, saturation, hue."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import Draws, spread, to_device

# Luma of ITU-R BT.601, as PIL's grey conversion.
GREY = (0.299, 0.587, 0.114)


def plain_images(images: Tensor) -> Tensor:
    """Convert images [B, S, S, 3], uint8 or float in [0, 1], to the networks' [B, 3, S, S] float32 in [0, 1]."""
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(255) if images.dtype == torch.uint8 else planes


def column(values: NDArray[np.float64] | NDArray[np.bool_], like: Tensor) -> Tensor:
    """Return one value per image as [B, 1, 1, 1] on the images' device."""
    dtype = np.bool_ if values.dtype == np.bool_ else np.float32
    return to_device(values.astype(dtype), like.device).view(-1, 1, 1, 1)


def change_colours(pixels: Tensor, images: Tensor, policy: AugmentPolicy, draws: Draws) -> Tensor:
    """Change brightness, contrast (around the whole image's mean grey), saturation and hue, in this order.

    Args:
        pixels: [B, 3, h, w] float in [0, 1].
        images: [B, H, W, 3] images of which `pixels` are crops.
        policy: augmentation policy.
        draws: see `view_draws`.
    """
    if policy.brightness or policy.contrast or policy.saturation:
        brightness = column(1 + spread(draws["brightness"], policy.brightness), pixels)
        contrast = column(1 + spread(draws["contrast"], policy.contrast), pixels)
        offset = mean_grey(images) * brightness * (1 - contrast)
        pixels = (pixels * (brightness * contrast)).add_(offset).clamp_(0, 1)
    if policy.saturation:
        saturation = column(1 + spread(draws["saturation"], policy.saturation), pixels)
        grey = pixels[:, 0:1] * GREY[0] + pixels[:, 1:2] * GREY[1] + pixels[:, 2:3] * GREY[2]
        pixels = (pixels * saturation).add_(grey.mul_(1 - saturation)).clamp_(0, 1)
    if policy.hue:
        pixels = turn_hue(pixels, column(spread(draws["hue"], policy.hue), pixels))
    return pixels


def mean_grey(images: Tensor) -> Tensor:
    """Compute the mean grey [B, 1, 1, 1], in [0, 1], of images [B, H, W, 3]."""
    # Integers have the same sum in any order, so the mean does not depend on the batch. The sum of a column is exact in
    # float32.
    levels = images.float() if images.dtype == torch.uint8 else (images * 255).round_()
    sums = levels.sum(dim=1).sum(dim=1, dtype=torch.float64)
    parts = [sums[:, channel] * part / (255 * images[0, :, :, 0].numel()) for channel, part in enumerate(GREY)]
    return (parts[0] + parts[1] + parts[2]).float().view(-1, 1, 1, 1)


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of images [B, 3, H, W] in [0, 1] by `turns` [B, 1, 1, 1] of a full circle."""
    red, green, blue = pixels[:, 0:1], pixels[:, 1:2], pixels[:, 2:3]
    value = pixels.amax(dim=1, keepdim=True)
    chroma = value - pixels.amin(dim=1, keepdim=True)
    divisor = chroma.clamp(min=1e-12)  # a grey pixel has no hue, and its chroma of 0 cancels any
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sector = sector + turns * 6
    # Each channel is the value minus 0 to 1 times the chroma, depending on the hue.
    starts = to_device(np.array((5, 3, 1), np.float32), pixels.device).view(1, 3, 1, 1)
    place = torch.remainder(starts + sector, 6)
    return (value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)).clamp_(0, 1)
