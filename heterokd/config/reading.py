"""Read experiments and recipes from YAML files and `--set` texts; every error names file and key.

YAML is data only: no tags, no inheritance, no interpolation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from pydantic import ValidationError

from heterokd.config.costs import table_faults
from heterokd.config.experiment import Experiment
from heterokd.config.inlined import inline_files
from heterokd.config.recipe import Recipe
from heterokd.config.schema import FIRST_SCHEMA, SCHEMA, Schema
from heterokd.config.sentences import SPACE, Source, faults, given, sentences
from heterokd.config.space_faults import method_faults, name_faults
from heterokd.config.yaml_files import AmbiguousYaml, dump_yaml, plain_yaml, read_yaml
from heterokd.domains import Scalar, domains
from heterokd.errors import ConfigError


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, check and complete an experiment: `read_experiment`, then the checks that import its methods.

    Args:
        path: a YAML file.
        overrides: `a.b=value` texts of `--set`, applied on top; values are YAML.

    Raises:
        ConfigError: a line per fault, each naming file and key.
    """
    return _completed(*_read(path, overrides, SCHEMA.number))


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment as `load_experiment` does, but import no method, so that most faults are found quickly."""
    return _read(path, overrides, SCHEMA.number)[0]


def load_study_experiment(path: str | Path) -> Experiment:
    """Read the experiment.yaml of a study; a missing key has the default of the version that wrote the file.

    Raises:
        ConfigError: the file is missing or holds no valid experiment.
    """
    return _completed(*_read(path, (), FIRST_SCHEMA))


def read_study_experiment(path: str | Path) -> Experiment:
    """Read a study's experiment.yaml as `load_study_experiment` does, but import no method if this version wrote it.

    For commands that show results: the search has checked the methods.
    """
    return _read(path, (), FIRST_SCHEMA)[0]


def study_schema(path: str | Path) -> int:
    """Read the number of the schema that an experiment.yaml of a study was written with.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    return _schema_number(read_yaml(Path(path)).get("schema", FIRST_SCHEMA), f"{path}: schema")


def _read(path: str | Path, overrides: Sequence[str], schema: int) -> tuple[Experiment, Source]:
    """Return an experiment and the sources of its keys; `schema` is the default of the file's schema number."""
    file = Path(path)
    content = read_yaml(file)
    inside = [text for text in overrides if text.startswith(f"{SPACE}.")]
    outside = [text for text in overrides if text not in inside]
    overrides = [*outside, *inside]  # as they are applied
    for text in outside:
        _override(content, text)
    files = inline_files(content, file, Source(str(path), overrides=overrides))
    for text in inside:
        _override(content, text)
    source = Source(str(path), files, overrides)
    schema = _schema_number(content.pop("schema", schema), source.place("schema"))
    try:
        experiment = Experiment.model_validate(SCHEMA.complete(Experiment, content, schema))
    except ValidationError as error:
        _refuse(faults(error, Experiment), source)
        raise
    _refuse(((f"{SPACE}.{key}", text) for key, text in name_faults(experiment)), source)
    _refuse(table_faults(experiment.search, experiment.student.networks), source)
    return _with_parameters(experiment, schema, SCHEMA), source


def _schema_number(number: object, place: str) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not FIRST_SCHEMA <= number <= SCHEMA.number:
        raise ConfigError(
            f"{place}: expected {FIRST_SCHEMA} to {SCHEMA.number}, got {given(number)}; a file of a newer version of "
            "heterokd needs that version"
        )
    return number


def _completed(experiment: Experiment, source: Source) -> Experiment:
    _refuse(((f"{SPACE}.{key}", text) for key, text in method_faults(experiment)), source)
    return experiment.with_space(experiment.space.model_copy(update={"methods": experiment.listed_methods}))


def at_schema(experiment: Experiment, schema: int, versions: Schema = SCHEMA) -> Experiment:
    """Return an experiment whose unset keys have the defaults of an older schema.

    Args:
        experiment: with the current defaults.
        schema: of a study that an earlier version began.
        versions: all schemas.

    Raises:
        ConfigError: a value that was set is not valid with an older default.
    """
    if schema >= versions.number:
        return experiment
    try:
        older = versions.older(experiment, schema)
    except ValidationError as error:
        raise ConfigError(sentences(error, Experiment, f"{experiment.name} (schema {schema})")) from None
    return _with_parameters(older, schema, versions)


def _with_parameters(experiment: Experiment, schema: int, versions: Schema) -> Experiment:
    """Search what an older schema searched: its domains and its defaults.

    Parameters that are not searched are pinned to the schema's defaults, because they appear in no sample.
    """
    if schema >= versions.number:  # the methods are not imported then
        return experiment
    older: dict[str, object] = {}
    omitted: dict[str, Scalar] = {}
    for method in experiment.methods:
        defaults, before = versions.parameters(method, schema), versions.parameter_domains(method, schema)
        if not defaults and not before:  # unchanged since, so the method need not be imported
            continue
        searched = {**domains(experiment.method_class(method).Params), **before}
        older |= {f"{method}.{name}": old for name, old in defaults.items() if name not in searched}
        omitted |= {
            f"{method}.{name}": old for name, old in defaults.items() if name in searched and isinstance(old, Scalar)
        }
        older |= {f"{method}.{name}": asdict(old) for name, old in before.items()}
    space = experiment.space
    changes = {"overrides": {**older, **space.overrides}, "defaults": {**omitted, **space.defaults}}
    return experiment.with_space(space.model_copy(update=changes))


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.yaml.

    Raises:
        ConfigError: the file is missing or holds no valid recipe.
    """
    content = read_yaml(Path(path))
    schema = _schema_number(content.pop("schema", FIRST_SCHEMA), f"{path}: schema")
    content = SCHEMA.complete(Recipe, content, schema)
    if isinstance(params := content.get("params"), dict):
        content["params"] = SCHEMA.parameters(str(content.get("method")), schema) | params
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(sentences(error, Recipe, str(path))) from None
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def dump_experiment(experiment: Experiment) -> str:
    """Return the text of a study's experiment.yaml: every key of the resolved experiment."""
    return dump_yaml(SCHEMA.mark() | json.loads(experiment.model_dump_json()))


def _refuse(found: Iterable[tuple[str, str]], source: Source) -> None:
    lines = [f"{source.place(key)}: {text}" for key, text in found]
    if lines:
        raise ConfigError("\n".join(lines))


def _override(content: dict[str, object], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: expected key=value, for example --set training.epochs=10")
    if key != key.strip():
        raise ConfigError(f"--set {text}: expected key=value without blanks around the key; remove them")
    # Keys of `shared` and `overrides` contain a point: `kd.temperature`.
    *sections, last = key.split(".", 3) if key.startswith(f"{SPACE}.") else key.split(".")
    place = content
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text}: {section!r} holds a value, not keys; set it as a whole")
        place = inner
    try:
        place[last] = plain_yaml(value)
    except AmbiguousYaml as error:
        raise ConfigError(f"--set {text}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML ({error.problem}); quote it") from None
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value contains control characters; remove them") from None
