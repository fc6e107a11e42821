"""Classes of label maps: their names, and the class of each value in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heterokd.datasets.masks.read import read_colours, read_numbers
from heterokd.datasets.masks.settings import MaskClass, MaskSettings, colour_code, colour_name
from heterokd.errors import DataError, did_you_mean
from heterokd.outputs import IGNORE

UNKNOWN = -1
"""Class of values that no label map may hold."""


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Class of each value in label files.

    Attributes:
        values: [V] numbers, or colours (red * 65536 + green * 256 + blue), ascending.
        classes: [V] class number of each value, or IGNORE.
        colours: whether the values are colours.
    """

    values: NDArray[np.int32]
    classes: NDArray[np.int16]
    colours: bool = False

    def read(self, path: Path, advice: str) -> NDArray[np.uint8]:
        """Read the classes of a label file, [H, W], with IGNORE.

        Raises:
            DataError: the file is damaged, missing, of the wrong kind, or holds a value that is not in the table.
        """
        found = (read_colours if self.colours else read_numbers)(path, advice)
        places = np.searchsorted(self.values, found).clip(max=len(self.values) - 1)
        classes = np.where(self.values[places] == found, self.classes[places], UNKNOWN)
        if classes.min() == UNKNOWN:
            value = int(found[classes == UNKNOWN][0])
            kind, text = ("colour", colour_name(value)) if self.colours else ("label", str(value))
            raise DataError(f"{path}: holds the {kind} {text}, expected {self.describe()}; {advice}")
        return classes.astype(np.uint8)

    def describe(self) -> str:
        """Describe the values that a label file may hold: "0 to 20 or 255"."""
        if self.colours:
            names = [colour_name(value) for value in self.values.tolist()]
            return ", ".join(names[:12]) + (f" or {len(names) - 12} others" if len(names) > 12 else "")
        runs = np.split(self.values, np.flatnonzero(np.diff(self.values) > 1) + 1)
        return " or ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)

    def identity(self) -> bytes:
        """Return bytes that change with the table, for fingerprints."""
        if self.colours or self.values[-1] > IGNORE:
            return b"".join((bytes([self.colours]), self.values.astype("<i4").tobytes(), self.classes.tobytes()))
        table = np.full(IGNORE + 1, UNKNOWN, "<i2")
        table[self.values] = self.classes
        return table.tobytes()


def label_table(class_of: Mapping[int, int], *, colours: bool = False) -> LabelTable:
    """Return the table of a mapping from values to class numbers, or IGNORE."""
    values = np.array(sorted(class_of), np.int32)
    return LabelTable(values, np.array([class_of[value] for value in values.tolist()], np.int16), colours)


@dataclass(frozen=True, eq=False)
class MaskClasses:
    """Classes of a data set with label maps.

    Attributes:
        names: name of each class number.
        table: class of each value.
        notes: sentences on how the classes were found, for the user.
        changed: whether they differ from the classes that the data set has without settings.
    """

    names: tuple[str, ...]
    table: LabelTable
    notes: tuple[str, ...] = field(default=())
    changed: bool = False

    def identity(self) -> bytes:
        """Return bytes that change with the classes, for fingerprints."""
        return self.table.identity() + ("\0".join(self.names).encode() if self.changed else b"")


@dataclass(frozen=True)
class KnownClasses:
    """Classes of a published data set, and the numbers in its layout.

    Attributes:
        classes: the classes.
        ignored: numbers of ignored pixels.
        first: number of the first class of a list without numbers; lower numbers are ignored.
    """

    classes: tuple[MaskClass, ...]
    ignored: tuple[int, ...] = (IGNORE,)
    first: int = 0


def listed_classes(
    settings: MaskSettings,
    classes: Sequence[MaskClass],
    first: int = 0,
    ignored: Sequence[int] = (IGNORE,),
    *,
    colours: bool = False,
) -> MaskClasses:
    """Return the classes of a list: with the settings' `merge`, `drop` and `ignore`.

    Args:
        settings: settings of the label maps.
        classes: names; of classes without values, the number is the position in the list, from `first`.
        first: number of the first class of a list without values.
        ignored: numbers that are ignored unless they are a class or the settings have `ignore`.
        colours: whether label maps have colours; three numbers of a class are then a colour.

    Raises:
        DataError: a name is unknown, a value has two classes, or fewer than two or more than 255 classes are left.
    """
    names = [entry.name for entry in classes]
    target = _targets(settings, names)
    kept = list(dict.fromkeys(name for name in (target[name] for name in names) if name is not None))
    if not 2 <= len(kept) <= IGNORE:
        raise DataError(f"data.masks: {len(kept)} classes are left ({', '.join(kept)[:80]}), expected 2 to {IGNORE}")
    class_of: dict[int, int] = {}
    owner: dict[int, str] = {}
    for position, entry in enumerate(classes):
        label = target[entry.name]
        for value in _codes(entry.values, colours) if entry.values else [first + position]:
            if value in class_of:
                text = colour_name(value) if colours else value
                raise DataError(f"data.masks.classes: {owner[value]!r} and {entry.name!r} have the same value {text}")
            class_of[value], owner[value] = IGNORE if label is None else kept.index(label), entry.name
    for value in _codes(settings.ignore or (), colours):
        if value in owner:
            raise DataError(
                f"data.masks.ignore: {value} is the value of class {owner[value]!r}; drop it, or leave it out"
            )
        class_of[value] = IGNORE
    for value in ignored if settings.ignore is None and not colours else ():
        class_of.setdefault(value, IGNORE)
    return MaskClasses(tuple(kept), label_table(class_of, colours=colours), changed=True)


def has_colours(classes: Iterable[MaskClass]) -> bool:
    """Return whether a class list gives colours as text."""
    return any(isinstance(value, str) for entry in classes for value in entry.values)


def _targets(settings: MaskSettings, names: Sequence[str]) -> dict[str, str | None]:
    """Return for each name of the class list the class that it belongs to, or None if it is ignored."""
    target: dict[str, str | None] = {name: name for name in names}
    merged = {name: new for new, members in settings.merge.items() for name in members}
    for key, wanted in (("merge", merged), ("drop", settings.drop)):
        for name in wanted:
            if name not in target:
                raise DataError(f"data.masks.{key}: there is no class {name!r}; {did_you_mean(name, names)}")
    for new in settings.merge:
        if new in target and new not in merged:
            raise DataError(f"data.masks.merge: {new!r} is a class already; add it to its list, or choose another name")
    for name in settings.drop:
        if name in merged:
            raise DataError(f"data.masks: class {name!r} is both merged and dropped; remove it from one")
    return {**target, **merged, **dict.fromkeys(settings.drop)}


def _codes(values: Sequence[int | str], colours: bool) -> list[int]:
    """Return the values as they are read; a triple of numbers is a colour where label maps have colours."""
    if colours and len(values) == 3 and all(isinstance(value, int) and value < 256 for value in values):
        return [colour_code(",".join(map(str, values)))]
    codes = []
    for value in values:
        if isinstance(value, str) != colours:
            expected = "colours, such as '#000080'" if colours else "numbers"
            raise DataError(f"data.masks: {value!r} does not fit label maps with {expected}; give {expected}")
        codes.append(colour_code(value) if isinstance(value, str) else value)
    return codes
