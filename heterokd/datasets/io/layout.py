"""Find the images of a user's folder with their classes and splits; nothing is left out without a note.

    ROOT/SPLIT/CLASS/...     ROOT/CLASS/SPLIT/...     ROOT/CLASS/...        files at any depth in the folder of a class

Names of splits are those of `split_named`. If all images are in a single folder of the root, or of each split, as in
unpacked archives, that folder is read. Hidden files and folders, and those of operating systems, are ignored.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heterokd.datasets.io.class_order import order_classes
from heterokd.datasets.io.options import DataOptions
from heterokd.datasets.io.split import SPLIT_NAMES, SplitName
from heterokd.datasets.io.split_names import split_named
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.datasets.io.walk import Walk, unread_sentences, walked
from heterokd.errors import DataError

NO_CLASS = "in no class folder"


class NoClassesError(DataError):
    """There are no folders of two or more classes."""


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
        return unread_sentences(self.unread)


@dataclass(frozen=True)
class _Layout:
    """What the folders below a root mean.

    Attributes:
        prefix: folders, with a trailing `/`, that everything is in.
        tops: folders of splits by name; empty if the first folder is a class.
        is_inner: whether the folder in a class is a split.
        depth: number of folders between those of the splits and those of the classes.
    """

    prefix: str
    tops: Mapping[str, SplitName]
    is_inner: bool = False
    depth: int = 0

    def place(self, parts: Sequence[str]) -> tuple[SplitName | None, str] | str:
        """Return split and class of a path below `prefix` (of the folder of a class, too), or why it has none."""
        if self.is_inner and len(parts) > 1:
            return split_named(parts[1]), _label(parts[0])
        if not self.tops:
            return (None, _label(parts[0])) if parts else NO_CLASS
        if not parts or parts[0] not in self.tops:
            return f"not in {' or '.join(sorted(self.tops))}, the folders of the splits"
        place = 1 + self.depth
        return (self.tops[parts[0]], _label(parts[place])) if len(parts) > place else NO_CLASS


def find_images(root: Path | StoredFiles, options: DataOptions) -> FoundImages:
    """Find the images below a folder.

    Raises:
        DataError: there is no folder, or it cannot be read; fewer than two classes; a class without training images;
            two folders for a split; validation or test images without training images, or of a class that train does
            not have; a list of classes that does not fit.
    """
    walk = walked(root, "data.root")
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
    notes += _perhaps_splits(layout, walk)
    labels = _checked_classes(root, layout, walk, images)
    notes += _lacking(images, labels)
    classes, order_notes = order_classes(labels, options.class_order, (base, root))
    place = {label: number for number, label in enumerate(classes)}
    images.sort(key=lambda image: (image.split or "", place[image.label], image.name))
    return FoundImages(stored or root, base, classes, tuple(images), walk.reasons, (*notes, *order_notes))


def _layout(root: Path, walk: Walk) -> _Layout:
    """Find out what the folders mean.

    Raises:
        DataError: two folders are named for the same split.
    """
    prefix = ""
    while True:
        inside = [name[len(prefix) :].split("/") for name in walk.images]
        first = {parts[0] for parts in inside}
        if len(first) != 1 or min(map(len, inside)) < 3 or _named_as_splits(first):
            break
        prefix += f"{inside[0][0]}/"
    below = [folder[len(prefix) :].split("/") for folder in walk.folders if folder.startswith(prefix)]
    tops = _named_as_splits({parts[0] for parts in below if len(parts) == 2})
    for split in SPLIT_NAMES:
        names = sorted(top for top, found in tops.items() if found == split)
        if len(names) > 1:
            raise DataError(f"{root / prefix}: has {' and '.join(map(repr, names))} for {split}; keep one of them")
    is_inner = bool(inside) and not tops and all(len(p) > 2 and split_named(p[1]) for p in inside)
    depth = min((_depth([parts[1:] for parts in inside if parts[0] == top]) for top in tops), default=0)
    return _Layout(prefix, tops, is_inner, depth)


def _named_as_splits(names: Collection[str]) -> dict[str, SplitName]:
    return {name: split for name in names if (split := split_named(name))}


def _depth(paths: Sequence[Sequence[str]]) -> int:
    """Return the number of folders that all paths share, if there is a further folder in each."""
    depth = 0
    while paths and min(map(len, paths)) > depth + 2 and len({parts[depth] for parts in paths}) == 1:
        depth += 1
    return depth


def _perhaps_splits(layout: _Layout, walk: Walk) -> list[str]:
    """Say that folders that are taken as classes may be parts of the data set, since all have the same folders."""
    if layout.tops or layout.is_inner:
        return []
    inside: dict[str, set[str]] = {}
    for folder in walk.folders:
        parts = folder[len(layout.prefix) :].split("/") if folder.startswith(layout.prefix) else []
        if len(parts) == 2:
            inside.setdefault(parts[0], set()).add(parts[1])
    first = next(iter(inside.values()), set())
    has_loose = any(name.count("/", len(layout.prefix)) < 2 for name in walk.images)
    if len(inside) < 2 or len(first) < 2 or has_loose or any(folders != first for folders in inside.values()):
        return []
    outer, inner = (" and ".join(sorted(names)[:2]) for names in (inside, first))
    return [
        f"looks wrong: {outer} are taken as classes, but each has the same folders, such as {inner}; if those are the "
        "classes, name the outer folders train, val and test, or list the images in data.table"
    ]


def _label(folder: str) -> str:
    """Return the name of a class: some file systems decompose accents, so that equal names differ."""
    return unicodedata.normalize("NFC", folder)


def _checked_classes(root: Path, layout: _Layout, walk: Walk, images: Sequence[FoundImage]) -> set[str]:
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
        if len(parts) == (2 + layout.depth if layout.tops else 1) and (not layout.tops or parts[0] == train):
            folders.setdefault(_label(parts[-1]), folder)
    labels = filled | set(folders)
    if len(labels) < 2:
        loose = walk.unread[NO_CLASS]
        hint = f"; {loose} images are in no folder of a class" if loose else ""
        raise NoClassesError(
            f"{base / train}: expected a folder for each of two or more classes, found {len(labels)}{hint}"
        )
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
