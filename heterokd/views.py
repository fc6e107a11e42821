"""Views: seeded, replayable augmentation. A view is a pure function of (policy, seed, image index, view number).

Nothing is stored and no generator is carried along: the draws of a view come from a counter-based generator (Philox
4x32-10; Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose counter is (index,
view) and whose key is the policy and the seed. So a view is the same in any order, batch and process, and for any
number of workers.

The draws are the same on every machine. The pixels are, on one CPU, the same to the last bit whatever else is in the
batch; between devices they differ by float rounding.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from heterokd.outputs import IGNORE

# Part of every policy's hash: raise it when the same draws give other pixels, so that stored outputs are made anew.
VIEWS_VERSION = 1

# Streams: the fourth word of the counter, so that different uses of one key never share a number.
STREAM_VIEW, STREAM_ORDER, STREAM_TURN = 0, 1, 2

# A draw keeps its place when a policy switches another one off; four draws make one Philox block.
DRAWS = (
    *("scale", "ratio", "crop_x", "crop_y"),
    *("translate_x", "translate_y", "rotation", "flip"),
    *("brightness", "contrast", "saturation", "erase_y"),
    *("erase", "erase_area", "erase_ratio", "erase_x"),
)

# Share of the area and side ratio of an erased rectangle: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020,
# https://arxiv.org/abs/1708.04896.
ERASE_AREA = (0.02, 0.4)
ERASE_RATIO = (0.3, 1 / 0.3)

# Luma of ITU-R BT.601, as PIL's grey conversion.
GREY = (0.299, 0.587, 0.114)


def _is_range(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"`0 < low <= high` must hold, got low={bounds[0]!r}, high={bounds[1]!r}")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_is_range)]


class AugmentPolicy(BaseModel):
    """How views differ from their image; everything is off unless set, and then a view is its image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scale: Range = Field(
        (1.0, 1.0), description="area of the random crop as a share of the image's; above 1 the image shrinks"
    )
    ratio: Range = Field((1.0, 1.0), description="width / height of the random crop, drawn evenly on a log scale")
    translate: float = Field(0.0, ge=0, le=1, description="largest shift in x and in y, as a share of the side")
    rotation: float = Field(0.0, ge=0, le=180, description="largest turn to either side, in degrees")
    flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring left and right")
    brightness: float = Field(0.0, ge=0, le=1, description="pixels are multiplied by 1 plus or minus up to this")
    contrast: float = Field(
        0.0, ge=0, le=1, description="distance to the image's mean grey, 1 plus or minus up to this"
    )
    saturation: float = Field(0.0, ge=0, le=1, description="distance to the pixel's grey, 1 plus or minus up to this")
    erasing: float = Field(0.0, ge=0, le=1, description="probability of blacking out one random rectangle")

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over every setting and the version of the views' code."""
        content = {"version": VIEWS_VERSION, **self.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def warps(self) -> bool:
        """Whether a view resamples its image."""
        return self.scale != (1.0, 1.0) or self.ratio != (1.0, 1.0) or self.translate > 0 or self.rotation > 0

    @property
    def colours(self) -> bool:
        """Whether a view changes its image's colours."""
        return self.brightness > 0 or self.contrast > 0 or self.saturation > 0


POLICIES: dict[str, AugmentPolicy] = {
    "none": AugmentPolicy(),
    # Handwriting: what a hand does by itself; a mirrored or quarter-turned digit is another digit.
    "digits": AugmentPolicy(scale=(0.8, 1.25), ratio=(0.9, 1 / 0.9), translate=0.06, rotation=10.0),
    # Photographs: the crop of Inception (area 8 % to 100 %, sides 3:4 to 4:3), flip, mild colour.
    "standard": AugmentPolicy(
        scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2
    ),
    # The same without colour: what OFA-KD shows of CIFAR-100 and ImageNet, https://arxiv.org/abs/2310.19444.
    "crop": AugmentPolicy(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5),
    # Street scenes and other images with label maps: half to twice the size, and flip, as in CIRKD's program
    # (https://arxiv.org/abs/2204.06986); the area is that of the crop, see `view_scenes`.
    "scenes": AugmentPolicy(scale=(0.25, 4.0), flip=0.5),
    # Photographs of 32 pixels: a crop of the image padded by 4 black pixels is a shift by up to 4 of 32; and flip.
    "cifar": AugmentPolicy(translate=4 / 32, flip=0.5),
}


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox 4x32-10: four random 32-bit words for each counter.

    Args:
        counter: [..., 4] words below 2**32.
        key: two words below 2**32.

    Returns:
        [..., 4] words below 2**32, in 64-bit integers.
    """
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (counter[..., word] for word in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & mask, (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1)


def philox_key(*parts: object) -> tuple[int, int]:
    """A generator's key from whatever names it: a policy's hash, a seed."""
    digest = hashlib.sha256(":".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def random_words(
    key: tuple[int, int], stream: int, index: NDArray[np.int64], number: NDArray[np.int64] | int, blocks: int = 1
) -> NDArray[np.uint64]:
    """Random 32-bit words [N, 4 * blocks] of positions `index` [N]; `number` tells views or epochs apart."""
    counter = np.empty((len(index), blocks, 4), np.uint64)
    counter[..., 0] = np.asarray(index, np.uint64)[:, None]
    counter[..., 1] = np.asarray(number, np.uint64)[..., None]
    counter[..., 2] = np.arange(blocks, dtype=np.uint64)
    counter[..., 3] = stream
    return philox(counter, key).reshape(len(index), 4 * blocks)


def permutation(length: int, number: int, *seeds: object) -> NDArray[np.int64]:
    """A seeded order of `length` things, the same on every machine and version of numpy.

    Args:
        length: how many.
        number: tells the orders of one seed apart (an epoch, a class).
        seeds: whatever names the order.
    """
    words = random_words(philox_key("order", *seeds), STREAM_ORDER, np.arange(length), number)
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable").astype(np.int64)


def view_draws(
    policy: AugmentPolicy, seed: int, index: NDArray[np.int64], view: NDArray[np.int64] | int
) -> dict[str, NDArray[np.float64]]:
    """The uniform draws in (0, 1) that make each view, [B] for every name of `DRAWS`."""
    words = random_words(philox_key(policy.hash, seed), STREAM_VIEW, index, view, blocks=len(DRAWS) // 4)
    uniform = (words.astype(np.float64) + 0.5) / 2.0**32
    return {name: np.ascontiguousarray(uniform[:, place]) for place, name in enumerate(DRAWS)}


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
    """
    plain = plain_images(images)
    if not (policy.warps or policy.flip or policy.colours or policy.erasing):
        return plain
    draws = view_draws(policy, seed, _numbers(index), _numbers(view))
    pixels = plain
    if policy.flip:
        flipped = _column(draws["flip"] < policy.flip, pixels)
        pixels = torch.where(flipped, pixels.flip(3), pixels)
    if policy.warps:
        pixels = _warp(pixels, policy, draws)
    if policy.colours:
        pixels = _colour(pixels, plain, policy, draws)
    if policy.erasing:
        pixels = _erase(pixels, policy, draws)
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
    nearest pixel; what lies outside the canvas is black and counts nowhere.

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
    plain = plain_images(images)
    pixels, labels = plain, label_maps[:, None]
    draws = view_draws(policy, seed, _numbers(index), _numbers(view))
    if policy.flip:
        flipped = _column(draws["flip"] < policy.flip, pixels)
        pixels, labels = torch.where(flipped, pixels.flip(3), pixels), torch.where(flipped, labels.flip(3), labels)
    if policy.warps or tuple(pixels.shape[-2:]) != size:
        grid = _grid(pixels, policy, draws, size, _crop_share(pixels, size))
        outside = _outside(grid)
        # Class numbers are below 256: exact in float32, the only kind that can be sampled.
        nearest = F.grid_sample(labels.float(), grid, mode="nearest", padding_mode="border", align_corners=False)
        labels = nearest.to(torch.uint8).masked_fill_(outside, IGNORE)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
        pixels = pixels.masked_fill_(outside, 0.0)
    if policy.colours:
        pixels = _colour(pixels, plain, policy, draws)
    if policy.erasing:
        pixels = _erase(pixels, policy, draws)
    return pixels, labels[:, 0].long()


def plain_images(images: Tensor) -> Tensor:
    """Images as networks take them: [B, S, S, 3] uint8 or float in [0, 1] -> [B, 3, S, S] float32 in [0, 1]."""
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(255) if images.dtype == torch.uint8 else planes


def _numbers(values: NDArray[np.int64] | Tensor | int) -> NDArray[np.int64]:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, np.int64)


def _spread(draw: NDArray[np.float64], size: float) -> NDArray[np.float64]:
    """A draw in (0, 1) to one in (-size, size)."""
    return (2 * draw - 1) * size


def _between(draw: NDArray[np.float64], bounds: tuple[float, float]) -> NDArray[np.float64]:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def _between_log(draw: NDArray[np.float64], bounds: tuple[float, float]) -> NDArray[np.float64]:
    return np.exp(_between(draw, (float(np.log(bounds[0])), float(np.log(bounds[1])))))


def _column(values: NDArray[np.float64] | NDArray[np.bool_], like: Tensor) -> Tensor:
    """One value an image, [B, 1, 1, 1], on the images' device."""
    dtype = np.bool_ if values.dtype == np.bool_ else np.float32
    return torch.from_numpy(values.astype(dtype)).to(like.device).view(-1, 1, 1, 1)


def _warp(pixels: Tensor, policy: AugmentPolicy, draws: dict[str, NDArray[np.float64]]) -> Tensor:
    """Crop, turn and shift in one bilinear resampling; black outside the image."""
    grid = _grid(pixels, policy, draws, (pixels.shape[2], pixels.shape[3]), (1.0, 1.0))
    warped = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped.masked_fill_(_outside(grid), 0.0)


def _crop_share(canvas: Tensor, size: tuple[int, int]) -> tuple[float, float]:
    """A view's height and width as shares of the canvas's."""
    return size[0] / canvas.shape[2], size[1] / canvas.shape[3]


def _outside(grid: Tensor) -> Tensor:
    """[B, 1, h, w] whether a position of a view lies outside its image."""
    return (torch.maximum(grid[..., 0].abs(), grid[..., 1].abs()) > 1)[:, None]


def _grid(
    pixels: Tensor,
    policy: AugmentPolicy,
    draws: dict[str, NDArray[np.float64]],
    size: tuple[int, int],
    share: tuple[float, float],
) -> Tensor:
    """Where each pixel of a view [h, w] lies in its image: [B, h, w, 2], x and y in [-1, 1].

    With u the position in the view and x in the image, both in [-1, 1]:   x = centre + diag(w, h) R(angle) u
    (where a view's sides differ, R turns pixels, not halves of sides).

    Args:
        pixels: [B, C, H, W].
        policy: see `AugmentPolicy`.
        draws: see `view_draws`.
        size: of the views.
        share: height and width of an unscaled crop as shares of the image's.
    """
    area, ratio = _between(draws["scale"], policy.scale), _between_log(draws["ratio"], policy.ratio)
    width, height = share[1] * np.sqrt(area * ratio), share[0] * np.sqrt(area / ratio)
    if share == (1.0, 1.0):
        # A long crop of nearly the whole area would leave the image: it is cut at the border.
        width, height = (np.where(area <= 1, np.minimum(side, 1), side) for side in (width, height))
    angle = np.deg2rad(_spread(draws["rotation"], policy.rotation))
    shift = 2 * policy.translate  # the image is 2 units wide
    centre_x = _spread(draws["crop_x"], 1) * np.abs(1 - width) + _spread(draws["translate_x"], shift)
    centre_y = _spread(draws["crop_y"], 1) * np.abs(1 - height) + _spread(draws["translate_y"], shift)
    cos, sin = np.cos(angle), np.sin(angle)
    # A turn keeps right angles only where both axes have the same unit.
    aspect = size[0] / size[1]
    rows = np.stack(
        (width * cos, -width * sin * aspect, centre_x, height * sin / aspect, height * cos, centre_y)
    ).astype(np.float32)
    xx, xy, x0, yx, yy, y0 = torch.from_numpy(rows).to(pixels.device).unsqueeze(2)

    u, v = ((torch.arange(side, device=pixels.device, dtype=torch.float32) * 2 + 1) / side - 1 for side in size[::-1])
    # Elementwise on purpose: a batched matrix product may round differently for another batch size.
    grid = torch.empty(len(pixels), *size, 2, device=pixels.device)
    torch.add((xy * v + x0)[:, :, None], (xx * u)[:, None, :], out=grid[..., 0])
    torch.add((yy * v + y0)[:, :, None], (yx * u)[:, None, :], out=grid[..., 1])
    return grid


def _colour(pixels: Tensor, plain: Tensor, policy: AugmentPolicy, draws: dict[str, NDArray[np.float64]]) -> Tensor:
    """Brightness, contrast around the whole image's mean grey, saturation; in this order."""
    brightness = _column(1 + _spread(draws["brightness"], policy.brightness), pixels)
    contrast = _column(1 + _spread(draws["contrast"], policy.contrast), pixels)
    # Whole numbers add up to the same sum in any order, so the mean does not depend on the batch.
    levels = (plain * 255).round_().sum(dim=(2, 3), keepdim=True, dtype=torch.int64).double()
    weights = torch.tensor(GREY, device=pixels.device, dtype=torch.float64).view(1, 3, 1, 1)
    parts = levels * weights / (255 * plain.shape[2] * plain.shape[3])
    mean = (parts[:, 0:1] + parts[:, 1:2] + parts[:, 2:3]).float()
    pixels = (pixels * (brightness * contrast) + mean * brightness * (1 - contrast)).clamp_(0, 1)
    if policy.saturation:
        saturation = _column(1 + _spread(draws["saturation"], policy.saturation), pixels)
        grey = pixels[:, 0:1] * GREY[0] + pixels[:, 1:2] * GREY[1] + pixels[:, 2:3] * GREY[2]
        pixels = (pixels * saturation + grey * (1 - saturation)).clamp_(0, 1)
    return pixels


def _erase(pixels: Tensor, policy: AugmentPolicy, draws: dict[str, NDArray[np.float64]]) -> Tensor:
    """One black rectangle in some of the images."""
    area, ratio = _between(draws["erase_area"], ERASE_AREA), _between_log(draws["erase_ratio"], ERASE_RATIO)
    width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    left, top = draws["erase_x"] * (1 - width), draws["erase_y"] * (1 - height)
    chosen = draws["erase"] < policy.erasing
    down, across = ((np.arange(side) + 0.5) / side for side in pixels.shape[-2:])
    columns = (across >= left[:, None]) & (across < (left + width)[:, None])
    rows = (down >= top[:, None]) & (down < (top + height)[:, None]) & chosen[:, None]
    erased = torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :]).to(pixels.device)
    return pixels.masked_fill(erased, 0.0)
