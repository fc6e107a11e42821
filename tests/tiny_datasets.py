"""Tiny copies of data sets, in exactly the format in which the real ones are shipped: of noise, no two images alike."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

EVERY_SPLIT = frozenset({"train", "val", "test"})


@dataclass(frozen=True)
class Tiny:
    """How a data set is tested.

    Attributes:
        write: makes a tiny copy of it in an empty folder; at least six training images of each class after the split.
        drawn: the splits that the seed decides; the others are shipped.
    """

    write: Callable[[Path], None]
    drawn: frozenset[str] = EVERY_SPLIT


def noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_classes(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Images of unlike shapes and kinds, one folder a class."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise(rng, 30, 20 + number % 3).save(folder / name / f"{number:03d}{('.png', '.JPG')[number % 2]}")


def write_image_folder(root: Path) -> None:
    write_classes(root, {"cat": 20, "dog": 25, "emu": 10})


CIFAR100_NAMES = ("apple", "aquarium_fish", "baby")


def write_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 12)):
        fine = [number % len(CIFAR100_NAMES) for number in range(count)]
        content = {
            "filenames": [f"{name}_s_{number:06d}.png" for number in range(count)],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": fine,
            "coarse_labels": [label // 2 for label in fine],
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        }
        (folder / name).write_bytes(pickled_by_python2(content))
    meta = {"fine_label_names": list(CIFAR100_NAMES), "coarse_label_names": ["fruit", "fish"]}
    (folder / "meta").write_bytes(pickled_by_python2(meta))


def pickled_by_python2(content: dict[str, Any]) -> bytes:
    """A pickle of text, lists and arrays as Python 2 and its numpy wrote it: text is bytes, `numpy.core`, align=0."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


class _Python2Pickler(pickle._Pickler):  # the one that is written in Python, so that it can be taught other opcodes
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def _bytes(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.write(pickle.SHORT_BINSTRING + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)))
        self.write(raw)
        self.memoize(text)

    def _array(self, array: np.ndarray) -> None:
        self.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R")
        self.memoize(array)
        self.write(b"(K\x01")
        self.save(array.shape)
        self.write(b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        self._bytes(array.tobytes())
        self.write(b"tb")

    dispatch[str] = dispatch[bytes] = _bytes
    dispatch[np.ndarray] = _array


def write_imagenet(root: Path) -> None:
    wnids = ("n01440764", "n02012849", "n03126707")
    rng = np.random.default_rng(0)
    for place, wnid in enumerate(wnids):
        for folder, pattern, count in (("train", f"{wnid}_%d.JPEG", 20), ("val", "ILSVRC2012_val_%08d.JPEG", 4)):
            (root / folder / wnid).mkdir(parents=True)
            for number in range(count):
                noise(rng, 40, 30).save(root / folder / wnid / (pattern % (number + place * count)))
    names = ("tench, Tinca tinca", "crane", "crane")
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{w} {n}\n" for w, n in zip(wnids, names, strict=True)))


def write_cub200(root: Path) -> None:
    folder = root / "CUB_200_2011"
    rng = np.random.default_rng(0)
    classes = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
    lines: dict[str, list[str]] = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    for number, name in enumerate(classes, 1):
        (folder / "images" / name).mkdir(parents=True)
        for place in range(16):
            key = (number - 1) * 16 + place + 1
            file = f"{name}/{name[4:]}_{place:04d}_{key * 7}.jpg"
            noise(rng, 50, 40).save(folder / "images" / file)
            lines["images"].append(f"{key} {file}")
            lines["image_class_labels"].append(f"{key} {number}")
            lines["train_test_split"].append(f"{key} {int(place % 4 != 0)}")
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    (folder / "classes.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(classes, 1)))


def write_fgvc_aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    variants = ("707-320", "Cessna 172", "F/A-18")
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    for split, first, count in (("train", 34309, 8), ("val", 901, 4), ("test", 1514522, 4)):
        lines = []
        for place in range(count * len(variants)):
            noise(rng, 60, 60).save(folder / "images" / f"{first + place:07d}.jpg")
            lines.append(f"{first + place:07d} {variants[place % len(variants)]}\n")
        (folder / f"images_variant_{split}.txt").write_text("".join(lines))


def label_map(rng: np.random.Generator, width: int, height: int, numbers: list[int]) -> np.ndarray:
    """Patches of 3x3 pixels, so that every number has some."""
    patches = rng.permutation(np.resize(numbers, (height // 3 + 1) * (width // 3 + 1))).astype(np.uint8)
    return np.kron(patches.reshape(height // 3 + 1, width // 3 + 1), np.ones((3, 3), np.uint8))[:height, :width]


def write_voc2012(root: Path, augmented: bool = False) -> None:
    """Label maps are palette files with white borders; those of the augmented set are grey and have none."""
    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", *(["SegmentationClassAug"] * augmented)):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = [f"20{7 + number % 5:02d}_{number * 13:06d}" for number in range(30)]
    parts = {"train": ids[:12], "val": ids[12:20], "train_aug": ids[:12] + ids[20:]}
    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    for place, name in enumerate(ids):
        width, height = ((40, 30), (30, 40), (24, 24))[place % 3]
        noise(rng, width, height).save(folder / "JPEGImages" / f"{name}.jpg")
        numbers = label_map(rng, width, height, [*range(21), 255])
        image = Image.fromarray(numbers)
        if augmented:
            Image.fromarray(np.where(numbers == 255, 0, numbers)).save(folder / "SegmentationClassAug" / f"{name}.png")
        image.putpalette(palette.tobytes())
        if place < 20:
            image.save(folder / "SegmentationClass" / f"{name}.png")
    for part in ("train", "val", *(["train_aug"] * augmented)):
        lines = "".join(f"{name}\n" for name in parts[part])
        (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(lines)


CITIES = {
    "train": {"aachen": 2, "bochum": 2, "bremen": 2, "jena": 2, "ulm": 12, "zurich": 2},
    "val": {"frankfurt": 4, "lindau": 3},
}


def write_cityscapes(root: Path) -> None:
    """With the other files that lie beside those that are read."""
    rng = np.random.default_rng(0)
    for split, cities in CITIES.items():
        for city, count in cities.items():
            for package in ("leftImg8bit", "gtFine"):
                (root / package / split / city).mkdir(parents=True)
            for number in range(count):
                stem = f"{city}_{number:06d}_000019"
                noise(rng, 64, 32).save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
                labels = root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"
                Image.fromarray(label_map(rng, 64, 32, list(range(34)))).save(labels)
                noise(rng, 64, 32).convert("RGBA").save(labels.with_name(f"{stem}_gtFine_color.png"))
                labels.with_name(f"{stem}_gtFine_polygons.json").write_text("{}")


def write_ade20k(root: Path) -> None:
    folder = root / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    for split, stem, count in (("training", "ADE_train_%08d", 24), ("validation", "ADE_val_%08d", 6)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(1, count + 1):
            width, height = ((60, 45), (39, 51))[number % 2]
            noise(rng, width, height).save(folder / "images" / split / f"{stem % number}.jpg")
            labels = Image.fromarray(label_map(rng, width, height, list(range(151))))
            labels.save(folder / "annotations" / split / f"{stem % number}.png")
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n")


def write_mask_folder(root: Path) -> None:
    """Photos and palette masks in folders that no annotation program names alike; 255 is the border of objects."""
    rng = np.random.default_rng(0)
    for kind in ("imgs", "labels"):
        (root / kind).mkdir(parents=True)
    for number in range(20):
        width, height = ((40, 30), (30, 40))[number % 2]
        noise(rng, width, height).save(root / "imgs" / f"{number:03d}.jpg")
        image = Image.fromarray(label_map(rng, width, height, [0, 1, 2, 3, 255]))
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        image.save(root / "labels" / f"{number:03d}_mask.png")


# Every data set that is read from a folder.
TINY: dict[str, Tiny] = {
    "image_folder": Tiny(write_image_folder),
    "mask_folder": Tiny(write_mask_folder),
    "cifar100": Tiny(write_cifar100, drawn=frozenset({"train", "val"})),
    "imagenet": Tiny(write_imagenet, drawn=frozenset({"train", "val"})),
    "cub200": Tiny(write_cub200, drawn=frozenset({"train", "val"})),
    "fgvc_aircraft": Tiny(write_fgvc_aircraft, drawn=frozenset()),
    "voc2012": Tiny(write_voc2012, drawn=frozenset({"train", "val"})),
    "cityscapes": Tiny(write_cityscapes, drawn=frozenset({"train", "val"})),
    "ade20k": Tiny(write_ade20k, drawn=frozenset({"train", "val"})),
}
