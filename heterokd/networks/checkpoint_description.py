"""Description of weights, in the checkpoint or in a file next to it: names of classes, and the network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from heterokd.networks.checkpoint_file import CheckpointFile

KEYS = ("class_names", "classes", "class_to_idx", "idx_to_class", "label_names", "id2label", "label2id", "labels")
"""Keys of torchvision's, timm's, Hugging Face's and heterokd's files."""
_NESTED = ("", "meta", "metadata", "hyper_parameters", "args", "config", "pretrained_cfg", "dataset_meta")
SIDE_FILES = (
    *("class_names.json", "class_to_idx.json", "classes.json", "labels.json", "student.json", "config.json"),
    *("classes.txt", "class_names.txt", "labels.txt"),
)
LARGEST_FILE = 2**24
_ARCHITECTURE = ("arch", "architecture", "model_name")
"""Keys of a checkpoint that name the network, as in timm's."""


def class_names(file: CheckpointFile, path: Path) -> tuple[tuple[str, ...], str] | None:
    """Return the names in the order of the logits, and where they stand; None if nothing names them."""
    for key, value in _named(file.content):
        names = _in_order(value)
        if names is not None:
            return names, f"{key!r} of the file"
    for key, text in file.metadata.items():
        names = _in_order(_parsed(text)) if key in KEYS else None
        if names is not None:
            return names, f"{key!r} of the file"
    for other in (path.with_suffix(".json"), path.with_suffix(".txt"), *map(path.with_name, SIDE_FILES)):
        names = _of_file(other)
        if names is not None:
            return names, str(other)
    return None


def described_network(file: CheckpointFile, path: Path) -> str | None:
    """Return what a checkpoint, or a student's recipe next to it, says of the network, as a phrase; None if nothing."""
    for key in _ARCHITECTURE:
        if isinstance(file.content.get(key), str):
            return f"the file names the network {file.content[key]!r}"
    recipe = path.with_name("recipe.yaml")
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        student = content["student"]
        return f"{recipe} describes network {student['network']!r} with options {student['options']}"
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _of_file(path: Path) -> tuple[str, ...] | None:
    try:
        if path.stat().st_size > LARGEST_FILE or not path.is_file():
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if path.suffix == ".txt":
        return _in_order([line.strip() for line in text.splitlines() if line.strip()])
    content = _parsed(text)
    direct = _in_order(content)
    if direct is not None or not isinstance(content, Mapping):
        return direct
    return next((names for _, value in _named(content) if (names := _in_order(value)) is not None), None)


def _named(content: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    for place in _NESTED:
        holder = content if not place else content.get(place)
        if isinstance(holder, Mapping):
            yield from ((f"{place}.{key}".lstrip("."), holder[key]) for key in KEYS if key in holder)


def _in_order(value: object) -> tuple[str, ...] | None:
    """Return names of a list, of {name: number} or of {number: name}; None if it is none of these."""
    if isinstance(value, Mapping):
        pairs = [(key, number) for key, number in value.items() if _number(number) is not None]
        if len(pairs) < len(value):
            pairs = [(name, key) for key, name in value.items()]
        numbered = {_number(number): str(name) for name, number in pairs}
        if not numbered or set(numbered) != set(range(len(value))):
            return None
        return tuple(numbered[number] for number in range(len(value)))
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, (str, int)) for name in value):
        names = tuple(map(str, value))
        return names if len(set(names)) == len(names) else None
    return None


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
