"""Image folder: the user's images, one folder per class, or listed in a table.

    ROOT/train/CLASS/...   ROOT/val/CLASS/...   ROOT/test/CLASS/...              used as they are
    ROOT/train/..., and one of ROOT/val, ROOT/test                               a missing split is taken from train
    only ROOT/train/CLASS/..., or ROOT/CLASS/...                                 split 60/20/20

Splits are seeded, and stratified by class or made by group. Files of all formats that Pillow decodes are read, see
`heterokd/datasets/io/read_image.py`, and folders as `heterokd/datasets/io/layout.py` describes. `data.reader: 1` reads
folders as versions before schema 3 did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from heterokd.datasets.io.grouping import grouped_split, groups_of
from heterokd.datasets.io.image_files import (
    LabelledFiles,
    class_folders,
    file_splits,
    list_classes,
    path_array,
    present_splits,
)
from heterokd.datasets.io.image_table import find_tables, read_table
from heterokd.datasets.io.labelled_shards import find_labelled
from heterokd.datasets.io.layout import FoundImages, NoClassesError, find_images
from heterokd.datasets.io.options import DEFAULT_OPTIONS, FIRST_READER, DataOptions
from heterokd.datasets.io.read_image import FIRST_READING, Reading
from heterokd.datasets.io.split import HELD_OUT, SHARES, SPLIT_NAMES, Dataset, SplitName, Splits, stratified_split
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.datasets.io.value_range import GivenRange, ScannedRange
from heterokd.errors import DataError


class ImageFolder(Dataset):
    """Images in folders, ROOT/SPLIT/CLASS/*.jpg or ROOT/CLASS/*.jpg, or in a table."""

    needs_root = True
    reads_shards = True
    reads = frozenset(field.name for field in fields(DataOptions)) - {"masks"}
    licence = "unknown (your own images)"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images are decoded when read."""
        return self.load_with(root, image_size, seed, DEFAULT_OPTIONS)

    def load_with(self, root: Path | None, image_size: int, seed: int, options: DataOptions) -> Splits:
        """List the files of each split as the options say."""
        if root is None or not root.is_dir():
            raise DataError(f"data.root: there is no folder {root}; give the folder that holds the images")
        if options.reader == FIRST_READER:
            return _first_reader(root, image_size, seed, options)
        return self._loaded(root, image_size, seed, options)

    def load_stored(self, stored: StoredFiles, image_size: int, seed: int, options: DataOptions) -> Splits:
        """List files as `load_with` does, from the list of a store."""
        if options.reader == FIRST_READER:
            return super().load_stored(stored, image_size, seed, options)
        return self._loaded(stored, image_size, seed, options)

    def _loaded(self, root: Path | StoredFiles, image_size: int, seed: int, options: DataOptions) -> Splits:
        labelled = root.labelled if isinstance(root, StoredFiles) else None
        if isinstance(root, StoredFiles) and labelled is not None:
            found = find_labelled(root, labelled, options)
        else:
            found = read_table(root, options.table, options) if options.table else _by_folders(root, options)
        files, notes, groups = _split(found, seed, options)
        reading = _reading(files, options)
        shown = replace(reading, photo_crops=False, shown=options.val_crop)
        files = {name: replace(part, reading=reading if name == "train" else shown) for name, part in files.items()}
        splits = file_splits("image_folder", files, found.classes, image_size)
        splits = replace(splits, train=replace(splits.train, groups=groups))
        return replace(splits, notes=(*notes, *found.notes, *found.unread_sentences))


def _by_folders(root: Path | StoredFiles, options: DataOptions) -> FoundImages:
    """Find the images by their folders.

    Raises:
        DataError: see `find_images`; names a table in the folder that lists the images.
    """
    try:
        return find_images(root, options)
    except NoClassesError as error:
        tables = find_tables(root) if isinstance(root, Path) else []
        if not tables:
            raise
        raise DataError(f"{error}; set data.table: {tables[0]}, which lists the images with their labels") from None


def _split(
    found: FoundImages, seed: int, options: DataOptions
) -> tuple[dict[SplitName, LabelledFiles], tuple[str, ...], tuple[str, ...] | None]:
    """Return the files of each split, sentences about where the splits come from, and the groups of train if any."""
    number_of = {label: number for number, label in enumerate(found.classes)}
    names = [image.name for image in found.images]
    labels = np.array([number_of[image.label] for image in found.images], np.int64)
    groups = groups_of(names, options.group) if options.group else [image.group for image in found.images]
    groups = [group or f"\0{name}" for group, name in zip(groups, names, strict=True)]  # alone without a group
    is_grouped = len(set(groups)) < len(groups)
    weights = np.array([image.weight for image in found.images], np.float32)
    whole = LabelledFiles(found.folder, path_array(names), labels, weights=weights)

    def divided(index: np.ndarray, shares: tuple[float, ...]) -> list[np.ndarray]:
        if is_grouped:
            parts = grouped_split(labels[index], [groups[place] for place in index], shares, seed)
        else:
            parts = stratified_split(labels[index], shares, seed, found.classes)
        return [index[part] for part in parts]

    how = f"by {'group' if is_grouped else 'class'} and seed {seed}"
    if found.splits in ((), ("train",)):
        parts = dict(zip(SPLIT_NAMES, divided(np.arange(len(names)), SHARES), strict=True))
        notes = [f"train, val and test are split {'/'.join(f'{100 * share:.0f}' for share in SHARES)} {how}"]
    else:
        split_of = np.array([image.split for image in found.images])
        parts = {name: np.flatnonzero(split_of == name) for name in found.splits}
        notes = [f"{', '.join(found.splits)} are as given"]
        for missing in (name for name in SPLIT_NAMES if name not in parts):
            parts["train"], parts[missing] = divided(parts["train"], (1 - HELD_OUT, HELD_OUT))
            notes = [f"{notes[0]}; {missing} is {100 * HELD_OUT:.0f} % of train, split {how}"]
        splits_of = Counter(group for part in parts.values() for group in {groups[place] for place in part})
        shared = sorted(group for group, count in splits_of.items() if count > 1)
        if shared:
            notes.append(f"{len(shared)} groups are in more than one split (such as {shared[0]}): metrics are too good")
    parts = {name: np.sort(part) for name, part in parts.items()}
    of_train = tuple(groups[place] for place in parts["train"]) if is_grouped else None
    return {name: whole.chosen(parts[name]) for name in SPLIT_NAMES}, tuple(notes), of_train


def _reading(files: Mapping[SplitName, LabelledFiles], options: DataOptions) -> Reading:
    """Return how files become pixels; test does not decide the range of values."""
    names = np.concatenate((files["train"].names, files["val"].names))
    values = (
        ScannedRange(files["train"].folder, names)
        if options.value_range == "auto"
        else GivenRange(*options.value_range)
    )
    return Reading(options.background, values, options.max_megapixels, options.crops == "photo")


def _first_reader(root: Path, image_size: int, seed: int, options: DataOptions) -> Splits:
    """List files as versions before schema 3 did: five suffixes, directly in the folders of classes."""
    present = present_splits(root)
    class_names = class_folders(root / "train" if present else root)
    if present in ([], ["train"]):
        whole = list_classes(root, "train" if present else "", class_names)
        parts = stratified_split(whole.labels, SHARES, seed, class_names)
        files = {name: whole.chosen(part) for name, part in zip(SPLIT_NAMES, parts, strict=True)}
    else:
        files = {name: list_classes(root, name, class_names) for name in present}
        for missing in (name for name in SPLIT_NAMES if name not in present):
            files["train"], files[missing] = files["train"].hold_out(HELD_OUT, seed, class_names)
    reading = replace(FIRST_READING, max_megapixels=options.max_megapixels)
    files = {name: replace(part, reading=reading) for name, part in files.items()}
    return file_splits("image_folder", files, class_names, image_size)
