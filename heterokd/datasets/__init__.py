"""Every data set, one a file: the folder is the list.

`DATASETS` maps a file's name to the one `Dataset` defined in it: `datasets/digits.py` -> `DATASETS["digits"]`. A file
is imported when its data set is looked up; the names alone cost nothing.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from heterokd.datasets.io.split import Dataset, Splits
from heterokd.errors import DataError, did_you_mean
from heterokd.extensions import Implementations

DATASETS: Implementations[Dataset] = Implementations(__name__, "heterokd.datasets.io.split:Dataset", __name__)


def load_dataset(
    dataset: str | type[Dataset],
    root: str | Path | None = None,
    image_size: int = 32,
    seed: int = 0,
    labels_per_class: int | None = None,
    train_images: int | None = None,
) -> Splits:
    """A data set, split; the same arguments give the same object within a process (a changed folder is not noticed).

    Args:
        dataset: a key of `DATASETS`, or a class of your own.
        root: folder of the data set, for those that need one.
        image_size: height = width in pixels.
        seed: of the split and of the choice of labels.
        labels_per_class: keep this many training images of each class.
        train_images: keep this many training images, whatever they show.

    Raises:
        DataError: an unknown name, a missing root, or what the data set itself finds wrong.
    """
    if isinstance(dataset, str) and dataset not in DATASETS:
        raise DataError(f"there is no data set {dataset!r}; {did_you_mean(dataset, DATASETS)}")
    kind = DATASETS[dataset] if isinstance(dataset, str) else dataset
    if kind.needs_root and root is None:
        raise DataError(f"data set {dataset!r} is read from a folder: set data.root to it")
    folder = Path(root) if root is not None and kind.needs_root else None
    return _load(kind, folder, image_size, seed, labels_per_class, train_images)


@lru_cache(maxsize=8)
def _load(
    kind: type[Dataset],
    root: Path | None,
    image_size: int,
    seed: int,
    labels_per_class: int | None,
    train_images: int | None,
) -> Splits:
    if train_images is not None:
        return _load(kind, root, image_size, seed, labels_per_class, None).with_train_images(train_images, seed)
    if labels_per_class is not None:
        return _load(kind, root, image_size, seed, None, None).with_labels_per_class(labels_per_class, seed)
    return kind().load(root, image_size, seed)
