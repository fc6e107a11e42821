"""Pydantic's faults as sentences: where, what was expected, what was given, the nearest right name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from heterokd.errors import did_you_mean, without_password

SPACE = "search.space"
LONGEST = 60
"""Characters of a given value that a sentence repeats."""

EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string": "a text",
    "path": "a file or folder name",
    "tuple": "a list",
    "list": "a list",
    "dict": "keys and values",
    "model": "keys and values",
}
BOUNDS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}


@dataclass(frozen=True)
class Source:
    """Where the keys of an experiment were written.

    Attributes:
        file: the experiment's file.
        space: the file of its search space, if that is a separate file.
        overrides: `a.b=value` texts on top; a later one hides an earlier one.
    """

    file: str
    space: str | None = None
    overrides: Sequence[str] = ()

    def place(self, key: str) -> str:
        """`FILE: key`, or the `--set` text that gave the key or a section that holds the key."""
        in_space = self.space is not None and _is_in(key, SPACE)
        for text in reversed(self.overrides):
            name = text.partition("=")[0]
            if _is_in(key, name) and not (in_space and _is_in(SPACE, name)):
                inner = key[len(name) :].lstrip(".")
                return f"--set {without_password(text)}" + (f": {inner}" if inner else "")
        if in_space:
            inner = key[len(SPACE) + 1 :]
            return f"{self.space}" + (f": {inner}" if inner else "")
        return f"{self.file}: {key}" if key else self.file


def _is_in(key: str, section: str) -> bool:
    return key == section or (key.startswith(section) and key[len(section)] in ".[")


def faults(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Dotted key and sentence of each fault; a value that fits no member of a union is one fault."""
    found: dict[str, list[tuple[Mapping[str, Any], type[BaseModel] | None]]] = {}
    for fault in error.errors(include_url=False):
        key, holder = _key(fault, model)
        found.setdefault(key, []).append((fault, holder))
    for key, group in found.items():
        # `search.space` may be a file or keys: when a key inside is at fault, that it is no file goes without saying.
        if not any(other != key and _is_in(other, key) for other in found):
            yield key, _sentence(key, group)


def sentences(error: ValidationError, model: type[BaseModel], where: str, *, prefix: str = "") -> str:
    """One line a fault: `where: key: sentence`."""
    named = ((".".join(part for part in (prefix, key) if part), text) for key, text in faults(error, model))
    return "\n".join(f"{where}: {key}: {text}" if key else f"{where}: {text}" for key, text in named)


def given(value: object) -> str:
    """A value as its YAML shows it, cut to a length that can be read."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:  # keys that JSON has not, such as bytes
        text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _sentence(key: str, group: Sequence[tuple[Mapping[str, Any], type[BaseModel] | None]]) -> str:
    fault, holder = group[0]
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        return f"there is no such key; {did_you_mean(key.rpartition('.')[2], holder.model_fields if holder else ())}"
    if kind == "invalid_key":
        return "a key must be a word; quote it if it is meant"
    if kind == "missing":
        return "is missing; add it"
    for other, _ in group:
        if other["type"] == "value_error":
            return str(other["msg"]).removeprefix("Value error, ")
        if other["type"] in BOUNDS:
            bound, words = BOUNDS[other["type"]]
            return f"{words} {other['ctx'][bound]:g}, got {given(value)}"
    if kind == "string_pattern_mismatch":
        return (
            "must begin with a letter or digit and go on with at most 63 letters, digits, '.', '_' or '-', "
            f"got {given(value)}"
        )
    expected = dict.fromkeys(_expected(other) for other, _ in group)
    options = [option for other, _ in group for option in _options(other)]
    hint = f"; {did_you_mean(value, options)}" if isinstance(value, str) and len(options) > 1 else ""
    if not any(expected):
        return f"{str(fault['msg'])[:1].lower()}{str(fault['msg'])[1:]}, got {given(value)}"
    return f"expected {' or '.join(text for text in expected if text)}, got {given(value)}{hint}"


def _expected(fault: Mapping[str, Any]) -> str:
    kind = str(fault["type"])
    options = _options(fault)
    if options:
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    return EXPECTED.get(kind) or EXPECTED.get(kind.partition("_")[0], "")


def _options(fault: Mapping[str, Any]) -> list[str]:
    """The words of a Literal; pydantic lists them as `'a', 'b' or 'c'`."""
    if fault["type"] != "literal_error":
        return []
    return [word.strip().strip("'") for word in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]


def _key(fault: Mapping[str, Any], model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key as the file spells it, without pydantic's names of union members; and what its holder knows."""
    key = ""
    holder: type[BaseModel] | None = model
    for number, part in enumerate(fault["loc"], start=1):
        written = number == len(fault["loc"]) and fault["type"] in ("extra_forbidden", "invalid_key", "missing")
        if written or (holder is not None and part in holder.model_fields):
            key += f".{part}" if key else str(part)
            if not written and holder is not None:
                holder = inner_model(holder.model_fields[part].annotation)
        elif isinstance(part, int):
            key += f"[{part}]"
    return key, holder


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the settings that a field of this annotation may hold, alone or in a union."""
    members = (annotation, *get_args(annotation))
    return next((member for member in members if isinstance(member, type) and issubclass(member, BaseModel)), None)
