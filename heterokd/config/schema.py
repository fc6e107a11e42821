"""Schema versions: identities of settings that survive a release, and the defaults of older files.

`schema_1.yaml` lists every key of schema 1 with its default, and is never changed. The identity of settings, which is
hashed, contains each of these keys with its value, and a later key only if its value differs from its first default.
A new key whose default changes no result therefore changes no hash of a recipe, teacher or study.

To change a default, add a row to `CHANGED_DEFAULTS`, which raises the schema number; also for a later key whose absence
meant something else than its default. To change the domain of a method's parameter, add a row to `CHANGED_DOMAINS`. A
file contains the number of the schema that it was written for (`schema: 2`; files of schema 1 have no number). A key
that it leaves out has the default and the domain of that schema.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, JsonValue
from pydantic_core import PydanticUndefined, to_jsonable_python

from heterokd.config.sentences import inner_model
from heterokd.domains import Choice, Domain, Float, Int

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")

FIRST_SCHEMA = 1
METHODS_SECTION = "methods"
SCHEMA_OF_COMBINATIONS = 3
"""The schema in which combinations of two methods appeared; earlier changes of their members never applied to them."""
REQUIRED = "(required)"
"""Placeholder in `schema_1.yaml` for the default of a required key."""


@dataclass(frozen=True)
class ChangedDefault:
    """A default that changed after a release.

    Attributes:
        key: as in an experiment, `training.warmup_epochs`; a method's parameter is `methods.METHOD.PARAMETER`.
        schema: the first schema number with the new default.
        old: the previous default, as JSON.
        new: the default since, as JSON.
    """

    key: str
    schema: int
    old: JsonValue
    new: JsonValue


@dataclass(frozen=True)
class ChangedDomain:
    """A search domain of a method's parameter that was changed after it had been released.

    Attributes:
        key: `methods.METHOD.PARAMETER`.
        schema: the first schema number with the new domain.
        old: the domain before; of a parameter that was not searched or did not exist, a choice of its only value.
    """

    key: str
    schema: int
    old: Domain


CHANGED_DEFAULTS: tuple[ChangedDefault, ...] = (
    ChangedDefault("methods.rsd.weight", 2, 1.0, 0.1),
    ChangedDefault("methods.rsd.off_diagonal_weight", 2, 5e-3, 0.01),
    ChangedDefault("methods.rsd.hidden_dim", 2, 2048, None),
    ChangedDefault("methods.rsd.reduction", 2, "mean", "sum"),
    ChangedDefault("methods.rsd.initialisation", 2, "uniform", "truncated_normal"),
    ChangedDefault("methods.tekap.perturbed_weight", 2, 0.8, 0.72),
    ChangedDefault("methods.ofa.merge_activation", 2, "between", "first"),
    ChangedDefault("methods.ofa.qkv_bias", 2, True, False),
    ChangedDefault("methods.ifvd.label_pixel", 2, "centre", "corner"),
    ChangedDefault("methods.fbt.task_loss", 2, True, False),
    ChangedDefault("methods.tekap_feature.memory_updates", 2, "once", "each"),
    ChangedDefault("methods.cirkd.label_pixel", 2, "centre", "corner"),
    ChangedDefault("methods.pat.norm_grid", 2, "source", "target"),
    ChangedDefault("data.reader", 3, 1, 2),
    ChangedDefault("teacher.fit", 3, "all", "auto"),
    ChangedDefault("search.min_epochs", 3, 1, "auto"),
    ChangedDefault("data.scene_views", 4, 1, 2),
    ChangedDefault("data.evaluation_size", 5, "canvas", "label"),
    ChangedDefault("methods.heteroakd.teacher_grid", 5, "student", "native"),
    ChangedDefault("data.scene_views", 6, 2, 3),
    ChangedDefault("search.confirm_references", 6, False, True),
    ChangedDefault("search.evaluate", 7, "every", "auto"),
)
"""All changed defaults, by ascending schema number."""

CHANGED_DOMAINS: tuple[ChangedDomain, ...] = (
    ChangedDomain("methods.rsd.weight", 2, Float(0.1, 10, log=True)),
    ChangedDomain("methods.rsd.hidden_dim", 2, Int(128, 4096, log=True)),
    ChangedDomain("methods.rsd.hidden_ratio", 2, Choice(2)),
    ChangedDomain("methods.fbt.task_loss", 2, Choice(True)),
    ChangedDomain("methods.heteroakd.kd_weight", 4, Choice(0.1)),
    ChangedDomain("methods.heteroakd.projector", 4, Choice("conv-bn", "conv-bn-relu-conv1x1")),
)
"""All changed domains, by ascending schema number."""


@dataclass(frozen=True)
class Schema:
    """The schemas up to the newest, with what changed between them, by ascending schema number.

    Attributes:
        changes: defaults.
        domains: domains of methods' parameters.
    """

    changes: tuple[ChangedDefault, ...] = CHANGED_DEFAULTS
    domains: tuple[ChangedDomain, ...] = CHANGED_DOMAINS

    @property
    def number(self) -> int:
        """The newest schema number."""
        return self.changes[-1].schema if self.changes else FIRST_SCHEMA

    def mark(self) -> dict[str, int]:
        """Return the key `schema` of a file; schema 1 has no such key."""
        return {"schema": self.number} if self.number > FIRST_SCHEMA else {}

    def identity(self, settings: BaseModel, section: str, content: Mapping[str, object]) -> dict[str, object]:
        """Return the identity of settings: keys of schema 1, and later keys that differ from their first default.

        Args:
            settings: a section, or a recipe.
            section: its name in `schema_1.yaml`; `recipe` for a recipe.
            content: the settings as JSON, without keys that do not belong to the identity.
        """
        first = keys_of_schema_1().get(section, {})
        kept: dict[str, object] = {}
        for key, value in content.items():
            path = key if section == "recipe" else f"{section}.{key}"
            if key not in first and value == self._first_default(type(settings), key, path):
                continue
            inner = getattr(settings, key)
            if isinstance(inner, BaseModel) and isinstance(value, Mapping):
                value = self.identity(inner, path, value)
            elif isinstance(inner, tuple) and isinstance(value, list):
                models = zip(inner, value, strict=True)
                value = [self.identity(each, path, of) if isinstance(each, BaseModel) else of for each, of in models]
            kept[key] = value
        return kept

    def _first_default(self, model: type[BaseModel], key: str, path: str) -> object:
        old = self._changed(FIRST_SCHEMA - 1)
        section, _, method = path.removesuffix(f".{key}").partition(".")
        of_method = self.parameters(method, FIRST_SCHEMA - 1) if section == METHODS_SECTION else {}
        return old[path] if path in old else of_method.get(key, _default(model, key))

    def _changed(self, schema: int) -> dict[str, JsonValue]:
        """Return the defaults of a schema by key, for keys whose default changed later."""
        return {change.key: change.old for change in reversed(self.changes) if change.schema > schema}

    def default(self, model: type[BaseModel], path: str, schema: int) -> object:
        """Return the default of a dotted key in a schema, as JSON; `PydanticUndefined` if there is none."""
        old = self._changed(schema)
        if path in old:
            return old[path]
        *sections, key = path.split(".")
        holder: type[BaseModel] | None = model
        for section in sections:
            field = None if holder is None else holder.model_fields.get(section)
            holder = None if field is None else inner_model(field.annotation)
        return PydanticUndefined if holder is None else _default(holder, key)

    def complete(self, model: type[BaseModel], content: Mapping[str, object], schema: int) -> dict[str, object]:
        """Return the content of a file, with missing keys at the defaults of its schema where these changed later.

        Args:
            model: of the content, an experiment or a recipe.
            content: parsed YAML.
            schema: that the file was written for.
        """
        completed = copy.deepcopy(dict(content))
        for path, old in self._changed(schema).items():
            place: object = completed
            *sections, key = path.split(".")
            for section in sections if sections[0] in model.model_fields else ():
                place = place.setdefault(section, {}) if isinstance(place, dict) else None
            if isinstance(place, dict) and place is not completed:
                place.setdefault(key, old)
        return completed

    def older(self, settings: Model, schema: int) -> Model:
        """Return settings whose unset keys have the defaults of an older schema.

        Raises:
            ValidationError: a value that was set is not valid with an older default.
        """
        model = type(settings)
        return model.model_validate(self.complete(model, settings.model_dump(exclude_unset=True), schema))

    def parameters(self, method: str, schema: int) -> dict[str, JsonValue]:
        """Return the schema's defaults of a method's parameters, for parameters whose default changed later.

        A combination of two methods (`kd+rsd`) has the parameters of both, named `METHOD_PARAMETER`.
        """
        if "+" in method:
            return _of_members(method, lambda member: self.parameters(member, max(schema, SCHEMA_OF_COMBINATIONS)))
        prefix = f"{METHODS_SECTION}.{method}."
        changed = self._changed(schema)
        return {key.removeprefix(prefix): old for key, old in changed.items() if key.startswith(prefix)}

    def parameter_domains(self, method: str, schema: int) -> dict[str, Domain]:
        """Return a method's parameters whose domain differs from the schema's, with the schema's domain."""
        if "+" in method:
            return _of_members(
                method, lambda member: self.parameter_domains(member, max(schema, SCHEMA_OF_COMBINATIONS))
            )
        prefix = f"{METHODS_SECTION}.{method}."
        changed = {change.key: change.old for change in reversed(self.domains) if change.schema > schema}
        return {key.removeprefix(prefix): old for key, old in changed.items() if key.startswith(prefix)}


SCHEMA = Schema()


def _of_members(combination: str, values: Callable[[str], Mapping[str, Value]]) -> dict[str, Value]:
    members = combination.split("+")
    return {f"{member}_{name}": value for member in members for name, value in values(member).items()}


@lru_cache(maxsize=1)
def keys_of_schema_1() -> Mapping[str, Mapping[str, JsonValue]]:
    """Return the keys of schema 1 with their defaults, by section or `methods.METHOD`."""
    text = Path(__file__).with_name("schema_1.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, JsonValue]] = yaml.safe_load(text)
    return found


def _default(model: type[BaseModel], key: str) -> object:
    field = model.model_fields.get(key)
    default = PydanticUndefined if field is None else field.get_default(call_default_factory=True)
    return default if default is PydanticUndefined else to_jsonable_python(default)
