"""Keys and defaults of earlier versions: what names a recipe or a teacher, and what an older file means.

`schema_1.yaml` lists every key of schema 1 with its default, and is never changed. The identity of settings (what is
hashed) holds each of these keys with its value, and a later key only where its value differs from the default that it
was introduced with. So a new key whose default changes nothing leaves every recipe, teacher and study as they are.

A default that is changed raises the schema number: add a row to `CHANGED_DEFAULTS`. A file holds the number of the
schema that it was written for (`schema: 2`; files of schema 1 do not), and keys that it leaves out have that schema's
default.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, JsonValue
from pydantic_core import PydanticUndefined, to_jsonable_python

from heterokd.config.sentences import inner_model

Model = TypeVar("Model", bound=BaseModel)

FIRST_SCHEMA = 1
METHODS_SECTION = "methods"
REQUIRED = "(required)"
"""Stands in `schema_1.yaml` for the default of a key that has none."""


@dataclass(frozen=True)
class ChangedDefault:
    """A default that was changed after it had been released.

    Attributes:
        key: as in an experiment, `training.warmup_epochs`; of a method's parameter `methods.METHOD.PARAMETER`.
        schema: the first schema number with the new default.
        old: the default before, as JSON has it.
        new: the default since.
    """

    key: str
    schema: int
    old: JsonValue
    new: JsonValue


CHANGED_DEFAULTS: tuple[ChangedDefault, ...] = ()
"""In the order of their schema numbers."""


@dataclass(frozen=True)
class Schema:
    """All schema numbers up to the newest: their keys and defaults.

    Attributes:
        changes: defaults that were changed, in the order of their schema numbers.
    """

    changes: tuple[ChangedDefault, ...] = CHANGED_DEFAULTS

    @property
    def number(self) -> int:
        """The newest schema number."""
        return self.changes[-1].schema if self.changes else FIRST_SCHEMA

    def mark(self) -> dict[str, int]:
        """Return what a file says of its schema: nothing in schema 1, whose files have no such key."""
        return {"schema": self.number} if self.number > FIRST_SCHEMA else {}

    def identity(self, settings: BaseModel, section: str, **options: Any) -> dict[str, Any]:
        """Return what names settings: keys of schema 1, and later ones that differ from their first default.

        Args:
            settings: a section, or a recipe.
            section: its name in `schema_1.yaml`; of a whole recipe `recipe`.
            options: `include` or `exclude` of `model_dump`.
        """
        return self._identity(settings, settings.model_dump(mode="json", **options), section)

    def _identity(self, settings: BaseModel, content: Mapping[str, Any], section: str) -> dict[str, Any]:
        first = keys_of_schema_1().get(section, {})
        kept = {}
        for key, value in content.items():
            path = key if section == "recipe" else f"{section}.{key}"
            if key not in first and value == self._first_default(type(settings), key, path):
                continue
            inner = getattr(settings, key)
            kept[key] = self._identity(inner, value, path) if isinstance(inner, BaseModel) else value
        return kept

    def _first_default(self, model: type[BaseModel], key: str, path: str) -> Any:
        old = self._changed(FIRST_SCHEMA - 1)
        return old[path] if path in old else _default(model, key)

    def _changed(self, schema: int) -> dict[str, JsonValue]:
        """By key, the default of a schema, for keys whose default a later schema has changed."""
        return {change.key: change.old for change in reversed(self.changes) if change.schema > schema}

    def default(self, model: type[BaseModel], path: str, schema: int) -> Any:
        """Return the default of a dotted key in a schema, as JSON has it; `PydanticUndefined` if there is none."""
        old = self._changed(schema)
        if path in old:
            return old[path]
        *sections, key = path.split(".")
        holder: type[BaseModel] | None = model
        for section in sections:
            field = None if holder is None else holder.model_fields.get(section)
            holder = None if field is None else inner_model(field.annotation)
        return PydanticUndefined if holder is None else _default(holder, key)

    def complete(self, model: type[BaseModel], content: Mapping[str, Any], schema: int) -> dict[str, Any]:
        """Return the content of a file with changed keys that it leaves out at the defaults of its schema.

        Args:
            model: what the file holds, an experiment or a recipe.
            content: as YAML has it.
            schema: that the file was written for.
        """
        completed = copy.deepcopy(dict(content))
        for path, old in self._changed(schema).items():
            place: Any = completed
            *sections, key = path.split(".")
            for section in sections if sections[0] in model.model_fields else ():
                place = place.setdefault(section, {}) if isinstance(place, dict) else None
            if isinstance(place, dict) and place is not completed:
                place.setdefault(key, old)
        return completed

    def older(self, settings: Model, schema: int) -> Model:
        """Return settings with the keys that nobody set at the defaults of an older schema.

        Raises:
            ValidationError: a value that was set does not go with an older default.
        """
        model = type(settings)
        return model.model_validate(self.complete(model, settings.model_dump(exclude_unset=True), schema))

    def parameters(self, method: str, schema: int) -> dict[str, JsonValue]:
        """Return a method's parameters whose default differs from the schema's, with the schema's default."""
        prefix = f"{METHODS_SECTION}.{method}."
        changed = self._changed(schema)
        return {key.removeprefix(prefix): old for key, old in changed.items() if key.startswith(prefix)}


SCHEMA = Schema()


@lru_cache(maxsize=1)
def keys_of_schema_1() -> Mapping[str, Mapping[str, JsonValue]]:
    """By section, and by `methods.METHOD`, the keys of schema 1 with their defaults."""
    text = Path(__file__).with_name("schema_1.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, JsonValue]] = yaml.safe_load(text)
    return found


def _default(model: type[BaseModel], key: str) -> Any:
    field = model.model_fields.get(key)
    default = PydanticUndefined if field is None else field.get_default(call_default_factory=True)
    return default if default is PydanticUndefined else to_jsonable_python(default)
