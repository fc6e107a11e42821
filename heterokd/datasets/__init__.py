"""Data sets, one per file.

`DATASETS` maps a file's name to the `Dataset` defined in it: `datasets/digits.py` -> `DATASETS["digits"]`. A file
is imported when its data set is looked up; listing the names imports nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from heterokd.datasets.io.options import DEFAULT_OPTIONS, DataOptions
from heterokd.datasets.io.split import Dataset, Splits
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.errors import DataError, did_you_mean
from heterokd.extensions import Implementations

DATASETS: Implementations[Dataset] = Implementations(__name__, "heterokd.datasets.io.split:Dataset", __name__)


# Seven parameters: keys of the section `data`.
def load_dataset(
    dataset: str | type[Dataset],
    root: str | Path | StoredFiles | None = None,
    image_size: int = 32,
    seed: int = 0,
    labels_per_class: int | None = None,
    train_images: int | None = None,
    options: DataOptions = DEFAULT_OPTIONS,
) -> Splits:
    """Load and split a data set; cached per process, so that later changes of the folder are not read.

    Args:
        dataset: a key of `DATASETS`, or a subclass of `Dataset`.
        root: folder of the data set, or its files in a store, if it needs a folder.
        image_size: height = width in pixels.
        seed: seed of the split and of the images that are kept.
        labels_per_class: number of training images to keep of each class.
        train_images: number of training images to keep.
        options: how files are found and read, for data sets that read them, see `Dataset.reads`.

    Raises:
        DataError: the name is unknown, the root is missing, or the data set cannot be loaded.
    """
    if isinstance(dataset, str) and dataset not in DATASETS:
        raise DataError(f"there is no data set {dataset!r}; {did_you_mean(dataset, DATASETS)}")
    kind = DATASETS[dataset] if isinstance(dataset, str) else dataset
    if kind.needs_root and root is None:
        raise DataError(f"data set {dataset!r} is read from a folder: set data.root to it")
    folder = Path(root) if isinstance(root, str) else root
    if not kind.needs_root:
        folder = None
    splits = _load(kind, folder, image_size, seed, options)
    if labels_per_class is not None:
        splits = splits.with_labels_per_class(labels_per_class, seed)
    return splits if train_images is None else splits.with_train_images(train_images, seed)


@lru_cache(maxsize=8)
def _load(
    kind: type[Dataset], root: Path | StoredFiles | None, image_size: int, seed: int, options: DataOptions
) -> Splits:
    if not isinstance(root, StoredFiles):
        return kind().load_with(root, image_size, seed, options)

    def named(text: str) -> str:
        return text.replace(str(root.folder), root.url)

    try:
        splits = kind().load_stored(root, image_size, seed, options)
    except DataError as error:
        raise DataError(named(str(error))) from error
    return replace(splits, notes=tuple(map(named, splits.notes)))
