"""look(): what is in a folder of images, before anything is built on it.

    ROOT/CLASS/*.jpg, or ROOT/{train,val,test}/CLASS/*.jpg        as heterokd/datasets/image_folder.py reads them

Every file is opened and decoded once. What must not be trained on is named: files that are damaged, copies of an image
under two labels, and images of val or test that stand in train as well, which would make every figure too good.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from heterokd.datasets.io.image_files import MAX_THREADS, class_folders, image_names, read_image
from heterokd.datasets.io.split import SPLIT_NAMES
from heterokd.errors import DataError

DECODED = 8
"""Side at which a file is decoded to see whether it can be: what fails does so at any size."""

FEWEST = 5
"""Images of a class below which it cannot be split into train, val and test."""


@dataclass(frozen=True)
class ImageFile:
    """One file.

    Attributes:
        path: below the folder.
        split: train, val or test; empty where the folder has no splits.
        label: its class.
        side: the shorter one, in pixels; 0 where it is damaged.
        mode: PIL's: RGB, L, RGBA, ...
        content: of the file, hashed.
        damage: why it cannot be read; None where it can.
    """

    path: Path
    split: str
    label: str
    side: int
    mode: str
    content: str
    damage: str | None


@dataclass(frozen=True)
class Look:
    """What was found.

    Attributes:
        folder: that was looked at.
        classes: their names.
        files: all image files.
        others: files that are no images by their names, and are not read.
        left_out: files that must not be used, with the reason.
    """

    folder: Path
    classes: tuple[str, ...]
    files: tuple[ImageFile, ...]
    others: int
    left_out: dict[Path, str]

    @property
    def kept(self) -> list[ImageFile]:
        """Files that can be used."""
        return [file for file in self.files if file.path not in self.left_out]

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that the folder has of train, val and test; none where it has classes at once."""
        present = {file.split for file in self.files}
        return tuple(name for name in SPLIT_NAMES if name in present)

    @property
    def side(self) -> int:
        """The shorter side of an image, in the median."""
        return int(median(file.side for file in self.kept))

    def sentences(self) -> list[str]:
        """For people."""
        kept = self.kept
        counts = Counter(file.label for file in kept)
        most, fewest = counts.most_common()[0], counts.most_common()[-1]
        sides = sorted(file.side for file in kept)
        modes = ", ".join(f"{count} {mode}" for mode, count in Counter(file.mode for file in kept).most_common())
        splits = ", ".join(f"{sum(file.split == name for file in kept)} {name}" for name in self.splits)
        said = [
            f"{len(kept)} images of {len(self.classes)} classes; {splits or 'no splits: they will be made, 60/20/20'}",
            f"from {fewest[1]} ({fewest[0]}) to {most[1]} ({most[0]}) images a class"
            + (f": {most[1] / fewest[1]:.1f} times as many" if most[1] > 1.5 * fewest[1] else ", balanced"),
            f"shorter sides of {sides[0]} to {sides[-1]} pixels, {self.side} in the median; {modes}",
        ]
        for reason, count in Counter(self.left_out.values()).most_common():
            example = next(path for path, why in self.left_out.items() if why == reason)
            said.append(f"left out: {count} files, {reason} (such as {example})")
        if self.others:
            said.append(f"not read: {self.others} other files")
        return said


def look(folder: Path) -> Look:
    """Look at every image of a folder.

    Raises:
        DataError: there is no such folder, it has fewer than two classes, or too little is left of a class.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the folder that holds a folder for each class")
    splits: list[str] = [name for name in SPLIT_NAMES if (folder / name).is_dir()]
    if splits and "train" not in splits:
        raise DataError(f"{folder}: has {' and '.join(splits)} but no train; add {folder / 'train'}")
    classes = class_folders(folder / "train" if splits else folder)
    found, others = [], 0
    for split in splits or [""]:
        for label in classes:
            place = folder / split / label
            images, rest = image_names(place) if place.is_dir() else ([], 0)
            found += [(Path(split, label, image), split, label) for image in images]
            others += rest
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        files = tuple(pool.map(lambda one: _open(folder, *one), found))
    seen = Look(folder, classes, files, others, _left_out(files))
    for split in splits or [""]:
        counts = Counter(file.label for file in seen.kept if file.split == split)
        fewest = 1 if split in ("val", "test") else FEWEST
        for label in classes:
            if counts[label] < fewest:
                where = folder / split / label
                raise DataError(f"{where}: holds {counts[label]} usable images, {fewest} are needed; add or remove it")
    return seen


def _open(folder: Path, path: Path, split: str, label: str) -> ImageFile:
    file = folder / path
    try:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        read_image(file, DECODED)
        with Image.open(file) as image:
            side, mode = min(image.size), image.mode
    except (DataError, OSError) as error:
        return ImageFile(path, split, label, 0, "", "", str(error))
    return ImageFile(path, split, label, side, mode, content, None)


def _left_out(files: Iterable[ImageFile]) -> dict[Path, str]:
    left = {file.path: "damaged" for file in files if file.damage is not None}
    copies: dict[str, list[ImageFile]] = {}
    for file in files:
        if file.damage is None:
            copies.setdefault(file.content, []).append(file)
    for group in copies.values():
        if len({file.label for file in group}) > 1:
            left |= {file.path: "the same image under two labels" for file in group}
            continue
        # Test first, then val: those stay as they were given, and train loses what they hold.
        ordered = sorted(group, key=lambda file: (-SPLIT_NAMES.index(file.split) if file.split else 0, file.path))
        for file in ordered[1:]:
            same = file.split == ordered[0].split
            left[file.path] = "a copy of another" if same else f"in {ordered[0].split} as well"
    return left


def use(seen: Look, place: Path) -> Path:
    """The folder to read: the one that was looked at, or, where files are left out, links to the others in `place`."""
    if not seen.left_out:
        return seen.folder.resolve()
    for file in seen.kept:
        link = place / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((seen.folder / file.path).resolve())
    for link in [path for path in place.rglob("*") if path.is_symlink()]:
        if link.relative_to(place) in seen.left_out or not link.exists():
            link.unlink()
    return place.resolve()
