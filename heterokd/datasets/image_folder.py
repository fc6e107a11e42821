"""Image folder: images of the user, one folder per class.

    ROOT/train/CLASS/*.jpg   ROOT/val/CLASS/*.jpg   ROOT/test/CLASS/*.jpg        taken as they are
    ROOT/train/..., and one of ROOT/val, ROOT/test                               the missing one is carved out of train
    ROOT/train/CLASS/*.jpg alone, or ROOT/CLASS/*.jpg                            split 60/20/20

Carving is by class and seed. PNG, JPEG, WebP and BMP are read; other files are ignored. How an image is read is told in
`heterokd/datasets/io/image_files.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from heterokd.datasets.io.image_files import LabelledFiles, class_folders, file_splits, list_classes
from heterokd.datasets.io.split import HELD_OUT, SHARES, SPLIT_NAMES, Dataset, SplitName, Splits, stratified_split
from heterokd.errors import DataError


class ImageFolder(Dataset):
    """Images in folders: ROOT/SPLIT/CLASS/*.jpg, or ROOT/CLASS/*.jpg."""

    needs_root: ClassVar[bool] = True
    licence: ClassVar[str] = "unknown (your own images)"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images are decoded when read."""
        if root is None or not root.is_dir():
            raise DataError(f"data.root: there is no folder {root}; give the folder that holds the images")
        present: list[SplitName] = [name for name in SPLIT_NAMES if (root / name).is_dir()]
        if present and "train" not in present:
            raise DataError(f"{root}: has {' and '.join(present)} but no train; add {root / 'train'}")
        class_names = class_folders(root / "train" if present else root)
        return file_splits("image_folder", _find(root, present, class_names, seed), class_names, image_size)


def _find(
    root: Path, present: list[SplitName], class_names: tuple[str, ...], seed: int
) -> dict[SplitName, LabelledFiles]:
    if present in ([], ["train"]):
        files = list_classes(root, "train" if present else "", class_names)
        parts = stratified_split(files.labels, SHARES, seed, class_names)
        return {name: files.chosen(part) for name, part in zip(SPLIT_NAMES, parts, strict=True)}
    found = {name: list_classes(root, name, class_names) for name in present}
    for missing in (name for name in SPLIT_NAMES if name not in present):
        train = found["train"]
        kept, held_out = stratified_split(train.labels, (1 - HELD_OUT, HELD_OUT), seed, class_names)
        found["train"], found[missing] = train.chosen(kept), train.chosen(held_out)
    return found
