"""Images of shards that say their labels: WebDataset tars, Parquet and Arrow tables."""

from __future__ import annotations

import os

import numpy as np

from heterokd.datasets.io.class_order import order_classes
from heterokd.datasets.io.layout import FoundImage, FoundImages
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.split import SPLIT_NAMES
from heterokd.datasets.io.stored_files import Labelled, StoredFiles
from heterokd.errors import DataError


def find_labelled(stored: StoredFiles, labelled: Labelled, options: DataOptions) -> FoundImages:
    """Return the images of shards. Class numbers are kept; names are ordered as those of folders.

    Raises:
        DataError: `data.table` is set; only some shards have a split; there is no train split; fewer than two classes,
            or a class without training images; a list of classes that does not fit.
    """
    if options.table is not None:
        raise DataError(f"data.table: the shards of {stored} give the labels themselves; leave it out")
    splits = labelled.splits
    present = [name for place, name in enumerate(SPLIT_NAMES) if (splits == place).any()]
    if present and (splits < 0).any():
        raise DataError(
            f"data.root: in {stored} some shards are named for a split and some are not; name all of them, or none"
        )
    if present and "train" not in present:
        raise DataError(f"data.root: {stored} has shards of {' and '.join(present)} but none of train; add them")
    counts = np.bincount(labelled.labels[splits <= 0], minlength=len(labelled.classes))
    classes = labelled.classes
    if len(classes) < 2:
        raise DataError(f"data.root: in {stored} expected two or more classes, found {len(classes)}")
    if not counts.all():
        raise DataError(
            f"data.root: in {stored} class {classes[int(counts.argmin())]!r} has no training images; add some"
        )
    notes = [f"images and labels are read from the shards of {stored}"]
    if options.class_order is not None or not labelled.is_numbered:
        classes, order_notes = order_classes(classes, options.class_order, (stored.folder,))
        notes += order_notes
    images = (
        FoundImage(os.fsdecode(name), labelled.classes[label], SPLIT_NAMES[split] if split >= 0 else None)
        for name, label, split in zip(labelled.images, labelled.labels.tolist(), splits.tolist(), strict=True)
    )
    place = {label: number for number, label in enumerate(classes)}
    ordered = sorted(images, key=lambda image: (image.split or "", place[image.label], image.name))
    return FoundImages(stored, stored.folder, classes, tuple(ordered), {}, tuple(notes))
