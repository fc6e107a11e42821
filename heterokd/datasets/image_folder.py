"""Image folder: the user's images, one folder per class.

    ROOT/train/CLASS/*.jpg   ROOT/val/CLASS/*.jpg   ROOT/test/CLASS/*.jpg        used as they are
    ROOT/train/..., and one of ROOT/val, ROOT/test                               the missing one is split off train
    only ROOT/train/CLASS/*.jpg, or ROOT/CLASS/*.jpg                             split 60/20/20

Splits are seeded and stratified by class. Files of all formats that Pillow decodes are read, see
`heterokd/datasets/io/read_image.py`; other files are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from heterokd.datasets.io.image_files import (
    SUFFIXES,
    LabelledFiles,
    class_folders,
    file_splits,
    list_classes,
    present_splits,
)
from heterokd.datasets.io.options import DEFAULT_OPTIONS, FIRST_READER, DataOptions
from heterokd.datasets.io.read_image import FIRST_READING, Reading, image_suffixes
from heterokd.datasets.io.split import HELD_OUT, SHARES, SPLIT_NAMES, Dataset, SplitName, Splits, stratified_split
from heterokd.datasets.io.value_range import GivenRange, ScannedRange
from heterokd.errors import DataError


class ImageFolder(Dataset):
    """Images in folders: ROOT/SPLIT/CLASS/*.jpg, or ROOT/CLASS/*.jpg."""

    needs_root = True
    reads = frozenset(field.name for field in fields(DataOptions))
    licence = "unknown (your own images)"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images are decoded when read."""
        return self.load_with(root, image_size, seed, DEFAULT_OPTIONS)

    def load_with(self, root: Path | None, image_size: int, seed: int, options: DataOptions) -> Splits:
        """List the files of each split as the options say."""
        if root is None or not root.is_dir():
            raise DataError(f"data.root: there is no folder {root}; give the folder that holds the images")
        present = present_splits(root)
        class_names = class_folders(root / "train" if present else root)
        suffixes = SUFFIXES if options.reader == FIRST_READER else image_suffixes()
        files = _find(root, present, class_names, seed, suffixes)
        reading = _reading(files, options)
        files = {name: replace(part, reading=reading) for name, part in files.items()}
        return file_splits("image_folder", files, class_names, image_size)


def _find(
    root: Path, present: list[SplitName], class_names: tuple[str, ...], seed: int, suffixes: tuple[str, ...]
) -> dict[SplitName, LabelledFiles]:
    if present in ([], ["train"]):
        files = list_classes(root, "train" if present else "", class_names, suffixes)
        parts = stratified_split(files.labels, SHARES, seed, class_names)
        return {name: files.chosen(part) for name, part in zip(SPLIT_NAMES, parts, strict=True)}
    found = {name: list_classes(root, name, class_names, suffixes) for name in present}
    for missing in (name for name in SPLIT_NAMES if name not in present):
        found["train"], found[missing] = found["train"].hold_out(HELD_OUT, seed, class_names)
    return found


def _reading(files: Mapping[SplitName, LabelledFiles], options: DataOptions) -> Reading:
    """Return how files become pixels; test does not decide the range of values."""
    if options.reader == FIRST_READER:
        return replace(FIRST_READING, max_megapixels=options.max_megapixels)
    if options.value_range == "auto":
        names = np.concatenate((files["train"].names, files["val"].names))
        return Reading(options.background, ScannedRange(files["train"].folder, names), options.max_megapixels)
    return Reading(options.background, GivenRange(*options.value_range), options.max_megapixels)
