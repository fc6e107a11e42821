"""From YAML files and `--set` texts to an Experiment; every fault is a sentence with file and key.

YAML stays data: no tags, no inheritance, no interpolation; `1e-3` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from heterokd.config.experiment import Experiment, Recipe, ends
from heterokd.config.sentences import SPACE, Source, faults, given, sentences
from heterokd.config.settings import TrainingSettings
from heterokd.domains import domains, read_domain
from heterokd.errors import ConfigError, did_you_mean
from heterokd.methods import METHODS

NEVER_SEARCHED = {
    "seed": "the best seed is luck, which confirmation takes out again",
    "workers": "it is about machines, not about results",
    "gpus_per_worker": "it is about machines, not about results",
}
"""Settings of a training that are no domain of a search, with the reason."""


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, check and complete an experiment.

    Args:
        path: a YAML file.
        overrides: `a.b=value` texts (the command line's `--set`), applied on top; values are YAML.

    Raises:
        ConfigError: one sentence a fault, each naming file and key.
    """
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
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        _refuse(faults(error, Experiment), source)
        raise
    _refuse(((f"{SPACE}.{key}", text) for key, text in _space_faults(experiment)), source)
    space = experiment.space.model_copy(update={"methods": experiment.methods})
    return experiment.model_copy(update={"search": experiment.search.model_copy(update={"space": space})})


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.yaml.

    Raises:
        ConfigError: the file is missing or is no recipe.
    """
    content = read_yaml(Path(path))
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(sentences(error, Recipe, str(path))) from None
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def _refuse(found: Iterable[tuple[str, str]], source: Source) -> None:
    lines = [f"{source.place(key)}: {text}" for key, text in found]
    if lines:
        raise ConfigError("\n".join(lines))


LARGEST = 2**64
"""Whole numbers beyond it are slips of the pen; Python cannot even print those of thousands of digits."""


class _Loader(yaml.SafeLoader):
    """PyYAML reads `1e-3` as a word (YAML 1.1 wants a point and a sign); here it is a number, and a date is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\.\d+([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _whole_number(loader: yaml.SafeLoader, node: Any) -> int:
    value = int(loader.construct_yaml_int(node))
    if abs(value) > LARGEST:
        raise yaml.MarkedYAMLError(problem="a whole number is too large", problem_mark=node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ConfigError: missing or unreadable file, broken YAML (with its line), a key that stands twice, no mapping.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [path.name for path in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        hint = did_you_mean(file.name, near) if near else "check the path"
        raise ConfigError(f"{file}: there is no such file; {hint}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not a text in UTF-8; give a YAML file") from None
    try:
        content = _plain_yaml(text)
    except yaml.MarkedYAMLError as error:
        place = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = "a tab cannot indent" if "'\\t'" in str(error.problem) else error.problem or error.context
        raise ConfigError(f"{file}{place}: is not valid YAML: {problem}") from None
    except yaml.YAMLError:
        raise ConfigError(f"{file}: is not valid YAML: it holds characters that no text has") from None
    if content is None:
        raise ConfigError(f"{file}: is empty; write keys and values (`name: ...`)")
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys and values (`name: ...`), got {given(content)}")
    return content


def _plain_yaml(text: str) -> Any:
    """The value that a YAML text holds; a repeated key or an alias is an error of YAML here."""
    try:
        _refuse_tricks(yaml.compose(text, Loader=_Loader), set())
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    # `!!int x`, or a number of more digits than Python reads: PyYAML lets through what its constructors raise.
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise yaml.MarkedYAMLError(problem=f"a value is not what it is tagged as ({error})") from None


def _refuse_tricks(node: yaml.Node | None, visited: set[int]) -> None:
    if id(node) in visited:  # an alias is composed as the very node that it refers to
        raise yaml.MarkedYAMLError(problem="anchors (&) and aliases (*) are not read; write the value out twice")
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_tricks(item, visited)
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if str(key.value) in keys:
                problem = f"the key {key.value!r} stands twice; remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(str(key.value))
            _refuse_tricks(value, visited)


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
        place[last] = _plain_yaml(value)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML ({error.problem}); quote it") from None
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value holds characters that no text has") from None


def _inline_space(content: dict[str, Any], file: Path, source: Source) -> str | None:
    """Replace the name of a space's file by what it holds; the file that was found."""
    search = content.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    if not isinstance(search, dict) or not isinstance(space, str):
        return None
    # As written, then beside the experiment, then beside its folder: `search_spaces/x.yaml` works from anywhere.
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


def _space_faults(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """What is wrong with a space of the right form: key below `search.space`, and a sentence."""
    space = experiment.space
    if not experiment.methods:
        yield "methods", f"the list is empty; write all, or some of {', '.join(METHODS)}"
    for method in dict.fromkeys(experiment.methods):
        if method not in METHODS:
            yield "methods", f"there is no method {method!r}; {did_you_mean(method, METHODS)}"
        elif experiment.data.task not in METHODS[method].tasks:
            task, other = experiment.data.task, " and ".join(sorted(METHODS[method].tasks))
            yield "methods", f"{method!r} is written for {other}, data set {experiment.data.dataset!r} is for {task}"
        if experiment.methods.count(method) > 1:
            yield "methods", f"{method!r} stands twice; remove one"
    for key, value in space.shared.items():
        name = key.removeprefix("training.")
        if name == key or name not in TrainingSettings.model_fields:
            near = did_you_mean(name, TrainingSettings.model_fields)
            yield f"shared.{key}", f"expected training.NAME with a setting's name; {near}"
            continue
        if name in NEVER_SEARCHED:
            yield f"shared.{key}", f"is not searched ({NEVER_SEARCHED[name]}); set training.{name} instead"
            continue
        yield from _domain_faults(f"shared.{key}", name, value, experiment.training)
    for key, value in space.overrides.items():
        method, _, name = key.partition(".")
        if method not in METHODS:
            yield f"overrides.{key}", f"there is no method {method!r}; {did_you_mean(method, METHODS)}"
            continue
        params = METHODS[method].Params
        if not name:
            yield f"overrides.{key}", f"expected METHOD.PARAMETER; see `heterokd methods {method}`"
            continue
        if name not in params.model_fields:
            yield f"overrides.{key}", f"{method!r} has no parameter {name!r}; {did_you_mean(name, params.model_fields)}"
            continue
        yield from _domain_faults(f"overrides.{key}", name, value, params())


def _domain_faults(key: str, name: str, value: Any, settings: BaseModel) -> Iterator[tuple[str, str]]:
    """What keeps `value` from being a domain of the field `name` of `settings`, its other fields as they are."""
    model = type(settings)
    try:
        found = read_domain(value, key, domains(model).get(name))
    except ConfigError as error:
        yield key, str(error).removeprefix(f"{key}: ")
        return
    for end in ends(found):
        try:
            model.model_validate({**settings.model_dump(), name: end}, strict=True)
        except ValidationError as error:
            yield from ((key, text) for _, text in faults(error, model))
            return
