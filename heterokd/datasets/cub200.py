"""CUB-200-2011: 11 788 photographs of birds, 200 species.

Wah, Branson, Welinder, Perona, Belongie: "The Caltech-UCSD Birds-200-2011 Dataset", California Institute of Technology,
CNS-TR-2011-001, https://www.vision.caltech.edu/datasets/cub_200_2011/:

    ROOT/CUB_200_2011/{images.txt,image_class_labels.txt,train_test_split.txt,classes.txt,images/}

Test is the official test set, 5794 images; of the official 5994 training images a seeded 10 % of each class become val.
Bounding boxes are not used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from heterokd.datasets.io.image_files import LabelledFiles, file_splits, path_array
from heterokd.datasets.io.split import Dataset, SplitName, Splits
from heterokd.datasets.io.tables import read_pairs
from heterokd.datasets.views.policy import POLICIES
from heterokd.errors import DataError

FOLDER = "CUB_200_2011"
VAL_SHARE = 0.1
ADVICE = (
    "download CUB-200-2011 (CUB_200_2011.tgz) from https://www.vision.caltech.edu/datasets/cub_200_2011/ "
    "and unpack it there"
)


class CUB200(Dataset):
    """11 788 photographs of birds, 200 species (Wah et al. 2011)."""

    needs_root = True
    default_policy = POLICIES["standard"]
    licence = "non-commercial research and education only; the photographs belong to their authors"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images are decoded when read."""
        folder = Path(root or ".") / FOLDER
        name_of = read_pairs(folder / "images.txt", ADVICE)
        class_of = read_pairs(folder / "classes.txt", ADVICE)
        number_of = {key: number for number, key in enumerate(class_of)}
        classes = _column(folder / "image_class_labels.txt", name_of, frozenset(number_of))
        labels = np.array([number_of[key] for key in classes], np.int64)
        in_train = np.array(_column(folder / "train_test_split.txt", name_of, frozenset("01"))) == "1"
        class_names = tuple(name.partition(".")[2].replace("_", " ") or name for name in class_of.values())
        names = path_array(f"images/{name}" for name in name_of.values())
        files = LabelledFiles(folder, names, labels)
        train, test = (files.chosen(np.flatnonzero(part)) for part in (in_train, ~in_train))
        for part, what in ((train, "training"), (test, "test")):
            without = np.setdiff1d(np.arange(len(class_names)), part.labels)
            if len(without):
                path = folder / "train_test_split.txt"
                raise DataError(f"{path}: class {class_names[without[0]]!r} has no {what} images; {ADVICE}")
        kept, held_out = train.hold_out(VAL_SHARE, seed, class_names)
        splits: dict[SplitName, LabelledFiles] = {"train": kept, "val": held_out, "test": test}
        return file_splits("cub200", splits, class_names, image_size, ADVICE)


def _column(path: Path, name_of: dict[str, str], known: frozenset[str]) -> list[str]:
    """Read a file's value for each image, in the order of images.txt.

    Raises:
        DataError: an image is missing, or its value is unknown.
    """
    value_of = read_pairs(path, ADVICE)
    for key in name_of:
        if key not in value_of:
            raise DataError(f"{path}: has no line for image {key} of images.txt; {ADVICE}")
        if value_of[key] not in known:
            raise DataError(f"{path}: image {key} has the unknown value {value_of[key]!r}; {ADVICE}")
    return [value_of[key] for key in name_of]
