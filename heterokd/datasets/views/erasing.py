"""Random erasing: a rectangle of some views becomes black or random colours.

Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, https://arxiv.org/abs/1708.04896.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import STREAM_NOISE, Draws, between, between_log, random_words, to_device, view_key

# Area of an erased rectangle as a share of the view, and its side ratio, as in the paper.
ERASE_AREA = (0.02, 0.4)
ERASE_RATIO = (0.3, 1 / 0.3)


def erase(
    pixels: Tensor,
    policy: AugmentPolicy,
    seed: int,
    index: NDArray[np.int64],
    view: NDArray[np.int64] | int,
    draws: Draws,
) -> Tensor:
    """Erase a rectangle in some of the views [B, 3, H, W], in place.

    With `erasing_noise` every pixel of a rectangle gets a uniformly drawn colour: in a normalised image its variance is
    close to that of timm's normal noise.
    """
    area, ratio = between(draws["erase_area"], ERASE_AREA), between_log(draws["erase_ratio"], ERASE_RATIO)
    width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    left, top = draws["erase_x"] * (1 - width), draws["erase_y"] * (1 - height)
    chosen = np.flatnonzero(draws["erase"] < policy.erasing)
    if not len(chosen):
        return pixels
    inside = rectangles(
        left[chosen], top[chosen], (left + width)[chosen], (top + height)[chosen], (pixels.shape[2], pixels.shape[3])
    )
    places, erased = to_device(chosen, pixels.device), to_device(inside, pixels.device)
    some = pixels[places]
    if policy.erasing_noise:
        views = np.broadcast_to(view, len(index))[chosen]
        words = random_words(view_key(policy, seed), STREAM_NOISE, index[chosen], views)[:, 0]
        some = torch.where(erased, noise(words.astype(np.int64), some), some)
    else:
        some.masked_fill_(erased, 0.0)
    return pixels.index_copy_(0, places, some)


def rectangles(
    left: NDArray[np.float64],
    top: NDArray[np.float64],
    right: NDArray[np.float64],
    bottom: NDArray[np.float64],
    size: tuple[int, int],
) -> NDArray[np.bool_]:
    """Return the pixels [B, 1, h, w] whose centre is in a rectangle; the edges are shares of the sides."""
    down, across = ((np.arange(side) + 0.5) / side for side in size)
    columns = (across >= left[:, None]) & (across < right[:, None])
    rows = (down >= top[:, None]) & (down < bottom[:, None])
    return np.asarray(rows[:, None, :, None] & columns[:, None, None, :])


def noise(words: NDArray[np.int64], like: Tensor) -> Tensor:
    """Return random colours, uniform over 256 levels in [0, 1]; the same on every machine.

    Args:
        words: [B] 32-bit seeds of the images.
        like: views [B, 3, H, W] whose shape, type and device are used.
    """
    height, width = like.shape[2:]
    mask = 0xFFFFFFFF
    place = torch.arange(height * width, device=like.device).view(1, height, width)
    word = (to_device(words, like.device).view(-1, 1, 1) + place * 0x9E3779B9) & mask
    # A mixer of 32-bit words (degski's, with 7FEB352D and 846CA68B as by Chris Wellons, "Prospecting for hash
    # functions", 2018): the products may exceed 64 bits, but their low halves are exact.
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & mask
    word = ((word ^ (word >> 15)) * 0x846CA68B) & mask
    word = word ^ (word >> 16)
    return torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], dim=1).to(like.dtype).div_(255)
