"""Random erasing: one rectangle of some views turns black, or shows random colours.

Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, https://arxiv.org/abs/1708.04896.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import STREAM_NOISE, Draws, between, between_log, random_words, to_device, view_key

# The paper's share of the area and side ratio of an erased rectangle.
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
    """Views [B, 3, H, W] with one rectangle erased in some of them; the tensor given is changed.

    With `erasing_noise` every pixel of a rectangle gets a colour of its own, evenly drawn: once an image is normalised,
    that has nearly the spread of the normal noise which timm draws.
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
        views = view[chosen] if isinstance(view, np.ndarray) and view.ndim else view
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
    """[B, 1, h, w] which pixels have their middle in a rectangle; its edges are shares of the sides."""
    down, across = ((np.arange(side) + 0.5) / side for side in size)
    columns = (across >= left[:, None]) & (across < right[:, None])
    rows = (down >= top[:, None]) & (down < bottom[:, None])
    return np.asarray(rows[:, None, :, None] & columns[:, None, None, :])


def noise(words: NDArray[np.int64], like: Tensor) -> Tensor:
    """Random colours, even in [0, 1] at 256 levels: the same on every machine.

    Args:
        words: [B] the 32-bit word that each image's noise grows from.
        like: [B, 3, H, W] views.
    """
    height, width = like.shape[2:]
    mask = 0xFFFFFFFF
    place = torch.arange(height * width, device=like.device).view(1, height, width)
    word = (to_device(words, like.device).view(-1, 1, 1) + place * 0x9E3779B9) & mask
    # A mixer of 32-bit words (degski's, with 7FEB352D and 846CA68B as by Chris Wellons, "Prospecting for hash
    # functions", 2018): the products may pass 64 bits, but their low halves are right.
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & mask
    word = ((word ^ (word >> 15)) * 0x846CA68B) & mask
    word = word ^ (word >> 16)
    return torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], dim=1).to(like.dtype).div_(255)
