"""PASCAL VOC 2012, segmentation: photographs with a class for every pixel, twenty classes and background.

Everingham, Van Gool, Williams, Winn, Zisserman: "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010,
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/:

    ROOT/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass}/
    ROOT/VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt

Test is the official val, 1449 images, because the official test labels are not public. A seeded `VAL_SHARE` of train
becomes val. Train is the official 1464 images or, as in most papers, the 10 582 of the augmented list if these are
present (Hariharan et al.: "Semantic Contours from Inverse Detectors", ICCV 2011):

    ROOT/VOCdevkit/VOC2012/SegmentationClassAug/
    ROOT/VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt

The canvas is `image_size` x `image_size`; 512 holds every image at its original size. The white borders of objects
(255) are IGNORE. `data.masks` sets other classes for images in this layout; the folder may then be ROOT itself.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from heterokd.datasets.io.image_files import path_array
from heterokd.datasets.io.label_maps import SceneFiles, label_files, scene_splits
from heterokd.datasets.io.options import DEFAULT_OPTIONS, DataOptions
from heterokd.datasets.io.split import Dataset, SplitName, Splits
from heterokd.datasets.io.tables import read_lines
from heterokd.datasets.masks.classes import KnownClasses
from heterokd.datasets.masks.found_classes import mask_classes
from heterokd.datasets.masks.settings import MaskClass, MaskSettings
from heterokd.datasets.views.policy import POLICIES
from heterokd.errors import DataError

FOLDER = "VOCdevkit/VOC2012"
LISTS = "ImageSets/Segmentation"
AUGMENTED_LIST, AUGMENTED_LABELS = "train_aug.txt", "SegmentationClassAug"
VAL_SHARE = 0.1
ADVICE = (
    "download the training/validation data of VOC2012 (VOCtrainval_11-May-2012.tar) from "
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and unpack it there"
)
CLASS_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOC2012(Dataset):
    """Photographs with a class for every pixel, twenty classes and background (Everingham et al. 2010)."""

    needs_root = True
    tasks = "segmentation"
    default_policy = POLICIES["scenes"]
    licence = "the terms of Flickr, where its photographs come from"
    reads = frozenset({"masks", "drawn_at", "group"})

    def load(self, root: Path | None, image_size: int, seed: int) -> Splits:
        """List the files of each split; images and label maps are decoded when read."""
        return self.load_with(root, image_size, seed, DEFAULT_OPTIONS)

    def load_with(self, root: Path | None, image_size: int, seed: int, options: DataOptions) -> Splits:
        """List the files of each split, with the classes and shares of `options.masks`."""
        masks = options.masks or MaskSettings()
        above = Path(root or ".")
        folder = above if not (above / FOLDER).exists() and (above / LISTS).is_dir() else above / FOLDER
        lists = folder / LISTS
        test = _pairs(folder, read_lines(lists / "val.txt", ADVICE), "SegmentationClass")
        found = {path for path in (lists / AUGMENTED_LIST, folder / AUGMENTED_LABELS) if path.exists()}
        if len(found) == 1:
            raise DataError(
                f"{folder}: has only {found.pop().name}; the augmented training set needs both "
                f"{LISTS}/{AUGMENTED_LIST} and {AUGMENTED_LABELS}: add the other or remove it"
            )
        if found:
            train = _pairs(folder, read_lines(lists / AUGMENTED_LIST, ADVICE), AUGMENTED_LABELS)
        else:
            train = _pairs(folder, read_lines(lists / "train.txt", ADVICE), "SegmentationClass")
        shared = np.intersect1d(train.images, test.images)
        if len(shared):
            name = AUGMENTED_LIST if found else "train.txt"
            raise DataError(
                f"{lists / name}: lists {len(shared)} image(s) of val.txt, such as {os.fsdecode(shared[0])}, which are "
                f"the test images here; use a list without them"
            )
        kept, held_out = train.hold_out(masks.val_share or VAL_SHARE, seed, options.group)
        files: dict[SplitName, SceneFiles] = {"train": kept, "val": held_out, "test": test}
        known = KnownClasses(tuple(MaskClass(name=name) for name in CLASS_NAMES))
        files = {
            name: replace(part, padding=options.padding, drawn_at=options.drawn_at) for name, part in files.items()
        }
        classes = mask_classes(masks, folder, label_files(files), ADVICE, known)
        return scene_splits("voc2012", files, classes, (image_size, image_size), ADVICE)


def _pairs(folder: Path, lines: list[str], labels: str) -> SceneFiles:
    """List the images that a file names by id (2007_000032), or by the paths of image and label map."""
    ids = [PurePosixPath(line.split()[0]).stem for line in lines if line.strip()]
    return SceneFiles(
        folder, path_array(f"JPEGImages/{name}.jpg" for name in ids), path_array(f"{labels}/{name}.png" for name in ids)
    )
