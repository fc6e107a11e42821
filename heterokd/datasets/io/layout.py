"""Find the images of a user's folder with their classes and splits; nothing is left out without a note.

    ROOT/SPLIT/CLASS/...     ROOT/CLASS/SPLIT/...     ROOT/CLASS/...        files at any depth in the folder of a class

Names of splits are `SPLIT_FOLDERS` in any case. If all images are in a single folder of the root, as in unpacked
archives, that folder is read. Hidden files and folders, and those of operating systems, are ignored.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heterokd.datasets.io.class_order import CLASS_LIST, order_classes
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.read_image import image_suffixes
from heterokd.datasets.io.split import SPLIT_NAMES, SplitName
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.errors import DataError

SPLIT_FOLDERS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "train_set": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "val_set": "val",
    "test": "test",
    "testing": "test",
    "test_set": "test",
}

# Written by operating systems, archives and programs, in lower case; names that begin with a point are hidden anyway.
SYSTEM_NAMES = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found", "ehthumbs.db"}
)

NO_CLASS = "in no class folder"


@dataclass(frozen=True)
class FoundImage:
    """An image file.

    Attributes:
        name: path below the root, with `/`.
        label: name of the class.
        split: train, val or test; None if there are no splits.
        group: images of a group belong in the same split; empty: the image is its group.
        weight: weight in the task loss, at least 0.
    """

    name: str
    label: str
    split: SplitName | None = None
    group: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class FoundImages:
    """Images with classes and splits.

    Attributes:
        folder: folder that the names are relative to.
        base: folder of the splits, or of the classes.
        classes: class names in order; a class's number is its position.
        images: by split, class and name.
        unread: number of files that are not read, and an example, by reason.
        notes: what else a user should know, a sentence each.
    """

    folder: Path | StoredFiles
    base: Path
    classes: tuple[str, ...]
    images: tuple[FoundImage, ...]
    unread: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """Splits that the files have; empty if they have none."""
        present = {image.split for image in self.images}
        return tuple(name for name in SPLIT_NAMES if name in present)

    @property
    def unread_sentences(self) -> list[str]:
        """A line per reason for which files are not read."""
        return _unread_sentences(self.unread)


@dataclass
class _Walk:
    """Files and folders below a root, in sorted order."""

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave(self, reason: str, name: str) -> None:
        self.unread[reason] += 1
        self.examples.setdefault(reason, name)


@dataclass(frozen=True)
class _Layout:
    """What the folders below a root mean.

    Attributes:
        prefix: folders, with a trailing `/`, that everything is in.
        tops: folders of splits by name; empty if the first folder is a class.
        is_inner: whether the folder in a class is a split.
    """

    prefix: str
    tops: Mapping[str, SplitName]
    is_inner: bool = False

    def place(self, parts: Sequence[str]) -> tuple[SplitName | None, str] | str:
        """Return split and class of a path below `prefix` (of the folder of a class, too), or why it has none."""
        if self.is_inner and len(parts) > 1:
            return SPLIT_FOLDERS[parts[1].lower()], _label(parts[0])
        if not self.tops:
            return (None, _label(parts[0])) if parts else NO_CLASS
        if not parts or parts[0] not in self.tops:
            return f"not in {' or '.join(sorted(self.tops))}, the folders of the splits"
        return (self.tops[parts[0]], _label(parts[1])) if len(parts) > 1 else NO_CLASS


def find_images(root: Path | StoredFiles, options: DataOptions) -> FoundImages:
    """Find the images below a folder.

    Raises:
        DataError: there is no folder, or it cannot be read; fewer than two classes; a class without training images;
            two folders for a split; validation or test images without training images, or of a class that train does
            not have; a list of classes that does not fit.
    """
    walk = _walked(root, "data.root")
    stored = root if isinstance(root, StoredFiles) else None
    root = root.folder if isinstance(root, StoredFiles) else root
    layout = _layout(root, walk)
    base = root / layout.prefix
    images = []
    for name in walk.images:
        placed = layout.place(name[len(layout.prefix) :].split("/")[:-1])
        if isinstance(placed, str):
            walk.leave(placed, name)
        else:
            images.append(FoundImage(name, placed[1], placed[0]))
    present = {image.split for image in images} | set(layout.tops.values())
    if "train" not in present and present - {None}:
        names = " and ".join(sorted(split for split in present if split))
        raise DataError(f"{base}: has {names} but no train; add {base / 'train'}")
    notes = [f"images are read from {base}, the only folder of {root}"] if layout.prefix else []
    labels = _checked_classes(root, layout, walk, images)
    notes += _lacking(images, labels)
    classes, order_notes = order_classes(labels, options.class_order, (base, root))
    place = {label: number for number, label in enumerate(classes)}
    images.sort(key=lambda image: (image.split or "", place[image.label], image.name))
    return FoundImages(stored or root, base, classes, tuple(images), _unread(walk), (*notes, *order_notes))


def list_images(root: Path | StoredFiles, key: str) -> tuple[list[str], list[str]]:
    """List all images below a folder, whatever its folders mean.

    Returns:
        Paths below the folder in sorted order, and a sentence per reason for which files are not read.

    Raises:
        DataError: there is no folder, or it cannot be read; names the key of the section `data`.
    """
    walk = _walked(root, key)
    return walk.images, _unread_sentences(_unread(walk))


def _walked(root: Path | StoredFiles, key: str) -> _Walk:
    walk = _Walk()
    if isinstance(root, StoredFiles):
        _visit_listed(root, walk, image_suffixes())
    elif root.is_dir():
        _visit(root, "", walk, image_suffixes(), frozenset())
    else:
        raise DataError(f"{key}: there is no folder {root}; give the folder that holds the images")
    return walk


def _unread(walk: _Walk) -> dict[str, tuple[int, str]]:
    return {reason: (count, walk.examples[reason]) for reason, count in walk.unread.most_common()}


def _unread_sentences(unread: Mapping[str, tuple[int, str]]) -> list[str]:
    return [
        f"not read: {count} {'file' if count == 1 else 'files'}, {reason} (such as {example})"
        for reason, (count, example) in unread.items()
    ]


def _visit(root: Path, folder: str, walk: _Walk, suffixes: tuple[str, ...], above: frozenset[tuple[int, int]]) -> None:
    """Collect the files below a folder; links to folders are followed, but not in a circle."""
    here = root / folder
    try:
        stat = here.stat()
        with os.scandir(here) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{here}: cannot be read ({error.strerror}); give access to it, or move it away") from None
    above |= {(stat.st_dev, stat.st_ino)}
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if is_hidden([entry.name]):
            continue
        if entry.is_dir():
            inside = entry.stat()
            if (inside.st_dev, inside.st_ino) in above:
                walk.leave("links to a folder that they are in", name)
                continue
            walk.folders.append(name)
            _visit(root, name, walk, suffixes, above)
        elif not entry.is_file():
            walk.leave("links to nothing" if entry.is_symlink() else "no regular files", name)
        else:
            _file(name, walk, suffixes)


def _visit_listed(stored: StoredFiles, walk: _Walk, suffixes: tuple[str, ...]) -> None:
    """Collect the files of a list, as `_visit` does those of a folder."""
    seen: set[str] = set()
    for path in sorted((os.fsdecode(name).split("/") for name in stored.names), key=lambda parts: parts):
        if is_hidden(path):
            continue
        for depth in range(1, len(path)):
            folder = "/".join(path[:depth])
            if folder not in seen:
                seen.add(folder)
                walk.folders.append(folder)
        _file("/".join(path), walk, suffixes)


def is_hidden(path: Sequence[str]) -> bool:
    """Whether a file is not read because its name, or that of a folder above it, is hidden or a system's."""
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in path)


def _file(name: str, walk: _Walk, suffixes: tuple[str, ...]) -> None:
    base = name.rpartition("/")[2]
    if base.lower().endswith(suffixes):
        walk.images.append(name)
    elif base != CLASS_LIST:
        suffix = os.path.splitext(base)[1].lower()
        walk.leave(f"{suffix}: no image format that Pillow decodes" if suffix else "without a suffix", name)


def _layout(root: Path, walk: _Walk) -> _Layout:
    """Find out what the folders mean.

    Raises:
        DataError: two folders are named for the same split.
    """
    prefix = ""
    while True:
        inside = [name[len(prefix) :].split("/") for name in walk.images]
        first = {parts[0] for parts in inside}
        if len(first) != 1 or min(map(len, inside)) < 3 or first & _named_as_splits(first):
            break
        prefix += f"{inside[0][0]}/"
    below = [folder[len(prefix) :].split("/") for folder in walk.folders if folder.startswith(prefix)]
    tops = _named_as_splits({parts[0] for parts in below if len(parts) == 2})
    for split in SPLIT_NAMES:
        names = sorted(top for top in tops if SPLIT_FOLDERS[top.lower()] == split)
        if len(names) > 1:
            raise DataError(f"{root / prefix}: has {' and '.join(map(repr, names))} for {split}; keep one of them")
    is_inner = bool(inside) and not tops and all(len(p) > 2 and p[1].lower() in SPLIT_FOLDERS for p in inside)
    return _Layout(prefix, {top: SPLIT_FOLDERS[top.lower()] for top in tops}, is_inner)


def _named_as_splits(names: Collection[str]) -> set[str]:
    return {name for name in names if name.lower() in SPLIT_FOLDERS}


def _label(folder: str) -> str:
    """Return the name of a class: some file systems decompose accents, so that equal names differ."""
    return unicodedata.normalize("NFC", folder)


def _checked_classes(root: Path, layout: _Layout, walk: _Walk, images: Sequence[FoundImage]) -> set[str]:
    """Return the classes.

    Raises:
        DataError: fewer than two; one without training images; one of val or test that train does not have.
    """
    base = root / layout.prefix
    train = next((top for top, split in layout.tops.items() if split == "train"), "")
    filled = {image.label for image in images if image.split in (None, "train")}
    folders: dict[str, str] = {}
    for folder in walk.folders:
        parts = folder[len(layout.prefix) :].split("/") if folder.startswith(layout.prefix) else []
        if len(parts) == (2 if layout.tops else 1) and (not layout.tops or parts[0] == train):
            folders.setdefault(_label(parts[-1]), folder)
    labels = filled | set(folders)
    if len(labels) < 2:
        loose = walk.unread[NO_CLASS]
        hint = f"; {loose} images are in no folder of a class" if loose else ""
        raise DataError(f"{base / train}: expected a folder for each of two or more classes, found {len(labels)}{hint}")
    for label in sorted(labels - filled):
        raise DataError(f"{root / folders[label]}: holds no images that Pillow decodes; add some or remove the folder")
    for image in images:
        if image.label not in labels:
            where = base / image.name[len(layout.prefix) :].split("/")[0]
            raise DataError(
                f"{where}: class {image.label!r} is not in train; add it there or remove {where / image.label}"
            )
    return labels


def _lacking(images: Sequence[FoundImage], labels: Collection[str]) -> list[str]:
    """Say which classes val or test lack."""
    sentences = []
    for split in ("val", "test"):
        present = {image.label for image in images if image.split == split}
        missing = sorted(set(labels) - present) if present else []
        if missing:
            sentences.append(f"{split} has no images of {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}")
    return sentences
