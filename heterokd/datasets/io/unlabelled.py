"""Images without labels: those of a folder, or the training images whose labels are not used.

They follow the labelled images in `Splits.seen`. val and test never change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.io.image_files import SIZES_SAMPLE, FileImages, LabelledFiles, file_size, path_array
from heterokd.datasets.io.images import positions_in_source, source_of
from heterokd.datasets.io.options import FIRST_READER, DataOptions
from heterokd.datasets.io.read_image import FIRST_READING, Reading
from heterokd.datasets.io.split import REST, Split, SplitName, Splits
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.datasets.io.value_range import GivenRange, ScannedRange
from heterokd.datasets.io.walk import list_images
from heterokd.errors import DataError
from heterokd.outputs import UNLABELLED

KEY = "data.unlabelled"


def with_rest(splits: Splits, whole: Split) -> Splits:
    """Return the splits with the training images whose labels are not used as images without labels.

    Args:
        splits: splits of which some training images are kept.
        whole: all training images.

    Raises:
        DataError: all training images are kept.
    """
    kept = np.arange(len(whole)) if splits.train.kept is None else splits.train.kept
    rest = np.setdiff1d(np.arange(len(whole)), kept)
    if not len(rest):
        raise DataError(
            f"{KEY}: all {len(whole)} training images have labels; lower data.labels_per_class or data.train_images, "
            "or give a folder of images without labels"
        )
    others = replace(whole.chosen(rest), weights=None, groups=None, kept=rest)
    note = f"unlabelled: the other {len(rest)} training images, without their labels"
    return _with(splits, others, REST, [note])


def with_folder(splits: Splits, folder: Path | StoredFiles, options: DataOptions) -> Splits:
    """Return the splits with the images below a folder, at any depth, as images without labels.

    Files are read as those of the data set.

    Raises:
        DataError: there is no folder, or no images; a file is empty or missing, or has a label in the data set.
    """
    names, unread = list_images(folder, KEY)
    if not names:
        raise DataError(f"{KEY}: {folder} holds no images that Pillow decodes; {'; '.join(unread) or 'it is empty'}")
    listed = path_array(names)
    labels = np.full(len(names), UNLABELLED, np.int64)
    files = LabelledFiles(folder, listed, labels, reading=_reading(splits, folder, listed, options))
    for split in (splits.train, splits.val, splits.test):
        _refuse_members(files, split)
    digest = hashlib.sha256(files.reading.identity.encode())
    every = -(-len(files) // SIZES_SAMPLE)
    for position, name in enumerate(names):
        size = file_size(files, position, "restore or remove it") if position % every == 0 else ""
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    others = Split(FileImages(files, splits.image_size), labels, "train")
    note = f"unlabelled: {len(names)} images below {folder}"
    return _with(splits, others, digest.hexdigest(), [note, *unread])


def training_images(splits: Splits) -> dict[str, int]:
    """Return the number of `labelled` and of `unlabelled` training images."""
    return {"labelled": len(splits.train), "unlabelled": len(splits.seen) - len(splits.train)}


def copies_of_held_out(splits: Splits) -> dict[SplitName, list[str]]:
    """Return the names of files without labels that are exact copies of images of val and of test.

    Only files are compared, and of val and test only those whose size in bytes occurs.
    """
    others = None if splits.unlabelled is None else _files(splits.unlabelled)
    if others is None:
        return {}
    of_size: dict[int | None, list[int]] = {}
    for position in range(len(others)):
        of_size.setdefault(others.size(position), []).append(position)
    return {split.name: sorted(set(_copies(split, others, of_size))) for split in (splits.val, splits.test)}


def _copies(split: Split, others: LabelledFiles, of_size: dict[int | None, list[int]]) -> Iterator[str]:
    """Yield the names of the files without labels whose bytes are those of an image of a split."""
    files = _files(split)
    if files is None:
        return
    for position in positions_in_source(split.images, np.arange(len(split))).tolist():
        same_size = of_size.get(files.size(position), ())
        if same_size:
            content = files.path(position).read_bytes()
            yield from (others.name(other) for other in same_size if others.path(other).read_bytes() == content)


def _files(split: Split) -> LabelledFiles | None:
    source = source_of(split.images)
    return source.files if isinstance(source, FileImages) else None


def _reading(splits: Splits, folder: Path | StoredFiles, names: NDArray[np.bytes_], options: DataOptions) -> Reading:
    files = _files(splits.train)
    if files is not None:
        return files.reading
    if options.reader == FIRST_READER:
        return replace(FIRST_READING, max_megapixels=options.max_megapixels)
    values = ScannedRange(folder, names) if options.value_range == "auto" else GivenRange(*options.value_range)
    return Reading(options.background, values, options.max_megapixels)


def _refuse_members(files: LabelledFiles, split: Split) -> None:
    """Raise DataError if a file of a split is among the files without labels."""
    members = _files(split)
    if members is None or type(members.folder) is not type(files.folder):
        return
    here, there = _place(files.folder), _place(members.folder)
    if here != there and here not in there.parents and there not in here.parents:
        return
    unlabelled = {here / files.name(position) for position in range(len(files))}
    for position in positions_in_source(split.images, np.arange(len(split))).tolist():
        if there / members.name(position) in unlabelled:
            raise DataError(
                f"{KEY}: {files.folder} holds labelled images of {split.name} ({members.name(position)}); give a "
                "folder apart from the folders of classes"
            )


def _place(folder: Path | StoredFiles) -> Path:
    return Path(folder.url) if isinstance(folder, StoredFiles) else folder.resolve()


def _with(splits: Splits, others: Split, identity: str, notes: list[str]) -> Splits:
    others = replace(others, labels=np.full(len(others), UNLABELLED, np.int64), unlabelled=len(others))
    digest = hashlib.sha256(f"{splits.fingerprint}:unlabelled={identity}".encode())
    return replace(splits, unlabelled=others, fingerprint=digest.hexdigest(), notes=(*splits.notes, *notes))
