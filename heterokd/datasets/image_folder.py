"""Image folder: the user's images, one folder per class.

    ROOT/train/CLASS/*.jpg   ROOT/val/CLASS/*.jpg   ROOT/test/CLASS/*.jpg        used as they are
    ROOT/train/..., and one of ROOT/val, ROOT/test                               the missing one is split off train
    only ROOT/train/CLASS/*.jpg, or ROOT/CLASS/*.jpg                             split 60/20/20

Splits are seeded and stratified by class. PNG, JPEG, WebP and BMP are read, see `heterokd/datasets/io/read_image.py`;
other files are ignored.
"""

from __future__ import annotations

from pathlib import Path

from heterokd.datasets.io.image_files import LabelledFiles, class_folders, file_splits, list_classes, present_splits
from heterokd.datasets.io.split import HELD_OUT, SHARES, SPLIT_NAMES, Dataset, SplitName, Splits, stratified_split
from heterokd.errors import DataError


class ImageFolder(Dataset):
    """Images in folders: ROOT/SPLIT/CLASS/*.jpg, or ROOT/CLASS/*.jpg."""

    needs_root = True
    licence = "unknown (your own images)"

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images are decoded when read."""
        if root is None or not root.is_dir():
            raise DataError(f"data.root: there is no folder {root}; give the folder that holds the images")
        present = present_splits(root)
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
        found["train"], found[missing] = found["train"].hold_out(HELD_OUT, seed, class_names)
    return found
