"""FGVC-Aircraft: 10 000 photographs of aircraft, 100 variants.

Maji, Kannala, Rahtu, Blaschko, Vedaldi: "Fine-Grained Visual Classification of Aircraft", 2013,
https://arxiv.org/abs/1306.5151; from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/:

    ROOT/fgvc-aircraft-2013b/data/{variants.txt,images_variant_train.txt,images_variant_val.txt,images_variant_test.txt}
    ROOT/fgvc-aircraft-2013b/data/images/<id>.jpg

Train, val and test are the official splits, a third each, for every seed. Labels are the variants. The lowest 20 rows
of every image, a banner with the photographer's name, are cropped as the authors ask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from heterokd.datasets.io.image_files import LabelledFiles, file_splits, path_array
from heterokd.datasets.io.split import SPLIT_NAMES, Dataset, Splits
from heterokd.datasets.io.tables import read_lines, read_pairs
from heterokd.datasets.views.policy import POLICIES
from heterokd.errors import DataError

FOLDER = Path("fgvc-aircraft-2013b", "data")
WITHOUT_BANNER = (0.0, 0.0, 0.0, -20.0)
ADVICE = (
    "download FGVC-Aircraft (fgvc-aircraft-2013b.tar.gz) from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ "
    "and unpack it there"
)


class FGVCAircraft(Dataset):
    """10 000 photographs of aircraft, 100 variants (Maji et al. 2013)."""

    needs_root = True
    default_policy = POLICIES["standard"]
    licence = "non-commercial research only"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images are decoded when read."""
        folder = Path(root or ".") / FOLDER
        class_names = tuple(name.strip() for name in read_lines(folder / "variants.txt", ADVICE))
        number_of = {name: number for number, name in enumerate(class_names)}
        files = {name: _read_split(folder, f"images_variant_{name}.txt", number_of) for name in SPLIT_NAMES}
        return file_splits("fgvc_aircraft", files, class_names, image_size, ADVICE)


def _read_split(folder: Path, name: str, number_of: dict[str, int]) -> LabelledFiles:
    path = folder / name
    variant_of = read_pairs(path, ADVICE)
    for key, variant in variant_of.items():
        if variant not in number_of:
            raise DataError(f"{path}: image {key} is of variant {variant!r}, which variants.txt lacks; {ADVICE}")
    for variant in sorted(number_of.keys() - set(variant_of.values())):
        raise DataError(f"{path}: has no image of variant {variant!r}; {ADVICE}")
    names = path_array(f"images/{key}.jpg" for key in variant_of)
    labels = np.array([number_of[variant] for variant in variant_of.values()], np.int64)
    return LabelledFiles(folder, names, labels, WITHOUT_BANNER)
