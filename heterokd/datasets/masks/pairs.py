"""Find images and their label maps in a folder, by the names of folders and files.

ROOT/images/*, ROOT/masks/*                              the same names, or with endings such as `_mask`
ROOT/train/images/*, ROOT/train/masks/*, ROOT/val/...    splits outside
ROOT/images/train/*, ROOT/masks/train/*, ...             splits inside
ROOT/train/*, ROOT/train_labels/*, ROOT/val/*, ...       images in a folder with the split's name
ROOT/train/a.jpg, ROOT/train/a_mask.png, ...             both in one folder
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from heterokd.datasets.io.read_image import image_suffixes
from heterokd.datasets.io.split import SplitName
from heterokd.errors import DataError

Role = Literal["image", "mask"]

IMAGE_WORDS = frozenset(
    (
        *("image", "images", "img", "imgs", "jpegimages", "leftimg8bit", "input", "inputs"),
        *("photo", "photos", "picture", "pictures", "rgb"),
    )
)
MASK_WORDS = frozenset(
    (
        *("mask", "masks", "label", "labels", "annotation", "annotations", "annot", "annots", "seg", "segs"),
        *("segmentation", "segmentations", "segmentationclass", "segmentationclassaug", "segmentationclassraw"),
        *("gt", "gts", "gtfine", "groundtruth", "target", "targets", "labelids"),
    )
)
SPLIT_WORDS: Mapping[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Parts of file names that tell images and label maps apart.
MASK_PART = r"(?:masks?|labels?|labelids|seg|segmentation|gt|gtfine|groundtruth|annotation|annot|l)"
IMAGE_PART = r"(?:images?|img|sat|leftimg8bit|rgb)"
ENDS = {
    "mask": re.compile(rf"[_\-. ]{MASK_PART}$|^{MASK_PART}[_\-. ]", re.I),
    "image": re.compile(rf"[_\-. ]{IMAGE_PART}$|^{IMAGE_PART}[_\-. ]", re.I),
}
NAMED = 3
"""Number of files that a sentence names."""


@dataclass(frozen=True)
class FoundPairs:
    """Images with label maps in a folder.

    Attributes:
        pairs: paths of image and label map below the folder, by split; None if the folder has no splits.
        notes: what is not read, a sentence each.
    """

    pairs: Mapping[SplitName | None, list[tuple[str, str]]]
    notes: tuple[str, ...] = ()


@dataclass
class _Folders:
    """Folders of a split: for images, for label maps, and for either."""

    image: list[Path] = field(default_factory=list)
    mask: list[Path] = field(default_factory=list)
    either: list[Path] = field(default_factory=list)


def has_label_maps(root: Path) -> bool:
    """Return whether a folder holds images with label maps, by the names of its folders and files."""
    try:
        return bool(find_pairs(root).pairs)
    except DataError:
        return any(folders.image and folders.mask for folders in _folders(root).values())


def find_pairs(root: Path) -> FoundPairs:
    """Find the images of a folder and their label maps.

    Raises:
        DataError: there are no pairs, a name is ambiguous, or more than half of the images have no label map.
    """
    pairs: dict[SplitName | None, list[tuple[str, str]]] = {}
    notes: list[str] = []
    splits = _folders(root)
    known = {path for folders in splits.values() for path in (*folders.image, *folders.mask)}
    for split, folders in splits.items():
        found, alone = _pairs_of(root, folders, known)
        if found:
            pairs[split] = found
        for kind, names in alone.items():
            if names:
                other = "label map" if kind == "image" else "image"
                more = ", ..." if len(names) > NAMED else ""
                notes.append(f"not read: {len(names)} {kind}(s) without {other} ({', '.join(names[:NAMED])}{more})")
        lonely = len(alone["image"])
        if found and lonely > len(found):
            raise DataError(
                f"{root}: {lonely} of {lonely + len(found)} images have no label map, such as {alone['image'][0]}; "
                "label maps have their image's name"
            )
    if not pairs:
        roles = ", ".join(sorted(str(path.relative_to(root)) for s in splits.values() for path in (*s.image, *s.mask)))
        raise DataError(
            f"{root}: no image has a label map{f' (read: {roles})' if roles else ''}; put images in 'images' and label "
            "maps of the same names in 'masks'"
        )
    if None in pairs and len(pairs) > 1:
        raise DataError(
            f"{root}: has images in folders of splits and outside of them; move all into train, val and test"
        )
    if None not in pairs and "train" not in pairs:
        raise DataError(f"{root}: has {' and '.join(map(str, pairs))} but no train; add {root / 'train'}")
    return FoundPairs(pairs, tuple(notes))


def _folders(root: Path) -> dict[SplitName | None, _Folders]:
    """Find the folders of images and label maps of each split."""
    found: dict[SplitName | None, _Folders] = {}
    for split, role, path in _walk(root, None, None, 0):
        getattr(found.setdefault(split, _Folders()), role or "either").append(path)
    return found


def _walk(
    folder: Path, split: SplitName | None, role: Role | None, depth: int
) -> Iterator[tuple[SplitName | None, Role | None, Path]]:
    """Yield the split, the role and the path of a folder and of the folders below whose names say more."""
    below = [(path, *_meaning(path.name)) for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    below = [(path, s, r) for path, s, r in below if (s or r) and not (s and split) and not (r and role)]
    yield split, role, folder
    if depth < 3:
        for path, its_split, its_role in below:
            yield from _walk(path, its_split or split, its_role or role, depth + 1)


def _meaning(name: str) -> tuple[SplitName | None, Role | None]:
    """Return the split and the role that a folder's name says: `train_labels`, `trainannot`, `val`, `masks`."""
    whole = name.lower()
    words = [whole] if whole in IMAGE_WORDS | MASK_WORDS else [word for word in re.split(r"[^a-z]+", whole) if word]
    split: SplitName | None = None
    role: Role | None = None
    for word in words:
        for known in sorted(SPLIT_WORDS, key=len, reverse=True):
            if word == known or (word.startswith(known) and word[len(known) :] in IMAGE_WORDS | MASK_WORDS):
                split, word = SPLIT_WORDS[known], word[len(known) :]
                break
        if word in MASK_WORDS:
            role = "mask"
        elif word in IMAGE_WORDS:
            role = role or "image"
        elif word:
            return None, None
    return split, role


def _pairs_of(root: Path, folders: _Folders, known: set[Path]) -> tuple[list[tuple[str, str]], dict[Role, list[str]]]:
    images = _files(folders.image, known)
    masks = _files(folders.mask, known)
    if not images:
        loose = [(path, folder) for folder in folders.either for path in _directly(folder)]
        if not masks:
            masks = _masks_among(loose)
            if not masks:
                return [], {"image": [], "mask": []}
        images = [pair for pair in loose if pair not in masks]
    return _match(root, images, masks)


def _masks_among(files: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Return the label maps in a folder that holds images too: by their ending, or PNGs next to JPEGs of the name."""
    masks = [(path, folder) for path, folder in files if ENDS["mask"].search(path.stem)]
    photos = {path.stem for path, _ in files if path.suffix.lower() in (".jpg", ".jpeg")}
    return masks or [(path, folder) for path, folder in files if path.suffix.lower() == ".png" and path.stem in photos]


def _match(
    root: Path, images: Iterable[tuple[Path, Path]], masks: Iterable[tuple[Path, Path]]
) -> tuple[list[tuple[str, str]], dict[Role, list[str]]]:
    """Pair files by name; without the parts that tell images and label maps apart where the whole names differ."""
    by_kind: dict[Role, dict[str, Path]] = {"image": {}, "mask": {}}
    exact = {_key(path, folder, None) for path, folder in images} & {_key(path, folder, None) for path, folder in masks}
    by_role: dict[Role, Iterable[tuple[Path, Path]]] = {"image": images, "mask": masks}
    for kind, files in by_role.items():
        for path, folder in files:
            whole = _key(path, folder, None)
            key = whole if whole in exact else _key(path, folder, kind)
            other = by_kind[kind].setdefault(key, path)
            if other != path:
                raise DataError(
                    f"{path}: has the same name as {other.relative_to(root)} without its ending, so that its "
                    f"{'label map' if kind == 'image' else 'image'} is ambiguous; remove one"
                )
    both = sorted(by_kind["image"].keys() & by_kind["mask"].keys())
    pairs = [(_below(root, by_kind["image"][key]), _below(root, by_kind["mask"][key])) for key in both]
    alone: dict[Role, list[str]] = {
        kind: sorted(_below(root, path) for key, path in files.items() if key not in both)
        for kind, files in by_kind.items()
    }
    return pairs, alone


def _key(path: Path, folder: Path, kind: Role | None) -> str:
    """Return a file's name below its folder without its suffix and, for a kind, without the parts of `ENDS`."""
    stem = path.name.rpartition(".")[0]
    while kind is not None and (shorter := ENDS[kind].sub("", stem, count=1)) not in ("", stem):
        stem = shorter
    return (path.parent.relative_to(folder) / stem).as_posix()


def _files(folders: Iterable[Path], known: set[Path]) -> list[tuple[Path, Path]]:
    """List the files below folders with the folder; those below other known folders belong to these."""
    found = []
    for folder in folders:
        for parent, names, files in os.walk(folder):
            names[:] = sorted(name for name in names if name[0] != "." and Path(parent, name) not in known)
            kept = (
                name for name in sorted(files) if not name.startswith(".") and name.lower().endswith(image_suffixes())
            )
            found += [(Path(parent, name), folder) for name in kept]
    return found


def _directly(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.suffix.lower() in image_suffixes())


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
