"""From YAML files and `--set` texts to an Experiment; every fault is a sentence with file and key.

YAML stays data: no tags, no inheritance, no interpolation; `1e-3` is a number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.config.schema import FIRST_SCHEMA, SCHEMA, Schema
from heterokd.config.sentences import SPACE, Source, faults, given, sentences
from heterokd.config.space_faults import method_faults, name_faults
from heterokd.config.yaml_files import dump_yaml, plain_yaml, read_yaml
from heterokd.domains import domains
from heterokd.errors import ConfigError, did_you_mean


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment and check all that the file alone shows; no method's code is imported.

    Args:
        path: a YAML file.
        overrides: `a.b=value` texts (the command line's `--set`), applied on top; values are YAML.

    Raises:
        ConfigError: one sentence a fault, each naming file and key.
    """
    return _read(path, overrides, SCHEMA.number)[0]


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, check and complete an experiment: `read_experiment`, then what its methods' code shows.

    Args:
        path: a YAML file.
        overrides: `a.b=value` texts (the command line's `--set`), applied on top; values are YAML.

    Raises:
        ConfigError: one sentence a fault, each naming file and key.
    """
    return _completed(*_read(path, overrides, SCHEMA.number))


def load_study_experiment(path: str | Path) -> Experiment:
    """Read the experiment.yaml of a study: what it leaves out is as it was in the version that wrote it.

    Raises:
        ConfigError: the file is missing or is no experiment.
    """
    return _completed(*_read(path, (), FIRST_SCHEMA))


def _read(path: str | Path, overrides: Sequence[str], schema: int) -> tuple[Experiment, Source]:
    """An experiment, and where its keys were written; `schema` is that of a file that does not say it."""
    file = Path(path)
    content = read_yaml(file)
    inside = [text for text in overrides if text.startswith(f"{SPACE}.")]
    for text in overrides:
        if text not in inside:
            _override(content, text)
    space_file = _inline_space(content, file, Source(str(path), overrides=overrides))
    for text in inside:
        _override(content, text)
    source = Source(str(path), space_file, overrides)
    schema = _schema_number(content.pop("schema", schema), source.place("schema"))
    try:
        experiment = Experiment.model_validate(SCHEMA.complete(Experiment, content, schema))
    except ValidationError as error:
        _refuse(faults(error, Experiment), source)
        raise
    _refuse(((f"{SPACE}.{key}", text) for key, text in name_faults(experiment)), source)
    return _with_parameters(experiment, schema, SCHEMA), source


def _schema_number(number: Any, place: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not FIRST_SCHEMA <= number <= SCHEMA.number:
        raise ConfigError(
            f"{place}: expected {FIRST_SCHEMA} to {SCHEMA.number}, got {given(number)}; a file of a newer version of "
            "heterokd needs that version"
        )
    return number


def _completed(experiment: Experiment, source: Source) -> Experiment:
    _refuse(((f"{SPACE}.{key}", text) for key, text in method_faults(experiment)), source)
    space = experiment.space.model_copy(update={"methods": experiment.methods})
    return experiment.model_copy(update={"search": experiment.search.model_copy(update={"space": space})})


def at_schema(experiment: Experiment, schema: int, versions: Schema = SCHEMA) -> Experiment:
    """Return an experiment with the keys that nobody set at the defaults of an older schema.

    Args:
        experiment: with the defaults of now.
        schema: of a study that was begun earlier.
        versions: all schemas.

    Raises:
        ConfigError: a value that was set does not go with an older default.
    """
    if schema >= versions.number:
        return experiment
    try:
        older = versions.older(experiment, schema)
    except ValidationError as error:
        raise ConfigError(sentences(error, Experiment, f"{experiment.name} (schema {schema})")) from None
    return _with_parameters(older, schema, versions)


def _with_parameters(experiment: Experiment, schema: int, versions: Schema) -> Experiment:
    """Pin parameters that are not searched and whose default has changed since `schema` to the old default."""
    if schema >= versions.number:
        return experiment
    pinned = {
        f"{method}.{name}": old
        for method in experiment.methods
        for name, old in versions.parameters(method, schema).items()
        if name not in domains(experiment.method_class(method).Params)
    }
    return experiment.with_overrides({**pinned, **experiment.space.overrides})


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.yaml.

    Raises:
        ConfigError: the file is missing or is no recipe.
    """
    content = read_yaml(Path(path))
    schema = _schema_number(content.pop("schema", FIRST_SCHEMA), f"{path}: schema")
    content = SCHEMA.complete(Recipe, content, schema)
    if isinstance(content.get("params"), dict):
        content["params"] = SCHEMA.parameters(str(content.get("method")), schema) | content["params"]
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(sentences(error, Recipe, str(path))) from None
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def dump_experiment(experiment: Experiment) -> str:
    """Return the text of a study's experiment.yaml: every key of the resolved experiment."""
    content = SCHEMA.mark() | json.loads(experiment.model_dump_json())
    return dump_yaml(content)


def _refuse(found: Iterable[tuple[str, str]], source: Source) -> None:
    lines = [f"{source.place(key)}: {text}" for key, text in found]
    if lines:
        raise ConfigError("\n".join(lines))


def _override(content: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: expected key=value, for example --set training.epochs=10")
    # Below `shared` and `overrides` a key has a point in its own name: `kd.temperature`.
    *sections, last = key.split(".", 3) if key.startswith(f"{SPACE}.") else key.split(".")
    place = content
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text}: {section!r} holds a value, not keys; set it as a whole")
        place = inner
    try:
        place[last] = plain_yaml(value)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML ({error.problem}); quote it") from None
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value holds control characters") from None


def _inline_space(content: dict[str, Any], file: Path, source: Source) -> str | None:
    """Replace the name of a space's file by what it holds; the file that was found."""
    search = content.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    if not isinstance(search, dict) or not isinstance(space, str):
        return None
    # As written, then in the experiment's folder, then in the folder above: `search_spaces/x.yaml` works from anywhere.
    places = [Path(space), *(folder / space for folder in file.resolve().parents[:2])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        near = [path.name for place in places if place.parent.is_dir() for path in place.parent.glob("*.y*ml")]
        hint = did_you_mean(Path(space).name, set(near) - {file.name}) if set(near) - {file.name} else "check the path"
        raise ConfigError(
            f"{source.place(SPACE)}: there is no file {space!r} here, beside {file} or in the folder above; {hint}"
        )
    search["space"] = read_yaml(found)
    return str(found)
