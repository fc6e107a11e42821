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
    name: str,
    root: str | Path | None = None,
    image_size: int = 32,
    seed: int = 0,
    labels_per_class: int | None = None,
    train_images: int | None = None,
) -> Splits:
    """A data set, split; the same arguments give the same object within a process (a changed folder is not noticed).

    Args:
        name: a key of `DATASETS`.
        root: folder of the data set, for those that need one.
        image_size: height = width in pixels.
        seed: of the split and of the choice of labels.
        labels_per_class: keep this many training images of each class.
        train_images: keep this many training images, whatever they show.

    Raises:
        DataError: an unknown name, a missing root, or what the data set itself finds wrong.
    """
    if name not in DATASETS:
        raise DataError(f"there is no data set {name!r}; {did_you_mean(name, DATASETS)}")
    if DATASETS[name].needs_root and root is None:
        raise DataError(f"data set {name!r} is read from a folder: set data.root to it")
    folder = Path(root) if root is not None and DATASETS[name].needs_root else None
    return _load(name, folder, image_size, seed, labels_per_class, train_images)


@lru_cache(maxsize=8)
def _load(
    name: str, root: Path | None, image_size: int, seed: int, labels_per_class: int | None, train_images: int | None
) -> Splits:
    if train_images is not None:
        return _load(name, root, image_size, seed, labels_per_class, None).with_train_images(train_images, seed)
    if labels_per_class is not None:
        return _load(name, root, image_size, seed, None, None).with_labels_per_class(labels_per_class, seed)
    return DATASETS[name]().load(root, image_size, seed)
