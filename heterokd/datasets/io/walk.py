"""Walk through a folder, or the list of a store: which files are images, and why others are not read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from heterokd.datasets.io.class_order import CLASS_LIST
from heterokd.datasets.io.read_image import image_suffixes
from heterokd.datasets.io.stored_files import StoredFiles
from heterokd.errors import DataError

# Written by operating systems, archives and programs, in lower case; names that begin with a point are hidden anyway.
SYSTEM_NAMES = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found", "ehthumbs.db"}
)

# Signatures of files without a suffix; other formats' are too weak to tell an image from any other file.
SIGNATURES = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


@dataclass
class Walk:
    """Files and folders below a root, in sorted order.

    Attributes:
        images: paths of the images.
        folders: paths of the folders.
        unread: number of files that are not read, by reason.
        examples: such a file, by reason.
    """

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave(self, reason: str, name: str) -> None:
        """Count a file that is not read."""
        self.unread[reason] += 1
        self.examples.setdefault(reason, name)

    @property
    def reasons(self) -> dict[str, tuple[int, str]]:
        """Number of files that are not read, and an example, by reason; the most frequent first."""
        return {reason: (count, self.examples[reason]) for reason, count in self.unread.most_common()}


def list_images(root: Path | StoredFiles, key: str) -> tuple[list[str], list[str]]:
    """List all images below a folder, whatever its folders mean.

    Returns:
        Paths below the folder in sorted order, and a sentence per reason for which files are not read.

    Raises:
        DataError: there is no folder, or it cannot be read; names the key of the section `data`.
    """
    walk = walked(root, key)
    return walk.images, unread_sentences(walk.reasons)


def walked(root: Path | StoredFiles, key: str) -> Walk:
    """Walk through all that is below a folder; see `list_images`."""
    walk = Walk()
    if isinstance(root, StoredFiles):
        _visit_listed(root, walk, image_suffixes())
    elif root.is_dir():
        _visit(root, "", walk, image_suffixes(), frozenset())
    else:
        raise DataError(f"{key}: there is no folder {root}; give the folder that holds the images")
    return walk


def unread_sentences(unread: Mapping[str, tuple[int, str]]) -> list[str]:
    """Return a sentence per reason for which files are not read."""
    return [
        f"not read: {count} {'file' if count == 1 else 'files'}, {reason} (such as {example})"
        for reason, (count, example) in unread.items()
    ]


def _visit(root: Path, folder: str, walk: Walk, suffixes: tuple[str, ...], above: frozenset[tuple[int, int]]) -> None:
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
            _file(name, walk, suffixes, entry.path)


def _visit_listed(stored: StoredFiles, walk: Walk, suffixes: tuple[str, ...]) -> None:
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


def _file(name: str, walk: Walk, suffixes: tuple[str, ...], path: str | None = None) -> None:
    """Add a file to the images or to the unread files; a file without a suffix is opened if its path is given."""
    base = name.rpartition("/")[2]
    suffix = os.path.splitext(base)[1].lower()
    if base.lower().endswith(suffixes) or (not suffix and path is not None and _has_signature(path)):
        walk.images.append(name)
    elif base != CLASS_LIST:
        walk.leave(f"{suffix}: no image format that Pillow decodes" if suffix else "without a suffix", name)


def _has_signature(path: str) -> bool:
    """Whether a file begins as an image of a common format does."""
    try:
        with Image.open(path, formats=SIGNATURES):
            return True
    except Exception:  # noqa: BLE001 - Pillow's formats raise anything for what only begins like an image
        return False
