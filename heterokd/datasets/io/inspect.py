"""Inspect a folder of images before a search.

Its classes and splits are found as `heterokd/datasets/io/layout.py` describes. Every file is opened and decoded once.
Files that must not be used are left out: damaged files, copies of an image under two labels, and images of val or test
that are also in train, which would inflate every metric.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from PIL import Image

from heterokd.datasets.io.class_order import CLASS_LIST
from heterokd.datasets.io.decoded_files import decoding_threads
from heterokd.datasets.io.image_table import find_tables, read_table, write_rows
from heterokd.datasets.io.layout import FoundImages, NoClassesError, find_images
from heterokd.datasets.io.options import DEFAULT_OPTIONS
from heterokd.datasets.io.read_image import read_image
from heterokd.datasets.io.split import SPLIT_NAMES, SplitName
from heterokd.errors import DataError

DECODED = 8
"""Side in pixels at which files are decoded; a damaged file fails at any size."""

FEWEST = 5
"""Minimum number of images of a class for a split into train, val and test."""


@dataclass(frozen=True)
class ImageFile:
    """An image file.

    Attributes:
        path: path below the folder.
        split: train, val or test; None if the folder has no splits.
        label: name of the class.
        side: shorter side in pixels; 0 if the file is damaged.
        mode: mode of PIL: RGB, L, RGBA, ...
        content: SHA-256 of the file; empty if it is damaged.
    """

    path: Path
    split: SplitName | None
    label: str
    side: int = 0
    mode: str = ""
    content: str = ""


@dataclass(frozen=True)
class FolderInspection:
    """Content of a folder of images.

    Attributes:
        folder: the folder.
        classes: names of the classes.
        files: all image files.
        found: files as they were found, with those that are not read.
        left_out: files that must not be used, with the reason.
        table: name of the table in the folder that lists the images; None: folders are classes.
    """

    folder: Path
    classes: tuple[str, ...]
    files: tuple[ImageFile, ...]
    found: FoundImages
    left_out: dict[Path, str]
    table: str | None = None

    @property
    def kept(self) -> list[ImageFile]:
        """Files that can be used."""
        return [file for file in self.files if file.path not in self.left_out]

    @property
    def splits(self) -> tuple[str, ...]:
        """Split folders present; empty if classes are at the top level."""
        present = {file.split for file in self.files}
        return tuple(name for name in SPLIT_NAMES if name in present)

    @property
    def side(self) -> int:
        """Median of the images' shorter sides, in pixels."""
        return int(median(file.side for file in self.kept))

    def sentences(self) -> list[str]:
        """Describe the folder, a sentence per line."""
        kept = self.kept
        counts = Counter(file.label for file in kept).most_common()
        (largest, most), (smallest, fewest) = counts[0], counts[-1]
        sides = sorted(file.side for file in kept)
        modes = ", ".join(f"{count} {mode}" for mode, count in Counter(file.mode for file in kept).most_common())
        splits = ", ".join(f"{sum(file.split == name for file in kept)} {name}" for name in self.splits)
        balance = f": {most / fewest:.1f} times as many" if most > 1.5 * fewest else ", balanced"
        lines = [
            f"{len(kept)} images of {len(self.classes)} classes; {splits or 'no splits: they will be made, 60/20/20'}",
            f"from {fewest} ({smallest}) to {most} ({largest}) images per class{balance}",
            f"shorter sides of {sides[0]} to {sides[-1]} pixels, median {self.side}; {modes}",
        ]
        for reason, count in Counter(self.left_out.values()).most_common():
            example = next(path for path, why in self.left_out.items() if why == reason)
            lines.append(f"left out: {count} files, {reason} (such as {example})")
        return [*lines, *self.found.unread_sentences, *self.found.notes]


def inspect_folder(folder: Path) -> FolderInspection:
    """Decode and hash every image of a folder.

    Raises:
        DataError: the folder is missing, has fewer than two classes, or a class has too few usable images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the folder that holds a folder for each class")
    found, table = _found(folder)
    listed = [ImageFile(Path(image.name), image.split, image.label) for image in found.images]
    with decoding_threads() as pool:
        files = tuple(pool.map(partial(_read, folder), listed))
    seen = FolderInspection(folder, found.classes, files, found, _left_out(files), table)
    counts = Counter(file.label for file in seen.kept if file.split in (None, "train"))
    for label in found.classes:
        if counts[label] < FEWEST:
            raise DataError(
                f"{folder}: class {label!r} has {counts[label]} usable training images, {FEWEST} are needed; "
                "add some or remove it"
            )
    return seen


def _found(folder: Path) -> tuple[FoundImages, str | None]:
    """Find the images by their folders or, without folders of classes, by the only table that lists images."""
    try:
        return find_images(folder, DEFAULT_OPTIONS), None
    except NoClassesError as error:
        tables = find_tables(folder)
        if not tables:
            raise
        if len(tables) > 1:
            raise DataError(f"{error}; {' and '.join(tables)} list images: keep one of them here") from None
        return read_table(folder, Path(tables[0]), DEFAULT_OPTIONS), tables[0]


def _read(folder: Path, file: ImageFile) -> ImageFile:
    """Return a file with side, mode and hash; unchanged if it is damaged."""
    path = folder / file.path
    try:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        read_image(path, DECODED)
        with Image.open(path) as image:
            return replace(file, side=min(image.size), mode=image.mode, content=content)
    except (DataError, OSError):
        return file


def _left_out(files: Iterable[ImageFile]) -> dict[Path, str]:
    left = {file.path: "damaged" for file in files if not file.content}
    copies: dict[str, list[ImageFile]] = {}
    for file in files:
        if file.content:
            copies.setdefault(file.content, []).append(file)
    for group in copies.values():
        if len({file.label for file in group}) > 1:
            left |= {file.path: "the same image under two labels" for file in group}
            continue
        # Test first, then val: their images stay, and the copies in train are left out.
        ordered = sorted(group, key=lambda file: (-SPLIT_NAMES.index(file.split) if file.split else 0, file.path))
        for file in ordered[1:]:
            same = file.split == ordered[0].split
            left[file.path] = "a copy of another" if same else f"in {ordered[0].split} as well"
    return left


def usable_folder(seen: FolderInspection, links: Path) -> Path:
    """Return the folder to read: the inspected folder, or, if files are left out, `links` with links to the others.

    Args:
        seen: content of the inspected folder.
        links: folder for the links; created if it is needed.
    """
    if not seen.left_out:
        return seen.folder.resolve()
    lists = {path.relative_to(seen.folder) for path in (seen.folder / CLASS_LIST, seen.found.base / CLASS_LIST)}
    for name in [*(file.path for file in seen.kept), *(name for name in lists if (seen.folder / name).is_file())]:
        link = links / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((seen.folder / name).resolve())
    for link in [path for path in links.rglob("*") if path.is_symlink()]:
        if link.relative_to(links) in seen.left_out or not link.exists():
            link.unlink()
    if seen.table is not None:
        kept = seen.kept
        splits = [file.split or "" for file in kept] if seen.splits else []
        write_rows(links / seen.table, [str(file.path) for file in kept], [file.label for file in kept], splits)
    return links.resolve()
