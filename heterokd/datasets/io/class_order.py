"""The order of classes: a class's number is its position, and a checkpoint is worth nothing in another order."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from heterokd.datasets.io.tables import read_lines
from heterokd.errors import DataError

CLASS_LIST = "classes.txt"

ClassOrder = Literal["sorted", "natural"] | tuple[str, ...]


def order_classes(
    labels: Collection[str], wanted: ClassOrder | None, folders: Sequence[Path]
) -> tuple[tuple[str, ...], list[str]]:
    """Return the classes in order, with sentences about it.

    Args:
        labels: names of the classes.
        wanted: the order; None: that of `classes.txt` in the first of `folders` that has it, or sorted.
        folders: where `classes.txt` may be.

    Raises:
        DataError: a given list, or that of `classes.txt`, has other names.
    """
    if isinstance(wanted, tuple):
        return _listed(labels, wanted, "data.class_order"), []
    listed = [path for path in (folder / CLASS_LIST for folder in folders) if path.is_file()]
    if wanted is None and listed:
        lines = [line.strip() for line in read_lines(listed[0], "list the classes, or remove it") if line.strip()]
        if set(lines) != set(labels):  # `0 cat`, `1 dog`
            numbered = [line.partition(" ")[2].strip() for line in lines]
            lines = numbered if set(numbered) == set(labels) else lines
        return _listed(labels, lines, str(listed[0])), [f"classes are in the order of {listed[0]}"]
    plain, natural = sorted(labels), natural_order(labels)
    if wanted == "natural":
        return tuple(natural), []
    notes = []
    if wanted is None and natural != plain:
        place = next(i for i, (one, other) in enumerate(zip(plain, natural, strict=True)) if one != other)
        notes.append(
            f"classes are sorted as text: {plain[place]} before {natural[place]}; a checkpoint that was trained in "
            f"natural order ({natural[place]} first, as timm reads folders) needs data.class_order: natural"
        )
    return tuple(plain), notes


def natural_order(labels: Collection[str]) -> list[str]:
    """Return names in the order of the numbers in them, 2 before 10, as timm orders the folders of classes."""

    def key(label: str) -> tuple[list[int | str], str]:
        parts = re.split(r"(\d+)", label.lower())  # text and numbers alternate
        return [int(part) if place % 2 else part for place, part in enumerate(parts)], label

    return sorted(labels, key=key)


def _listed(labels: Collection[str], names: Sequence[str], source: str) -> tuple[str, ...]:
    for name in sorted(set(names)):
        if names.count(name) > 1:
            raise DataError(f"{source}: names class {name!r} twice; remove one")
        if name not in labels:
            raise DataError(f"{source}: names class {name!r}, which has no images; correct it, or add a folder")
    for label in sorted(set(labels) - set(names)):
        raise DataError(f"{source}: lacks class {label!r}, which has images; add it")
    return tuple(names)
