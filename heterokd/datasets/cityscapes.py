"""Cityscapes: street scenes of 2048x1024 pixels with a class for every pixel, nineteen classes.

Cordts, Omran, Ramos, Rehfeld, Enzweiler, Benenson, Franke, Roth, Schiele: "The Cityscapes Dataset for Semantic Urban
Scene Understanding", CVPR 2016, https://arxiv.org/abs/1604.01685; from https://www.cityscapes-dataset.com (with an
account), the packages leftImg8bit and gtFine:

    ROOT/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png   ROOT/gtFine/{train,val}/CITY/*_gtFine_labelIds.png

Test is the official val, 500 images of three cities, because the official test labels are not public. As in the
official split, val is whole cities of the 2975 training images: cities in seeded order, as long as val stays within
`VAL_SHARE` of the images. Of the 34 numbers in label maps, 19 are classes in the official evaluation; the others are
IGNORE. `data.masks` sets other classes for images in this layout.

The canvas is `image_size` high and twice as wide: 1024 is the original size, 512 half of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from heterokd.datasets.io.image_files import file_names, path_array
from heterokd.datasets.io.label_maps import SceneFiles, label_files, scene_splits
from heterokd.datasets.io.options import DEFAULT_OPTIONS, DataOptions
from heterokd.datasets.io.split import Dataset, SplitName, Splits
from heterokd.datasets.masks.classes import KnownClasses
from heterokd.datasets.masks.found_classes import mask_classes
from heterokd.datasets.masks.settings import MaskClass, MaskSettings
from heterokd.datasets.views.policy import POLICIES
from heterokd.datasets.views.random import permutation
from heterokd.errors import DataError

VAL_SHARE = 0.1
IMAGE_END, LABEL_END = "_leftImg8bit.png", "_gtFine_labelIds.png"
ADVICE = (
    "download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com "
    "and unpack both there"
)
# Class names in the order of their class numbers, with their numbers in the label maps.
CLASSES = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19},
    **{"traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26},
    **{"truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33},
}
NUMBERS = 34


class Cityscapes(Dataset):
    """Street scenes with a class for every pixel, nineteen classes (Cordts et al. 2016)."""

    needs_root = True
    tasks = "segmentation"
    default_policy = POLICIES["scenes"]
    licence = "Cityscapes terms: non-commercial research, teaching and personal experiments, after registration"
    reads = frozenset({"masks", "drawn_at"})

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images and label maps are decoded when read."""
        return self.load_with(root, image_size, seed, DEFAULT_OPTIONS)

    def load_with(self, root: Path | None, image_size: int, seed: int, options: DataOptions) -> Splits:
        """List the files of each split, with the classes and shares of `options.masks`."""
        masks = options.masks or MaskSettings()
        folder = Path(root or ".")
        names, test = _find(folder, "train"), _find(folder, "val")
        if len(names) < 2:
            raise DataError(
                f"{folder / 'leftImg8bit' / 'train'}: has a single city, two are needed for train and val; {ADVICE}"
            )
        share = masks.val_share or VAL_SHARE
        held_out = _held_out({city: len(files) for city, files in names.items()}, share, seed)
        files: dict[SplitName, SceneFiles] = {
            "train": _pairs(folder, [name for city in names if city not in held_out for name in names[city]]),
            "val": _pairs(folder, [name for city in held_out for name in names[city]]),
            "test": _pairs(folder, [name for city in test.values() for name in city]),
        }
        listed = tuple(MaskClass(name=name, values=(number,)) for name, number in CLASSES.items())
        known = KnownClasses(listed, ignored=tuple(range(NUMBERS)))
        files = {
            name: replace(part, padding=options.padding, drawn_at=options.drawn_at) for name, part in files.items()
        }
        classes = mask_classes(masks, folder, label_files(files), ADVICE, known)
        return scene_splits("cityscapes", files, classes, (image_size, 2 * image_size), ADVICE)


def _find(root: Path, split: str) -> dict[str, list[str]]:
    """List the images of each city without suffixes, `SPLIT/CITY/CITY_000000_000019`, sorted.

    Raises:
        DataError: the split has no images.
    """
    folder = root / "leftImg8bit" / split
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; {ADVICE}")
    names: dict[str, list[str]] = {}
    for city in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found, _ = file_names(city, (IMAGE_END.lower(),))
        if found:
            names[city.name] = [f"{split}/{city.name}/{name.removesuffix(IMAGE_END)}" for name in found]
    if not names:
        raise DataError(f"{folder}: holds no CITY/*{IMAGE_END}; {ADVICE}")
    return names


def _held_out(count_of: dict[str, int], share: float, seed: int) -> list[str]:
    """Choose seeded cities with at most a share of the images, or the smallest city; return them sorted."""
    cities = list(count_of)
    left, chosen = share * sum(count_of.values()), []
    for position in permutation(len(cities), 0, "cities", seed).tolist():
        if count_of[cities[position]] <= left:
            left -= count_of[cities[position]]
            chosen.append(cities[position])
    return sorted(chosen) or [min(cities, key=lambda city: count_of[city])]


def _pairs(folder: Path, names: list[str]) -> SceneFiles:
    return SceneFiles(
        folder,
        path_array(f"leftImg8bit/{name}{IMAGE_END}" for name in names),
        path_array(f"gtFine/{name}{LABEL_END}" for name in names),
    )
