"""RandAugment: a few operations in a row, drawn anew for every view, on 256 levels a channel as PIL has them.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", NeurIPS 2020,
https://arxiv.org/abs/1909.13719; the list of operations, their strengths and the half of them that is left out follow
timm's `rand-...-inc1` (every operation grows with the magnitude). Positions are resampled bilinearly, and what comes
from outside is `FILL`.

Each operation is done to all images of a batch that drew it at once. Whatever maps a level to a level, image by image
and channel by channel, is one look into a table; what moves pixels is one affine map.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.geometry import resample
from heterokd.datasets.views.policy import AugmentPolicy
from heterokd.datasets.views.random import STREAM_OPERATION, random_words, to_device, uniform, view_key

OPERATIONS = (
    *("auto_contrast", "equalize", "invert", "rotate", "posterize"),
    *("solarize", "solarize_add", "colour", "contrast", "brightness"),
    *("sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
TABLES = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "contrast", "brightness")
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# What does each operation; the last entry, -1, is for none.
KINDS = np.array(
    [0 if name in TABLES else 1 if name in MOVES else 2 if name == "colour" else 3 for name in OPERATIONS] + [-1]
)

# An operation that was drawn is done with this probability.
DONE = 0.5
# What the largest magnitude, 10, means.
LARGEST = 10.0
DEGREES, SHEAR, SHIFT, FACTOR, SOLARIZE_ADD = 30.0, 0.3, 0.45, 0.9, 110.0
# Level of what comes from outside the image: middle grey, as timm's.
FILL = 128.0
# Weights of red, green and blue in PIL's grey, in 1 / 65536.
GREY_PARTS = (19595, 38470, 7471)


def operation_draws(
    policy: AugmentPolicy, seed: int, index: NDArray[np.int64], view: NDArray[np.int64] | int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which operations each view gets and how strong they are.

    Returns:
        Places in `OPERATIONS`, [B, operations], -1 where none is done, and magnitudes in [-1, 1], whose sign matters to
        operations with two directions.
    """
    words = random_words(view_key(policy, seed), STREAM_OPERATION, index, view, blocks=policy.operations)
    which, done, level, sign = np.moveaxis(uniform(words).reshape(len(index), policy.operations, 4), 2, 0)
    normal = torch.special.ndtri(torch.from_numpy(np.ascontiguousarray(level))).numpy()
    magnitude = np.clip(policy.magnitude + policy.magnitude_std * normal, 0, LARGEST) / LARGEST
    number = np.where(done < DONE, np.floor(which * len(OPERATIONS)), -1).astype(np.int64)
    return number, np.where(sign < 0.5, -magnitude, magnitude)


def operate(
    pixels: Tensor, policy: AugmentPolicy, seed: int, index: NDArray[np.int64], view: NDArray[np.int64] | int
) -> Tensor:
    """Views [B, 3, H, W] in [0, 1] after their operations: float32 at 256 levels."""
    levels = (pixels * 255).round_().to(torch.uint8)
    numbers, magnitudes = operation_draws(policy, seed, index, view)
    for number, magnitude in zip(numbers.T, magnitudes.T, strict=True):
        for kind, change in enumerate((_look_up, _move, _saturate, _sharpen)):
            chosen = np.flatnonzero(KINDS[number] == kind)
            if len(chosen):
                places = to_device(chosen, levels.device)
                levels.index_copy_(0, places, change(levels[places], number[chosen], magnitude[chosen]))
    return levels.float().div_(255)


def _factor(magnitude: NDArray[np.float64]) -> NDArray[np.float32]:
    """How far from the plainer image an enhancement goes: 0 is that image, 1 the view itself; float32 as in PIL."""
    return np.maximum(0.1, 1 + FACTOR * magnitude).astype(np.float32)


def _look_up(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Every level [n, 3, H, W] replaced by what the table of its image and channel says."""
    table = to_device(_fixed_tables(number, magnitude), levels.device)
    for name in ("auto_contrast", "equalize", "contrast"):  # these depend on the image
        chosen = np.flatnonzero(number == OPERATIONS.index(name))
        if len(chosen):
            places = to_device(chosen, levels.device)
            some = levels[places]
            if name == "contrast":
                tables = _contrast_tables(some, magnitude[chosen])
            else:
                tables = (_stretched if name == "auto_contrast" else _equalized)(_histogram(some))
            table.index_copy_(0, places, tables.to(torch.uint8))
    return table.flatten()[_places(levels)]


def _fixed_tables(number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Tables [n, 3, 256] of the operations that are the same for every image; others leave the levels alone."""
    strength, ramp = np.abs(magnitude)[:, None], np.arange(256.0)
    step = 2 ** (4 + np.floor(strength * 4))  # 4 to 0 bits are kept
    brightness = np.floor(np.clip(ramp.astype(np.float32) * _factor(magnitude)[:, None], 0, 255))
    results = {
        "invert": 255 - ramp,
        "posterize": np.floor(ramp / step) * step,
        "solarize": np.where(ramp < 256 - np.floor(strength * 256), ramp, 255 - ramp),
        "solarize_add": np.where(ramp < 128, np.minimum(255, ramp + np.floor(strength * SOLARIZE_ADD)), ramp),
        "brightness": brightness,
    }
    table = np.broadcast_to(ramp, (len(number), 256))
    for name, result in results.items():
        table = np.where((number == OPERATIONS.index(name))[:, None], result, table)
    return np.repeat(table.astype(np.uint8)[:, None], 3, axis=1)


def _places(levels: Tensor) -> Tensor:
    """Where the entry of each level [n, 3, H, W] stands in tables [n, 3, 256] laid end to end."""
    count = len(levels) * 3
    starts = torch.arange(0, count * 256, 256, device=levels.device, dtype=torch.int32).view(-1, 3, 1, 1)
    return levels + starts


def _histogram(levels: Tensor) -> Tensor:
    """How often each level comes in each channel: int64 [n, 3, 256] of [n, 3, H, W]."""
    places = _places(levels).flatten().long()
    counts = torch.zeros(len(levels) * 3 * 256, dtype=torch.int64, device=levels.device)
    return counts.scatter_add_(0, places, torch.ones_like(places)).view(-1, 3, 256)


def _stretched(histogram: Tensor) -> Tensor:
    """Tables that bring each channel's darkest level to 0 and its lightest to 255."""
    ramp = torch.arange(256, device=histogram.device, dtype=torch.float64)
    low = torch.where(histogram > 0, ramp, 256).amin(dim=2, keepdim=True)
    high = torch.where(histogram > 0, ramp, -1).amax(dim=2, keepdim=True)
    scale = 255 / (high - low).clamp(min=1)
    return torch.where(high > low, (ramp * scale - low * scale).trunc().clamp(0, 255), ramp)


def _equalized(histogram: Tensor) -> Tensor:
    """Tables that spread each channel's levels evenly."""
    ramp, held = torch.arange(256, device=histogram.device), histogram > 0
    lightest = torch.where(held, ramp, -1).amax(dim=2, keepdim=True)
    step = (histogram.sum(dim=2, keepdim=True) - histogram.gather(2, lightest)) // 255
    before = histogram.cumsum(dim=2) - histogram
    spread = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where((held.sum(dim=2, keepdim=True) > 1) & (step > 0), spread, ramp)


def _contrast_tables(levels: Tensor, magnitude: NDArray[np.float64]) -> Tensor:
    """Tables that go towards and beyond the image's mean grey."""
    grey = _grey(levels)
    mean = (grey.flatten(1).sum(dim=1).double() / grey[0].numel() + 0.5).floor().float().view(-1, 1, 1)
    factor = to_device(_factor(magnitude), levels.device).view(-1, 1, 1)
    ramp = torch.arange(256, device=levels.device, dtype=torch.float32)
    return (mean + factor * (ramp - mean)).clamp(0, 255).floor().expand(-1, 3, -1)


def _grey(levels: Tensor) -> Tensor:
    """Grey levels [n, 1, H, W] as PIL rounds them, int32."""
    parts = [levels[:, place : place + 1].int() * part for place, part in enumerate(GREY_PARTS)]
    return (parts[0] + parts[1] + parts[2] + 0x8000) >> 16


def _blended(plain: Tensor, levels: Tensor, magnitude: NDArray[np.float64]) -> Tensor:
    """From the plainer image towards and beyond the image itself."""
    factor = to_device(_factor(magnitude), levels.device).view(-1, 1, 1, 1)
    plain = plain.float()
    # Whole levels in float32: the difference is exact, and a cut to bytes is a cut to whole ones.
    return (levels.float().sub_(plain).mul_(factor).add_(plain)).clamp_(0, 255).to(torch.uint8)


def _saturate(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Towards and beyond the pixel's own grey."""
    return _blended(_grey(levels), levels, magnitude)


def _sharpen(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Towards and beyond the image smoothed by 3 x 3 pixels, the middle one five times; the border stays."""
    smooth = levels.clone()
    height, width = levels.shape[2:]
    if min(height, width) >= 3:
        whole = levels.to(torch.int16)
        rows = whole[:, :, :-2] + whole[:, :, 1:-1] + whole[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * whole[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = torch.div(total * 2 + 13, 26, rounding_mode="floor").to(torch.uint8)
    return _blended(smooth, levels, magnitude)


def _move(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Turn about the middle, slant from the upper left corner, or shift."""
    height, width = levels.shape[2:]

    def only(name: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(number == OPERATIONS.index(name), value, 0.0)

    angle = only("rotate", np.deg2rad(DEGREES * magnitude))
    cos, sin = np.cos(angle), np.sin(angle)
    # In units of half a side: a slant that moves a row by its distance from the top.
    slant_x = only("shear_x", SHEAR * magnitude * height / width)
    slant_y = only("shear_y", SHEAR * magnitude * width / height)
    shift_x, shift_y = only("translate_x", 2 * SHIFT * magnitude), only("translate_y", 2 * SHIFT * magnitude)
    rows = np.stack(
        (
            cos,
            -sin * height / width + slant_x,
            slant_x + shift_x,
            sin * width / height + slant_y,
            cos,
            slant_y + shift_y,
        )
    )
    return resample(levels.float(), rows, FILL).round_().to(torch.uint8)
