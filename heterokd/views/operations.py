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

from heterokd.views.draws import STREAM_OPERATION, random_words, uniform, view_key
from heterokd.views.geometry import affine_grid, resample
from heterokd.views.policy import AugmentPolicy

OPERATIONS = (
    *("auto_contrast", "equalize", "invert", "rotate", "posterize"),
    *("solarize", "solarize_add", "colour", "contrast", "brightness"),
    *("sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
TABLES = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "contrast", "brightness")
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")

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
        for names, change in ((TABLES, _look_up), (MOVES, _move), (("colour",), _saturate), (("sharpness",), _sharpen)):
            chosen = np.flatnonzero(np.isin(number, [OPERATIONS.index(name) for name in names]))
            if len(chosen):
                places = torch.from_numpy(chosen).to(levels.device)
                changed = change(levels[places], number[chosen], magnitude[chosen])
                levels.index_copy_(0, places, changed)
    return levels.float().div_(255)


def _factor(magnitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far from the plainer image an enhancement goes: 0 is that image, 1 the view itself."""
    return np.maximum(0.1, 1 + FACTOR * magnitude)


def _look_up(levels: Tensor, number: NDArray[np.int64], magnitude: NDArray[np.float64]) -> Tensor:
    """Every level [n, 3, H, W] replaced by what its image's table says."""
    table = np.broadcast_to(np.arange(256, dtype=np.float64), (len(number), 3, 256)).copy()
    strength = np.abs(magnitude)

    def those(name: str) -> NDArray[np.int64]:
        return np.flatnonzero(number == OPERATIONS.index(name))

    def histogram(some: NDArray[np.int64]) -> NDArray[np.int64]:
        return _histogram(levels[torch.from_numpy(some).to(levels.device)]).cpu().numpy()

    ramp = np.arange(256, dtype=np.float64)
    if len(some := those("auto_contrast")):
        table[some] = _stretched(histogram(some))
    if len(some := those("equalize")):
        table[some] = _equalized(histogram(some))
    if len(some := those("invert")):
        table[some] = 255 - ramp
    if len(some := those("posterize")):
        bits = 4 - np.floor(strength[some] * 4)
        table[some] = (np.floor(ramp / 2 ** (8 - bits[:, None])) * 2 ** (8 - bits[:, None]))[:, None]
    if len(some := those("solarize")):
        threshold = 256 - np.minimum(256, np.floor(strength[some] * 256))
        table[some] = np.where(ramp < threshold[:, None], ramp, 255 - ramp)[:, None]
    if len(some := those("solarize_add")):
        added = np.minimum(128, np.floor(strength[some] * SOLARIZE_ADD))
        table[some] = np.where(ramp < 128, np.minimum(255, ramp + added[:, None]), ramp)[:, None]
    if len(some := those("brightness")):
        table[some] = _blend(0.0, ramp, _factor(magnitude[some])[:, None])[:, None]
    if len(some := those("contrast")):
        grey = _grey(levels[torch.from_numpy(some).to(levels.device)])
        mean = grey.flatten(1).sum(dim=1).double().cpu().numpy() / grey[0].numel()
        table[some] = _blend(np.floor(mean + 0.5)[:, None], ramp, _factor(magnitude[some])[:, None])[:, None]
    tables = torch.from_numpy(table.astype(np.uint8)).to(levels.device)
    starts = torch.arange(0, tables.numel(), 256, device=levels.device, dtype=torch.int32).view(-1, 3, 1, 1)
    return tables.flatten()[levels + starts]


def _histogram(levels: Tensor) -> Tensor:
    """How often each level comes in each channel: [n, 3, 256] of [n, 3, H, W]."""
    count = len(levels) * 3
    starts = torch.arange(0, count * 256, 256, device=levels.device, dtype=torch.int32).view(-1, 3, 1, 1)
    return torch.bincount((levels + starts).flatten(), minlength=count * 256).view(-1, 3, 256)


def _stretched(histogram: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tables that bring each channel's darkest level to 0 and its lightest to 255."""
    held = histogram > 0
    low, high = held.argmax(axis=2)[..., None], 255 - held[..., ::-1].argmax(axis=2)[..., None]
    ramp = np.arange(256.0)
    scale = 255.0 / np.maximum(high - low, 1)
    return np.where(high > low, np.clip(np.trunc(ramp * scale - low * scale), 0, 255), ramp)


def _equalized(histogram: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tables that spread each channel's levels evenly."""
    held = (histogram > 0).sum(axis=2, keepdims=True)
    last = np.take_along_axis(histogram, 255 - (histogram > 0)[..., ::-1].argmax(axis=2)[..., None], axis=2)
    step = (histogram.sum(axis=2, keepdims=True) - last) // 255
    before = np.cumsum(histogram, axis=2) - histogram
    spread = np.minimum((before + step // 2) // np.maximum(step, 1), 255)
    return np.where((held > 1) & (step > 0), spread, np.arange(256)).astype(np.float64)


def _blend(
    plain: NDArray[np.float64] | float, levels: NDArray[np.float64], factor: NDArray[np.float64]
) -> NDArray[np.float64]:
    """From the plainer level towards and beyond the level itself, cut to a whole one."""
    return np.asarray(np.floor(np.clip(plain + factor * (levels - plain), 0, 255)))


def _grey(levels: Tensor) -> Tensor:
    """Grey levels [n, 1, H, W] as PIL rounds them, int32."""
    parts = [levels[:, place : place + 1].int() * part for place, part in enumerate(GREY_PARTS)]
    return (parts[0] + parts[1] + parts[2] + 0x8000) >> 16


def _blended(plain: Tensor, levels: Tensor, magnitude: NDArray[np.float64]) -> Tensor:
    """As `_blend`, for a plainer image."""
    factor = torch.from_numpy(_factor(magnitude).astype(np.float32)).to(levels.device).view(-1, 1, 1, 1)
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
    grid = affine_grid(rows, (height, width), levels.device)
    return resample(levels.float(), grid, FILL).round_().to(torch.uint8)
