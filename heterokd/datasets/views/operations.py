"""RandAugment: random operations in a row, drawn for every view, on 256 levels per channel as in PIL.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", NeurIPS 2020,
https://arxiv.org/abs/1909.13719; the operations, their strengths and the probability of applying them follow timm's
`rand-...-inc1` (the effect of every operation grows with the magnitude). Geometric operations resample bilinearly, with
`FILL` outside the image.

Each operation is applied at once to all images of a batch that drew it. Operations that map levels to levels, per image
and channel, are a single table look-up; operations that move pixels are a single affine map.
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
# Index of the function that applies each operation, see `operate`; the last entry, -1, means none.
KINDS = np.array(
    [0 if name in TABLES else 1 if name in MOVES else 2 if name == "colour" else 3 for name in OPERATIONS] + [-1]
)

# Probability that a drawn operation is applied.
DONE = 0.5
# The largest magnitude, and the strengths of the operations at it.
LARGEST = 10.0
DEGREES, SHEAR, SHIFT, FACTOR, SOLARIZE_ADD = 30.0, 0.3, 0.45, 0.9, 110.0
# Level outside the image: middle grey, as in timm.
FILL = 128.0
# Weights of red, green and blue in PIL's grey, in 1 / 65536.
GREY_PARTS = (19595, 38470, 7471)


def operation_draws(
    policy: AugmentPolicy, seed: int, index: NDArray[np.int64], view: NDArray[np.int64] | int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw the operations of each view and their strengths.

    Returns:
        Indices in `OPERATIONS`, [B, operations], -1 for none, and magnitudes in [-1, 1], whose sign is the direction of
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
    """Apply their operations to views [B, 3, H, W] in [0, 1]; returns float32 with 256 levels."""
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
    """Return the weight of the view in an enhancement, float32 as in PIL: 0 is the plain image, 1 the view itself."""
    return np.maximum(0.1, 1 + FACTOR * magnitude).astype(np.float32)


def _look_up(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Replace every level [n, 3, H, W] by its entry in the table of its image and channel."""
    table = to_device(_fixed_tables(number, magnitude), levels.device)
    for name in ("auto_contrast", "equalize", "contrast"):  # tables that depend on the image
        chosen = np.flatnonzero(number == OPERATIONS.index(name))
        if len(chosen):
            places = to_device(chosen, levels.device)
            if name == "contrast":
                tables = _contrast_tables(levels[places], magnitude[chosen])
            else:
                tables = (_stretched if name == "auto_contrast" else _equalized)(_histogram(levels[places]))
            table.index_copy_(0, places, tables.to(torch.uint8))
    return table.flatten()[_places(levels)]


def _fixed_tables(number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return tables [n, 3, 256] of the operations that are the same for every image; identity for the others."""
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
    """Return the position of each level's entry [n, 3, H, W] in flattened tables [n, 3, 256]."""
    count = len(levels) * 3
    starts = torch.arange(0, count * 256, 256, device=levels.device, dtype=torch.int32).view(-1, 3, 1, 1)
    return levels + starts


def _histogram(levels: Tensor) -> Tensor:
    """Count the levels of each channel: [n, 3, H, W] -> int64 [n, 3, 256]."""
    places = _places(levels).flatten().long()
    counts = torch.zeros(len(levels) * 3 * 256, dtype=torch.int64, device=levels.device)
    return counts.scatter_add_(0, places, torch.ones_like(places)).view(-1, 3, 256)


def _stretched(histogram: Tensor) -> Tensor:
    """Return tables that map each channel's darkest level to 0 and its lightest to 255."""
    ramp = torch.arange(256, device=histogram.device, dtype=torch.float64)
    low = torch.where(histogram > 0, ramp, 256).amin(dim=2, keepdim=True)
    high = torch.where(histogram > 0, ramp, -1).amax(dim=2, keepdim=True)
    scale = 255 / (high - low).clamp(min=1)
    return torch.where(high > low, (ramp * scale - low * scale).trunc().clamp(0, 255), ramp)


def _equalized(histogram: Tensor) -> Tensor:
    """Return tables that equalise each channel's histogram."""
    ramp, held = torch.arange(256, device=histogram.device), histogram > 0
    lightest = torch.where(held, ramp, -1).amax(dim=2, keepdim=True)
    step = (histogram.sum(dim=2, keepdim=True) - histogram.gather(2, lightest)) // 255
    before = histogram.cumsum(dim=2) - histogram
    spread = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where((held.sum(dim=2, keepdim=True) > 1) & (step > 0), spread, ramp)


def _contrast_tables(levels: Tensor, magnitude: NDArray[np.float64]) -> Tensor:
    """Return tables that interpolate between the image's mean grey and the image, and beyond."""
    grey = _grey(levels)
    mean = (grey.flatten(1).sum(dim=1).double() / grey[0].numel() + 0.5).floor().float().view(-1, 1, 1)
    factor = to_device(_factor(magnitude), levels.device).view(-1, 1, 1)
    ramp = torch.arange(256, device=levels.device, dtype=torch.float32)
    return (mean + factor * (ramp - mean)).clamp(0, 255).floor().expand(-1, 3, -1)


def _grey(levels: Tensor) -> Tensor:
    """Return grey levels [n, 1, H, W], int32, rounded as in PIL."""
    parts = [levels[:, place : place + 1].int() * part for place, part in enumerate(GREY_PARTS)]
    return (parts[0] + parts[1] + parts[2] + 0x8000) >> 16


def _blended(plain: Tensor, levels: Tensor, magnitude: NDArray[np.float64]) -> Tensor:
    """Interpolate between a plain image and the image itself, and beyond."""
    factor = to_device(_factor(magnitude), levels.device).view(-1, 1, 1, 1)
    plain = plain.float()
    # Integer levels are exact in float32; the conversion to bytes truncates, as in PIL.
    return (levels.float().sub_(plain).mul_(factor).add_(plain)).clamp_(0, 255).to(torch.uint8)


def _saturate(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Interpolate between each pixel's grey and its colour, and beyond."""
    return _blended(_grey(levels), levels, magnitude)


def _sharpen(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Interpolate between the image smoothed over 3 x 3 pixels (centre weight 5; not at the border) and the image."""
    smooth = levels.clone()
    height, width = levels.shape[2:]
    if min(height, width) >= 3:
        whole = levels.to(torch.int16)
        rows = whole[:, :, :-2] + whole[:, :, 1:-1] + whole[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * whole[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = torch.div(total * 2 + 13, 26, rounding_mode="floor").to(torch.uint8)
    return _blended(smooth, levels, magnitude)


def _move(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Rotate around the centre, shear from the upper left corner, or translate."""
    height, width = levels.shape[2:]

    def only(name: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(number == OPERATIONS.index(name), value, 0.0)

    angle = only("rotate", np.deg2rad(DEGREES * magnitude))
    cos, sin = np.cos(angle), np.sin(angle)
    # In units of half a side: a shear moves a row by its distance from the top.
    shear_x = only("shear_x", SHEAR * magnitude * height / width)
    shear_y = only("shear_y", SHEAR * magnitude * width / height)
    shift_x, shift_y = only("translate_x", 2 * SHIFT * magnitude), only("translate_y", 2 * SHIFT * magnitude)
    to_x = (cos, -sin * height / width + shear_x, shear_x + shift_x)
    to_y = (sin * width / height + shear_y, cos, shear_y + shift_y)
    rows = np.stack((*to_x, *to_y))
    return resample(levels.float(), rows, FILL).round_().to(torch.uint8)
