"""Digits: 1797 handwritten digits that ship with scikit-learn; no download.

Alpaydin, Kaynak: "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49 (its test part, 8x8 pixels of 17 grey levels). Enlarged with a bicubic filter; a seeded
split of 60/20/20, stratified by class.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heterokd.datasets.io.images import ArrayImages
from heterokd.datasets.io.split import SHARES, SPLIT_NAMES, Dataset, Split, Splits, stratified_split
from heterokd.datasets.views.policy import POLICIES

MAX_LEVEL = 16


class Digits(Dataset):
    """1797 handwritten digits, ten classes; embedded, no download."""

    default_policy = POLICIES["digits"]
    licence = "CC BY 4.0 (UCI Machine Learning Repository)"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """Load all images into memory."""
        levels, labels = read_digits()
        images = np.stack([_enlarge(image, image_size) for image in levels])
        index_of = stratified_split(labels, SHARES, seed)
        digest = hashlib.sha256(f"digits:{image_size}".encode())
        for part in (images, labels, *index_of):
            digest.update(np.ascontiguousarray(part).tobytes())
        splits = {
            name: Split(ArrayImages(images[index]), labels[index], name)
            for name, index in zip(SPLIT_NAMES, index_of, strict=True)
        }
        names = tuple(map(str, range(10)))
        return Splits(**splits, class_names=names, image_size=image_size, fingerprint=digest.hexdigest(), notes=())


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Read the levels [1797, 8, 8], 0 to `MAX_LEVEL`, and the class numbers [1797] that scikit-learn ships.

    The file is read without importing scikit-learn, which would take 145 MiB in every process.
    """
    package = find_spec("sklearn")
    places = (package.submodule_search_locations or []) if package else []
    for file in (Path(place) / "datasets" / "data" / "digits.csv.gz" for place in places):
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    content = load_digits()
    return np.asarray(content.images, np.float64), np.asarray(content.target, np.int64)


def _enlarge(levels: NDArray[np.float64], image_size: int) -> NDArray[np.uint8]:
    """Enlarge an image, [8, 8] in 0..16 -> [S, S, 3] uint8."""
    grey = Image.fromarray(np.rint(levels * (255 / MAX_LEVEL)).astype(np.uint8))
    large = np.asarray(grey.resize((image_size, image_size), Image.Resampling.BICUBIC))
    return np.repeat(large[:, :, None], 3, axis=2)
