"""ImageNet-1k: 1.28 million photographs, 1000 classes.

Russakovsky et al.: "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015, https://arxiv.org/abs/1409.0575;
from https://image-net.org/download.php (with an account). One folder per class in both splits:

    ROOT/train/n01440764/*.JPEG   ROOT/val/n01440764/*.JPEG   ROOT/LOC_synset_mapping.txt (optional: the classes' names)

Test is the official validation set, 50 000 images, because the official test labels are not public; a seeded 2 % of the
official training images, 26 per class, become val. A subset of the classes works as well. A class's number is the
position of its folder in sorted order, as in other data sets.

Images are read as centre squares of `image_size`, and views are cropped from these: for sharper small crops set a
larger `image_size` than the networks' (256 for 224).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from heterokd.datasets.io.image_files import LabelledFiles, class_folders, file_splits, list_classes
from heterokd.datasets.io.saved_index import indexed_splits
from heterokd.datasets.io.split import Dataset, SplitName, Splits
from heterokd.datasets.io.tables import read_pairs
from heterokd.datasets.views.policy import POLICIES
from heterokd.errors import DataError

VAL_SHARE = 0.02
NAMES = "LOC_synset_mapping.txt"
ADVICE = (
    "download ILSVRC2012 from https://image-net.org/download.php and unpack it there, "
    "the validation images into one folder per class as well"
)


class ImageNet(Dataset):
    """1.28 million photographs, 1000 classes (Russakovsky et al. 2015)."""

    needs_root = True
    default_policy = POLICIES["standard"]
    licence = "non-commercial research and education only (terms of access of image-net.org)"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images are decoded when read."""
        root = Path(root or ".")
        for folder in (root / "train", root / "val"):
            if not folder.is_dir():
                raise DataError(f"{folder}: there is no such folder; {ADVICE}")
            if not any(path.is_dir() for path in folder.iterdir()):
                raise DataError(f"{folder}: holds no folders of classes (n01440764, ...); {ADVICE}")
        settings = {"dataset": "imagenet", "image_size": image_size, "seed": seed}
        return indexed_splits(lambda: _listed(root, image_size, seed), root, settings, lambda: _watched(root))


def _listed(root: Path, image_size: int, seed: int) -> Splits:
    folders = class_folders(root / "train")
    train, test = (list_classes(root, name, folders) for name in ("train", "val"))
    kept, held_out = train.hold_out(VAL_SHARE, seed, folders)
    files: dict[SplitName, LabelledFiles] = {"train": kept, "val": held_out, "test": test}
    return file_splits("imagenet", files, _class_names(root / NAMES, folders), image_size, ADVICE)


def _watched(root: Path) -> list[Path]:
    """Return everything whose change adds, removes or renames an image or a class."""
    tops = [root / "train", root / "val"]
    found = [root, *tops, *(top / name for top in tops for name in class_folders(top))]
    return [*found, root / NAMES] if (root / NAMES).exists() else found


def _class_names(path: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Read the class names; the class's folder is appended to names of several classes."""
    if not path.exists():
        return folders
    advice = f"use the original {NAMES} of the challenge, or remove it"
    name_of = read_pairs(path, advice)
    for folder in folders:
        if folder not in name_of:
            raise DataError(f"{path}: has no line for class {folder!r}; {advice}")
    names = [name_of[folder] for folder in folders]
    count_of = Counter(names)
    return tuple(
        name if count_of[name] == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)
    )
