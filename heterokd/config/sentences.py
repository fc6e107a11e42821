"""Format pydantic's errors as sentences: place, expected value, given value, nearest valid name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from heterokd.errors import did_you_mean, without_password

SPACE = "search.space"
LONGEST = 60
"""Maximum number of characters of a given value in a sentence."""

EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string": "a string",
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
    """The files and `--set` texts that an experiment's keys come from.

    Attributes:
        file: the experiment's file.
        files: by section, its file if it is a separate file, such as that of `search.space`.
        overrides: `a.b=value` texts; a later text replaces an earlier one.
    """

    file: str
    files: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()

    def place(self, key: str) -> str:
        """Return `FILE: key`, or the `--set` text that set the key or a section that contains it."""
        section = next((section for section in self.files if _is_in(key, section)), None)
        for text in reversed(self.overrides):
            name = text.partition("=")[0]
            if _is_in(key, name) and not (section is not None and _is_in(section, name)):
                inner = key[len(name) :].lstrip(".")
                return f"--set {without_password(text)}" + (f": {inner}" if inner else "")
        if section is not None:
            inner = key[len(section) + 1 :]
            return self.files[section] + (f": {inner}" if inner else "")
        return f"{self.file}: {key}" if key else self.file


def _is_in(key: str, section: str) -> bool:
    return key == section or (key.startswith(section) and key[len(section)] in ".[")


def faults(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Return dotted key and sentence of each fault; a value that fits no member of a union is a single fault."""
    found: dict[str, list[tuple[ErrorDetails, type[BaseModel] | None]]] = {}
    for fault in error.errors(include_url=False):
        key, holder = _key(fault, model)
        found.setdefault(key, []).append((fault, holder))
    for key, group in found.items():
        # `search.space` may be a file or keys: if a key inside is wrong, the fault "not a file" is left out.
        if not any(other != key and _is_in(other, key) for other in found):
            yield key, _sentence(key, group)


def sentences(error: ValidationError, model: type[BaseModel], where: str, *, prefix: str = "") -> str:
    """Return a line per fault: `where: key: sentence`."""
    named = ((".".join(part for part in (prefix, key) if part), text) for key, text in faults(error, model))
    return "\n".join(f"{where}: {key}: {text}" if key else f"{where}: {text}" for key, text in named)


def given(value: object) -> str:
    """Format a value as in YAML, shortened to `LONGEST` characters."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:  # keys that JSON does not support, such as bytes
        text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _sentence(key: str, group: Sequence[tuple[ErrorDetails, type[BaseModel] | None]]) -> str:
    fault, holder = group[0]
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        return f"there is no such key; {did_you_mean(key.rpartition('.')[2], holder.model_fields if holder else ())}"
    if kind == "invalid_key":
        return "a key must be a string; quote it"
    if kind == "missing":
        return "is missing; add it"
    for other, _ in group:
        if other["type"] == "value_error":
            return str(other["msg"]).removeprefix("Value error, ")
        if other["type"] in BOUNDS:
            bound, words = BOUNDS[other["type"]]
            return f"{words} {other['ctx'][bound]:g}, got {given(value)}"
    if kind == "string_pattern_mismatch":
        return f"expected at most 64 letters, digits, '.', '_' or '-', the first a letter or digit, got {given(value)}"
    expected = dict.fromkeys(_expected(other) for other, _ in group)
    options = [option for other, _ in group for option in _options(other)]
    hint = f"; {did_you_mean(value, options)}" if isinstance(value, str) and len(options) > 1 else ""
    if not any(expected):
        return f"{str(fault['msg'])[:1].lower()}{str(fault['msg'])[1:]}, got {given(value)}"
    return f"expected {' or '.join(text for text in expected if text)}, got {given(value)}{hint}"


def _expected(fault: ErrorDetails) -> str:
    kind = fault["type"]
    options = _options(fault)
    if options:
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    return EXPECTED.get(kind) or EXPECTED.get(kind.partition("_")[0], "")


def _options(fault: ErrorDetails) -> list[str]:
    """Return the values of a Literal, which pydantic lists as `'a', 'b' or 'c'`."""
    if fault["type"] != "literal_error":
        return []
    return re.findall(r"'([^']*)'", fault["ctx"]["expected"])


def _key(fault: ErrorDetails, model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """Return the dotted key as in the file, without pydantic's names of union members, and the model that holds it."""
    key = ""
    holder: type[BaseModel] | None = model
    for number, part in enumerate(fault["loc"], start=1):
        written = number == len(fault["loc"]) and fault["type"] in ("extra_forbidden", "invalid_key", "missing")
        if written or (isinstance(part, str) and holder is not None and part in holder.model_fields):
            key += f".{part}" if key else str(part)
            if not written and holder is not None:
                holder = inner_model(holder.model_fields[str(part)].annotation)
        elif isinstance(part, int):
            key += f"[{part}]"
    return key, holder


def inner_model(annotation: object) -> type[BaseModel] | None:
    """Return the model that a field of this annotation may hold, alone or in a union."""
    members = (annotation, *get_args(annotation))
    return next((member for member in members if isinstance(member, type) and issubclass(member, BaseModel)), None)
