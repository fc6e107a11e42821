"""ImageNet-1k: 1.28 million photographs, a thousand classes.

Russakovsky et al.: "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015, https://arxiv.org/abs/1409.0575;
from https://image-net.org/download.php (with an account). One folder a class in both splits:

    ROOT/train/n01440764/*.JPEG   ROOT/val/n01440764/*.JPEG   ROOT/LOC_synset_mapping.txt (optional: the classes' names)

Test is the official validation set, 50 000 images, whose own test labels are not public; 2 % of the official training
images, 26 a class, become val by class and seed. A subset of the classes works as well. A class's number is the place
of its folder in sorted order, as everywhere.

Images are read as middle squares of `image_size` and views are cropped from those: take a larger `image_size` than the
networks' (256 for 224) for sharper small crops.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar

from heterokd.datasets.io.image_files import LabelledFiles, class_folders, file_splits, list_classes, read_pairs
from heterokd.datasets.io.split import Dataset, SplitName, Splits, stratified_split
from heterokd.datasets.views.policy import POLICIES, AugmentPolicy
from heterokd.errors import DataError

VAL_SHARE = 0.02
NAMES = "LOC_synset_mapping.txt"
ADVICE = (
    "download ILSVRC2012 from https://image-net.org/download.php and unpack it there, "
    "the validation images into one folder a class as well"
)


class ImageNet(Dataset):
    """1.28 million photographs, a thousand classes (Russakovsky et al. 2015)."""

    needs_root: ClassVar[bool] = True
    default_policy: ClassVar[AugmentPolicy] = POLICIES["standard"]
    licence: ClassVar[str] = "non-commercial research and education alone (terms of access of image-net.org)"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images are decoded when read."""
        root = Path(root or ".")
        for folder in (root / "train", root / "val"):
            if not folder.is_dir():
                raise DataError(f"{folder}: there is no such folder; {ADVICE}")
            if not any(path.is_dir() for path in folder.iterdir()):
                raise DataError(f"{folder}: holds no folders of classes (n01440764, ...); {ADVICE}")
        folders = class_folders(root / "train")
        train, test = (list_classes(root, name, folders) for name in ("train", "val"))
        kept, held_out = stratified_split(train.labels, (1 - VAL_SHARE, VAL_SHARE), seed, folders)
        files: dict[SplitName, LabelledFiles] = {
            "train": train.chosen(kept),
            "val": train.chosen(held_out),
            "test": test,
        }
        return file_splits("imagenet", files, _class_names(root / NAMES, folders), image_size, ADVICE)


def _class_names(path: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Read the class names; a name that two classes share is followed by the class's folder."""
    if not path.exists():
        return folders
    advice = f"take {NAMES} of the challenge as it is, or remove it"
    name_of = read_pairs(path, advice)
    for folder in folders:
        if folder not in name_of:
            raise DataError(f"{path}: has no line for class {folder!r}; {advice}")
    count_of = Counter(name_of[folder] for folder in folders)
    return tuple(
        name_of[folder] if count_of[name_of[folder]] == 1 else f"{name_of[folder]} ({folder})" for folder in folders
    )
