"""Images with label maps: the user's images for segmentation.

    ROOT/images/*, ROOT/masks/*                                      split 60/20/20
    ROOT/{train,val,test}/{images,masks}/*, or the other way round   used as they are
    ROOT/train/..., and one of val, test                             a missing split is taken from train

Names of folders and files are those of `heterokd/datasets/masks/pairs.py`. Label maps hold numbers (grey or palette) or
colours; `data.masks` sets classes, ignored values, and how images are split: by shares, groups, or lists in files.
Without a class list (`data.masks.classes`, or a file such as classes.txt in ROOT) every label map is read first, and
each value found is a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from heterokd.datasets.io.image_files import path_array
from heterokd.datasets.io.label_maps import SceneFiles, label_files, scene_splits
from heterokd.datasets.io.options import DEFAULT_OPTIONS, DataOptions
from heterokd.datasets.io.read_image import Reading
from heterokd.datasets.io.split import HELD_OUT, SHARES, SPLIT_NAMES, Dataset, SplitName, Splits
from heterokd.datasets.io.tables import read_lines
from heterokd.datasets.io.value_range import GivenRange, ScannedRange
from heterokd.datasets.masks.found_classes import mask_classes
from heterokd.datasets.masks.pairs import FoundPairs, find_pairs
from heterokd.datasets.masks.settings import MaskSettings
from heterokd.datasets.views.policy import POLICIES
from heterokd.errors import DataError

ADVICE = "correct the file, or remove it together with its image"


class MaskFolder(Dataset):
    """Images with label maps of the same names: ROOT/images/*.jpg and ROOT/masks/*.png."""

    needs_root = True
    tasks = "segmentation"
    default_policy = POLICIES["scenes"]
    licence = "unknown (your own images)"
    reads = frozenset({"masks", "drawn_at", "group", "background", "value_range", "max_megapixels"})

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; label maps are read first if there is no class list."""
        return self.load_with(root, image_size, seed, DEFAULT_OPTIONS)

    def load_with(self, root: Path | None, image_size: int, seed: int, options: DataOptions) -> Splits:
        """List the files of each split, with the classes and shares of `options.masks`."""
        masks = options.masks or MaskSettings()
        if root is None or not root.is_dir():
            raise DataError(f"data.root: there is no folder {root}; give the folder that holds images and label maps")
        found = find_pairs(root)
        files = _split(root, found, options, seed)
        reading = _reading(root, files, options)
        files = {
            name: replace(part, reading=reading, padding=options.padding, drawn_at=options.drawn_at)
            for name, part in files.items()
        }
        classes = mask_classes(masks, root, label_files(files), ADVICE)
        return scene_splits("mask_folder", files, classes, (image_size, image_size), ADVICE, found.notes)


def _reading(root: Path, files: Mapping[SplitName, SceneFiles], options: DataOptions) -> Reading:
    """Return how files of images become pixels; test does not decide the range of values."""
    scanned = ScannedRange(root, np.concatenate((files["train"].images, files["val"].images)))
    values = scanned if options.value_range == "auto" else GivenRange(*options.value_range)
    return Reading(options.background, values, options.max_megapixels)


def _split(root: Path, found: FoundPairs, options: DataOptions, seed: int) -> dict[SplitName, SceneFiles]:
    """Return the files of each split: folders, then lists, then shares of train.

    Raises:
        DataError: a list and a folder define the same split, or a split is left without images.
    """
    masks = options.masks or MaskSettings()
    files: dict[SplitName, SceneFiles] = {
        name or "train": SceneFiles(
            root, path_array(image for image, _ in pairs), path_array(mask for _, mask in pairs)
        )
        for name, pairs in found.pairs.items()
    }
    given = [name for name in SPLIT_NAMES if name in files and None not in found.pairs]
    for name in masks.lists:
        if given and name in given:
            raise DataError(
                f"data.masks.lists.{name}: {root} has a folder for {name} already; remove the list or the folder"
            )
    files |= _listed(files["train"], masks)
    shares: dict[SplitName, float | None] = {"test": masks.test_share, "val": masks.val_share}
    for name, share in shares.items():
        if share is not None and name in files:
            where = f"data.masks.lists.{name}" if name in masks.lists else f"the folder {name}"
            raise DataError(f"data.masks.{name}_share: {where} holds {name} already; remove the share or the other")
    whole = len(files["train"])
    default = HELD_OUT if given not in ([], ["train"]) or masks.lists else SHARES[1]
    for name in (name for name in shares if name not in files):
        share = shares[name] or default
        if len(files["train"]) < 2:
            raise DataError(f"{root}: has too few images for train, val and test; add images with label maps")
        rest = len(files["train"])
        files["train"], files[name] = files["train"].hold_out(min(0.95, share * whole / rest), seed, options.group)
    return files


def _listed(files: SceneFiles, masks: MaskSettings) -> dict[SplitName, SceneFiles]:
    """Return the splits that files list; what no list names is train, or is left out if train has a list.

    Raises:
        DataError: a list names an unknown image, or an image is in two lists.
    """
    position_of: dict[str, int] = {}
    for position in range(len(files)):
        path = PurePosixPath(files.image(position).relative_to(files.folder).as_posix())
        for name in (str(path), path.name, path.stem):
            position_of.setdefault(name, position)
    split_of: dict[int, SplitName] = {}
    for split in SPLIT_NAMES:
        if split not in masks.lists:
            continue
        file = files.folder / masks.lists[split]
        for line in filter(str.strip, read_lines(file, "write the name of an image per line")):
            entry = line.split(",")[0].strip()
            if entry not in position_of:
                raise DataError(f"{file}: there is no image {entry!r} with a label map in {files.folder}")
            other = split_of.setdefault(position_of[entry], split)
            if other != split:
                raise DataError(f"{file}: {entry!r} is in the list of {other} as well; remove it from one")
    if not split_of:
        return {}
    rest = [position for position in range(len(files)) if position not in split_of]
    chosen: dict[SplitName, list[int]] = {name: [] for name in masks.lists} | (
        {} if "train" in masks.lists else {"train": rest}
    )
    for position, split in split_of.items():
        chosen[split].append(position)
    return {name: files.chosen(np.sort(np.array(positions, np.int64))) for name, positions in chosen.items()}
