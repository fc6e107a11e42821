"""Make a stranger's set for segmentation: icons pasted by their alpha on textures.

    python benchmarks/icon_scenes.py ICONS ROOT [--side 96] [--train 400] [--val 100] [--test 100] [--seed 0]

ICONS holds {train,val,test}/CLASS/*.png with transparency; ROOT gets {train,val,test}/{images,masks}, and a split's
scenes show icons of that split alone. Label maps are palette PNGs: 0 is background, a class's number is its position in
ROOT/classes.txt, and the half-transparent edge of an icon is 255. Then: heterokd auto ROOT --teacher segformer-mit_b0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heterokd.outputs import IGNORE

MOST_ICONS = 4
SOLID, CLEAR = 200, 55
"""Levels of alpha from which a pixel belongs to the icon, and up to which to what lies below; between them: ignored."""
COARSE = (3, 12)
"""Numbers of random cells along a side, whose sum is the texture."""


def texture(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw a texture: random cells of two sizes, enlarged smoothly, and noise."""
    total = rng.normal(0, 12, (side, side, 3))
    for cells in COARSE:
        levels = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC), float) / len(COARSE)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def scene(rng: np.random.Generator, icons: list[tuple[Path, int]], side: int) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Draw a scene and its label map [side, side]."""
    image, labels = texture(rng, side), np.zeros((side, side), np.uint8)
    for number in rng.choice(len(icons), rng.integers(1, MOST_ICONS + 1)):
        path, label = icons[number]
        size = int(rng.integers(side // 4, side // 2 + 1))
        with Image.open(path) as opened:
            icon = (
                opened.convert("RGBA")
                .rotate(float(rng.uniform(-20, 20)), Image.Resampling.BICUBIC)
                .resize((size, size))
            )
        left, top = (int(value) for value in rng.integers(0, side - size + 1, 2))
        image.paste(icon, (left, top), icon)
        alpha = np.asarray(icon)[..., 3]
        place = labels[top : top + size, left : left + size]
        place[alpha > CLEAR] = IGNORE
        place[alpha >= SOLID] = label
    return image, labels


def main() -> None:
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path)
    parser.add_argument("root", type=Path)
    for name, default in (("side", 96), ("train", 400), ("val", 100), ("test", 100), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    classes = sorted(folder.name for folder in (asked.icons / "train").iterdir() if folder.is_dir())
    rng = np.random.default_rng(asked.seed)
    palette = rng.integers(0, 256, 768, dtype=np.uint8).tobytes()
    for split in ("train", "val", "test"):
        icons = [
            (path, label)
            for label, name in enumerate(classes, 1)
            for path in sorted((asked.icons / split / name).glob("*.png"))
        ]
        for kind in ("images", "masks"):
            (asked.root / split / kind).mkdir(parents=True, exist_ok=True)
        for number in range(getattr(asked, split)):
            image, labels = scene(rng, icons, asked.side)
            image.save(asked.root / split / "images" / f"{number:05d}.jpg", quality=92)
            mask = Image.fromarray(labels)
            mask.putpalette(palette)
            mask.save(asked.root / split / "masks" / f"{number:05d}.png")
    (asked.root / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *classes)))


if __name__ == "__main__":
    main()
