"""Draw the scenes of `digit_scenes`: texture, digits, clutter and bars, and the class of every pixel."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.views.random import random_words
from heterokd.outputs import IGNORE

# Layers from back to front, with the probability of each object.
DIGIT, CLUTTER, BAR = "digit", "clutter", "bar"
LAYERS = ((CLUTTER, 0.7), (DIGIT, 1.0), (DIGIT, 1.0), (CLUTTER, 0.7), (DIGIT, 0.7), (BAR, 0.4), (DIGIT, 0.4))

# Minimum visible share of a digit; digits with less are IGNORE.
LEAST_SEEN = 0.3
# Half the side of the bounding box of digits and of clutter, as a share of the canvas.
DIGIT_SIZE, CLUTTER_SIZE = (0.23, 0.33), (0.06, 0.16)
DIGIT_TURN, HALF_TURN = float(np.deg2rad(15)), float(np.pi)
# Difference in lightness between ink and texture.
CONTRAST = (0.38, 0.65)

# A digit has 8x8 levels and an empty border; in the enlarged digit, the edge is where the ink is `EDGE`.
MAX_LEVEL, LEVELS, ENLARGED, EDGE = 16, 10, 4, 0.4
COARSE, FINE = 6, 20
DRAWS_PER_LAYER, DRAWS_OF_TEXTURE = 12, 16
DRAWN_AT_ONCE = 64


def enlarged_digits(levels: NDArray[np.float32]) -> Tensor:
    """Enlarge digits, [M, 8, 8] in 0..16 -> ink [M, 1, 40, 40] in 0..1, with an empty border."""
    ink = F.pad(torch.from_numpy(levels)[:, None] / MAX_LEVEL, (1, 1, 1, 1))
    return F.interpolate(ink, scale_factor=ENLARGED, mode="bicubic", align_corners=False).clamp_(0, 1)


def draw_scenes(
    glyphs: Tensor, labels: NDArray[np.int64], count: int, image_size: int, key: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw scenes of the given digits.

    Args:
        glyphs: [M, 1, G, G] see `enlarged_digits`.
        labels: [M] the digits, 0 to 9.
        count: number of scenes, N.
        image_size: S.
        key: key of the generator, see `philox_key`.

    Returns:
        Images [N, S, S, 3], and label maps [N, S, S] of 0 (background), 1 to 10 (digits 0 to 9) and IGNORE.
    """
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    maps = np.empty((count, image_size, image_size), np.uint8)
    classes = torch.from_numpy(labels + 1)
    for start in range(0, count, DRAWN_AT_ONCE):
        index = np.arange(start, min(start + DRAWN_AT_ONCE, count))
        canvas, lightness = _texture(index, image_size, key)
        drawn, maps[index] = _objects(canvas, lightness, glyphs, classes, index, key)
        images[index] = drawn.mul_(255).round_().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return images, maps


def _uniform(index: NDArray[np.int64], number: int, count: int, key: tuple[int, int]) -> Tensor:
    """Draw from (0, 1): [B, count], count a multiple of four; different for each `number`."""
    words = random_words(key, 0, index, number, blocks=count // 4)
    return torch.from_numpy(((words.astype(np.float64) + 0.5) / 2.0**32).astype(np.float32))


def _texture(index: NDArray[np.int64], side: int, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Draw textured canvases [B, 3, S, S] in [0, 1]; return also their mean lightness [B]."""
    draw = _uniform(index, 0, DRAWS_OF_TEXTURE, key).T
    x, y = _positions(side)

    def noise(number: int, cells: int) -> Tensor:
        values = _uniform(index, number, cells**2, key).view(-1, 1, cells, cells) * 2 - 1
        return F.interpolate(values, (side, side), mode="bicubic", align_corners=False)[:, 0]

    def along(angle: Tensor) -> Tensor:
        return x * torch.cos(angle)[:, None, None] + y * torch.sin(angle)[:, None, None]

    angle, waves, phase = draw[0] * HALF_TURN, 1.5 + 5 * draw[1], draw[2] * 2 * HALF_TURN
    stripes = torch.sin(along(angle) * (waves * HALF_TURN)[:, None, None] + phase[:, None, None])
    gradient = along(draw[3] * 2 * HALF_TURN)
    weights = torch.softmax(draw[4:8] * 3, dim=0)[:, :, None, None]
    fine = noise(2, FINE)
    texture = weights[0] * noise(1, COARSE) * 1.5 + weights[1] * stripes + weights[2] * gradient + weights[3] * fine

    lightness, spread = 0.2 + 0.6 * draw[8], 0.03 + 0.08 * draw[9]
    hue, chroma = draw[10] * 2 * HALF_TURN, 0.03 + 0.12 * draw[11]
    dark = _colour(lightness - spread, hue, chroma)[:, :, None, None]
    light = _colour(lightness + spread, hue + (draw[12] - 0.5) * 2, chroma)[:, :, None, None]
    canvas = dark + (light - dark) * (texture[:, None] * 0.5 + 0.5)
    return (canvas + 0.05 * fine[:, None]).clamp_(0, 1), lightness


def _objects(
    canvas: Tensor, lightness: Tensor, glyphs: Tensor, classes: Tensor, index: NDArray[np.int64], key: tuple[int, int]
) -> tuple[Tensor, NDArray[np.uint8]]:
    """Draw the objects on canvases [B, 3, S, S]; return also the labels [B, S, S]."""
    side = canvas.shape[-1]
    # Each digit is close to the centre of another quarter of the canvas.
    quarter = _uniform(index, 3, 4, key).argsort(dim=1, stable=True)
    owner = torch.zeros(len(index), side, side, dtype=torch.int64)
    # Class of each owner of a pixel: 0 is the background, then come the layers, last a border.
    class_of = torch.zeros(len(index), len(LAYERS) + 2, dtype=torch.int64)
    border = len(LAYERS) + 1
    class_of[:, border] = IGNORE
    area: dict[int, Tensor] = {}
    for layer, (kind, probability) in enumerate(LAYERS, 1):
        draw = _uniform(index, 3 + layer, DRAWS_PER_LAYER, key).T
        present = (draw[0] < probability)[:, None, None]
        if kind == DIGIT:
            centre = (quarter[:, len(area)] % 2 - 0.5, quarter[:, len(area)] // 2 - 0.5)
            u, v, half = _frame(side, draw, centre, 0.17, DIGIT_SIZE, DIGIT_TURN)
            number = (draw[6] * len(glyphs)).long().clamp_(max=len(glyphs) - 1)
            ink = F.grid_sample(glyphs[number], torch.stack((u, v), dim=3), align_corners=False)[:, 0]
            # The edge is about a pixel wide at any size: scale by the width of a level in pixels.
            alpha = ((ink - EDGE) * (2 * half / LEVELS)[:, None, None] + 0.5).clamp_(0, 1) * present
            mask = (ink > EDGE) & present
            owner.masked_fill_(_grown(mask), border)
            area[layer] = mask.sum(dim=(1, 2))
            class_of[:, layer] = classes[number]
        else:
            alpha = _shape(side, draw, kind) * present
            mask = alpha > 0.5
        owner.masked_fill_(mask, layer)
        alpha *= (0.75 + 0.25 * draw[7])[:, None, None]
        canvas = canvas + alpha[:, None] * (_ink(draw, lightness)[:, :, None, None] - canvas)
    for layer, drawn in area.items():
        visible = (owner == layer).sum(dim=(1, 2))
        class_of[:, layer].masked_fill_(visible < LEAST_SEEN * drawn, IGNORE)
    labels = class_of.gather(1, owner.view(len(index), -1)).view_as(owner)
    # A bar over a digit also covers the digit's border: mark the border again.
    labels.masked_fill_(_grown((labels > 0) & (labels != IGNORE)) & (labels == 0), IGNORE)
    return canvas.clamp(0, 1), labels.to(torch.uint8).numpy()


def _positions(side: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the pixels' centres in [-1, 1]: x [1, 1, S] and y [1, S, 1]."""
    line = (torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1
    return line.view(1, 1, -1), line.view(1, -1, 1)


def _frame(
    side: int, draw: Tensor, centre: tuple[Tensor, Tensor] | None, jitter: float, size: tuple[float, float], turn: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the positions u and v [B, S, S] of all pixels in an object's frame, and half its side in pixels [B].

    Positions inside the object's box are in [-1, 1].
    """
    x, y = _positions(side)
    middle_x, middle_y = centre or (0.0, 0.0)
    half = size[0] + (size[1] - size[0]) * draw[3]
    angle = (draw[4] * 2 - 1) * turn
    across = x - (middle_x + (draw[1] * 2 - 1) * jitter)[:, None, None]
    down = y - (middle_y + (draw[2] * 2 - 1) * jitter)[:, None, None]
    # The canvas is two units wide.
    cos, sin = (part[:, None, None] for part in (torch.cos(angle) / (2 * half), torch.sin(angle) / (2 * half)))
    return across * cos + down * sin, down * cos - across * sin, half * side


def _shape(side: int, draw: Tensor, kind: str) -> Tensor:
    """Return the opacity [B, S, S] of a long bar, or of clutter (a stroke, a blob or an arc)."""
    size = (0.35, 0.6) if kind == BAR else CLUTTER_SIZE
    u, v, half = _frame(side, draw, None, 0.9, size, HALF_TURN)
    width = 0.1 + 0.06 * draw[5] if kind == BAR else 0.2 + 0.15 * draw[5]
    width = width[:, None, None]
    distance = torch.hypot((u.abs() - 1).clamp_(min=0), v) - width
    if kind == CLUTTER:
        radius = torch.hypot(u, v)
        blob = torch.hypot(u, v * 1.5) - 0.7
        arc = torch.maximum((radius - 0.8).abs() - width, -0.4 - u)
        which = draw[6][:, None, None] * 3
        distance = torch.where(which < 1, distance, torch.where(which < 2, blob, arc))
    return (0.5 - distance * half[:, None, None]).clamp_(0, 1)


def _ink(draw: Tensor, texture: Tensor) -> Tensor:
    """Return colours [B, 3] lighter or darker than the texture, mostly in the direction of the larger range."""
    contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * draw[8]
    lighter = texture + (draw[9] - 0.5) * 0.3 < 0.5
    return _colour(texture + torch.where(lighter, contrast, -contrast), draw[10] * 2 * HALF_TURN, 0.05 + 0.2 * draw[11])


def _colour(lightness: Tensor, hue: Tensor, chroma: Tensor) -> Tensor:
    """Return red, green and blue [B, 3] for a lightness, hue and chroma."""
    thirds = torch.arange(3) * (2 * HALF_TURN / 3)
    return (lightness[:, None] + chroma[:, None] * torch.cos(hue[:, None] - thirds)).clamp_(0, 1)


def _grown(mask: Tensor) -> Tensor:
    """Dilate a mask [B, S, S] by the eight neighbours of each pixel."""
    return F.max_pool2d(mask[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
