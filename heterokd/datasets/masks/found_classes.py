"""Classes of label maps whose data set does not define them: from a class list, or from the values in the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from heterokd.datasets.io.decoded_files import decoding_threads
from heterokd.datasets.masks.class_list import NAMES, read_class_list
from heterokd.datasets.masks.classes import KnownClasses, MaskClasses, has_colours, listed_classes
from heterokd.datasets.masks.read import read_colours, read_values
from heterokd.datasets.masks.settings import MaskClass, MaskSettings, colour_name
from heterokd.errors import DataError
from heterokd.outputs import IGNORE

MOST_FOUND = 64
"""Maximum number of values that are taken for classes without a class list; more come from a gradient or a photo."""
SAMPLE = 64
"""Number of label maps that are read to find out what a class list without values means."""

BINARY = (0, IGNORE)
BINARY_NAMES = ("background", "object")

Values = Counter[int]
"""Number of label maps that hold a value."""


def mask_classes(
    settings: MaskSettings,
    root: Path,
    masks: Sequence[Path],
    advice: str,
    known: KnownClasses | None = None,
) -> MaskClasses:
    """Determine the classes: the settings' list, the data set's, a list in its folder, or the values in its files.

    Args:
        settings: settings of the label maps.
        root: folder of the data set.
        masks: paths of all label maps.
        advice: what to do about a file that cannot be read, for error messages.
        known: classes of the data set; None if they are the user's.

    Raises:
        DataError: the class list or a label map is damaged, or the values fit no class list.
    """
    notes: tuple[str, ...] = ()
    listed = settings.classes
    if listed is None and known is not None:
        found = listed_classes(settings, known.classes, known.first, known.ignored)
        return replace(found, changed=found.names != tuple(entry.name for entry in known.classes))
    if listed is None and (file := _class_list(root, masks)) is not None:
        listed, notes = str(file), (f"classes: those of {file}",)
    if isinstance(listed, str):
        listed = read_class_list(root / listed)
    if listed is None:
        return _from_values(settings, masks, advice)
    values, colours = _values(masks[:: -(-len(masks) // SAMPLE)], advice)
    if colours and not any(entry.values for entry in listed):
        raise DataError(
            f"{masks[0].parent}: the label maps are colour images, but data.masks.classes has names alone; give each "
            f"class its colour: {', '.join(map(colour_name, sorted(values)[:8]))} were found"
        )
    if has_colours(listed) and not colours:
        numbers = {*range(len(listed)), IGNORE}
        if _are_colours(listed, masks[0], advice):
            colours = True
        elif set(values) <= numbers:
            listed = tuple(MaskClass(name=entry.name) for entry in listed)
            notes += ("label maps hold numbers: each is taken for a position in the class list",)
    unnumbered = len(listed) == 2 and not any(entry.values for entry in listed)
    if unnumbered and set(values) <= set(BINARY) and IGNORE in values and settings.ignore is None:
        listed = tuple(MaskClass(name=entry.name, values=(value,)) for entry, value in zip(listed, BINARY, strict=True))
        notes += (f"label maps hold 0 and {IGNORE} only: {IGNORE} is read as {listed[1].name!r}, not as ignored",)
    first = 0 if known is None or any(entry.values for entry in listed) else known.first
    found = listed_classes(settings, listed, first, (*range(first), IGNORE), colours=colours)
    return replace(found, notes=notes)


def _class_list(root: Path, masks: Sequence[Path]) -> Path | None:
    """Find a class list in the data set's folder, or next to the label maps."""
    folders = dict.fromkeys(
        (root, *(root / name for name in ("train", "training")), masks[0].parent, masks[0].parent.parent)
    )
    files = (folder / name for folder in folders if folder.is_relative_to(root) for name in NAMES)
    return next((file for file in files if file.is_file()), None)


def _are_colours(listed: Sequence[MaskClass], mask: Path, advice: str) -> bool:
    """Return whether a palette or grey label map has the colours of a class list."""
    table = listed_classes(MaskSettings(), listed, colours=True).table
    return bool(np.isin(np.unique(read_colours(mask, advice)), table.values).any())


def _from_values(settings: MaskSettings, masks: Sequence[Path], advice: str) -> MaskClasses:
    """Take the values in the files for classes."""
    values, colours = _values(masks, advice)
    ignored = {value for value in settings.ignore or () if isinstance(value, int)}
    numbers = sorted(value for value in values if value not in ignored)
    if len(numbers) > MOST_FOUND:
        sample = ", ".join(colour_name(value) if colours else str(value) for value in numbers[:6])
        raise DataError(
            f"{masks[0].parent}: the label maps hold {len(numbers)} different values ({sample}, ...), too many for "
            "classes; list the classes in data.masks.classes, or save label maps without smoothing and compression"
        )
    if colours:
        named = [MaskClass(name=colour_name(value), values=(colour_name(value),)) for value in numbers]
        note = f"label maps are colour images: each of the {len(named)} colours found is a class"
    elif settings.ignore is None and set(numbers) == set(BINARY):
        named = [MaskClass(name=name, values=(value,)) for name, value in zip(BINARY_NAMES, BINARY, strict=True)]
        note = (
            f"label maps hold 0 and {IGNORE} only: two classes, {BINARY_NAMES[0]} (0) and {BINARY_NAMES[1]} ({IGNORE})"
        )
    else:
        if settings.ignore is None and _is_border(numbers):
            numbers.remove(IGNORE)
        named = [MaskClass(name=str(value), values=(value,)) for value in numbers]
        note = f"label maps hold numbers: each of the {len(named)} found is a class"
    if len(named) < 2:
        raise DataError(
            f"{masks[0].parent}: all {len(masks)} label maps hold the single value {', '.join(map(str, values))}; "
            "two classes are needed"
        )
    found = listed_classes(settings, named, colours=colours)
    return replace(found, notes=(f"{note}; data.masks.classes names them",))


def _is_border(numbers: Sequence[int]) -> bool:
    """Return whether 255 marks ignored pixels: two or more consecutive numbers from 0 or 1 are the classes."""
    rest = numbers[:-1]
    return len(rest) > 1 and numbers[-1] == IGNORE and rest[0] <= 1 and rest[-1] - rest[0] == len(rest) - 1


def _values(masks: Sequence[Path], advice: str) -> tuple[Values, bool]:
    """Count the values of label maps; return also whether they are colours."""
    with decoding_threads() as pool:
        seen = list(pool.map(partial(_distinct, advice=advice), masks))
        colours = any(is_colour for _, is_colour in seen)
        if colours:  # grey and palette images among them are read again, by their colours
            again = pool.map(partial(_distinct_colours, advice=advice), (masks[i] for i in _plain(seen)))
            for place, values in zip(_plain(seen), again, strict=True):
                seen[place] = (values, True)
    return Counter(value for values, _ in seen for value in values), colours


def _plain(seen: Sequence[tuple[list[int], bool]]) -> list[int]:
    return [place for place, (_, colours) in enumerate(seen) if not colours]


def _distinct(path: Path, advice: str) -> tuple[list[int], bool]:
    values, colours = read_values(path, advice)
    return np.unique(values).tolist(), colours


def _distinct_colours(path: Path, advice: str) -> list[int]:
    found: list[int] = np.unique(read_colours(path, advice)).tolist()
    return found
