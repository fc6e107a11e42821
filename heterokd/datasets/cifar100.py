"""CIFAR-100: 60 000 photographs of 32x32 pixels, 100 classes.

Krizhevsky: "Learning Multiple Layers of Features from Tiny Images", University of Toronto, 2009,
https://www.cs.toronto.edu/~kriz/cifar.html, of which the "python version" is read:

    ROOT/cifar-100-python/{train,test,meta}

Test is the official test set, 10 000 images; the official 50 000 training images are split 90/10 into train and val,
seeded and stratified by class. Labels are the fine ones. At an `image_size` other than 32 images are resized when they
are read, so that memory holds only 32 pixels. Views: `cifar` up to 32 pixels, `crop` above, since OFA-KD trains at 224.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.io.images import ArrayImages, ChosenImages, ResizedImages
from heterokd.datasets.io.split import Dataset, Split, Splits, stratified_split
from heterokd.datasets.views.policy import POLICIES, AugmentPolicy
from heterokd.errors import DataError

FOLDER = "cifar-100-python"
SIDE = 32
VAL_SHARE = 0.1
ADVICE = "download the python version of CIFAR-100 from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there"


class CIFAR100(Dataset):
    """60 000 photographs of 32x32 pixels, 100 classes (Krizhevsky 2009)."""

    needs_root = True
    default_policy = POLICIES["cifar"]
    licence = "unknown (its page states none, and asks to cite the technical report)"

    @classmethod
    def policy_at(cls, image_size: int) -> AugmentPolicy:
        """Return small shifts up to 32 pixels, random crops for enlarged images."""
        return cls.default_policy if image_size <= SIDE else POLICIES["crop"]

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """Load all images into memory at 32x32 pixels."""
        folder = Path(root or ".") / FOLDER
        class_names = _read_names(folder / "meta")
        pixels, labels = _read_batch(folder / "train", class_names)
        test_pixels, test_labels = _read_batch(folder / "test", class_names)
        train_index, val_index = stratified_split(labels, (1 - VAL_SHARE, VAL_SHARE), seed, class_names)
        digest = hashlib.sha256(f"cifar100:{image_size}".encode())
        for part in (pixels, labels, test_pixels, test_labels, train_index, val_index):
            digest.update(np.ascontiguousarray(part).data)

        def images(array: NDArray[np.uint8]) -> ArrayImages | ResizedImages:
            return ArrayImages(array) if image_size == SIDE else ResizedImages(array, image_size)

        both = images(pixels)  # train and val share one array
        return Splits(
            train=Split(ChosenImages(both, train_index), labels[train_index], "train"),
            val=Split(ChosenImages(both, val_index), labels[val_index], "val"),
            test=Split(images(test_pixels), test_labels, "test"),
            class_names=class_names,
            image_size=image_size,
            fingerprint=digest.hexdigest(),
        )


def _read_names(path: Path) -> tuple[str, ...]:
    names = _read(path).get("fine_label_names")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, bytes | str) for name in names):
        raise _damaged(path, "holds no list `fine_label_names`")
    return tuple(_text(name) for name in names)


def _read_batch(path: Path, class_names: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read pixels [N, 32, 32, 3] and labels [N] of a file, which stores images as rows of three planes."""
    content = _read(path)
    rows, fine = content.get("data"), content.get("fine_labels")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (3 * SIDE**2,):
        raise _damaged(path, f"holds no `data` of N x {3 * SIDE**2} bytes")
    if not isinstance(fine, list) or len(fine) != len(rows) or not all(type(label) is int for label in fine):
        raise _damaged(path, f"holds no `fine_labels` for its {len(rows)} images")
    labels = np.array(fine, np.int64)
    if set(fine) != set(range(len(class_names))):
        raise _damaged(path, f"has labels other than all of 0 to {len(class_names) - 1}, which `meta` names")
    pixels = np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return pixels, labels


def _read(path: Path) -> dict[str, object]:
    """Unpickle a file's dict.

    Raises:
        DataError: the file is missing, damaged, or holds more than a dict of arrays, lists and text.
    """
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except OSError:
        raise DataError(f"{path}: is missing; {ADVICE}") from None
    # A damaged pickle can raise any exception.
    except Exception as error:  # noqa: BLE001
        raise _damaged(path, f"cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise _damaged(path, "holds no dict")
    return {_text(key): value for key, value in content.items() if isinstance(key, bytes | str)}


def _text(value: bytes | str) -> str:
    """Decode text; the official files were written by Python 2, so that it is unpickled as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; {ADVICE}")


def _dtype(code: bytes | str, *_: object) -> np.dtype[np.generic]:
    """Build a `numpy.dtype` as pickles do; Python 2 passed 0 and 1 for numpy's booleans."""
    return np.dtype(_text(code), copy=True)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """Encode as `_codecs.encode`, by which Python 3 writes bytes for Python 2."""
    return text.encode(encoding)


_ARRAY = np.zeros(1, np.uint8)
# numpy renamed `core` to `_core`; its two constructors have no public name, so they are read from an array.
_PLAIN: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _ARRAY.__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _ARRAY.__reduce_ex__(5)[0] for core in ("core", "_core")},
}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays, dicts, lists, numbers and text only: other pickles can call arbitrary functions."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module_name: str, global_name: str) -> object:
        """Return a constructor that arrays need."""
        if (module_name, global_name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it would run {module_name}.{global_name}")
        return _PLAIN[module_name, global_name]
