"""Faults of a search space: first by names alone, then with the methods' classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ValidationError

from heterokd.config.domain_values import ends
from heterokd.config.experiment import Experiment
from heterokd.config.search import SpaceSettings
from heterokd.config.sentences import faults
from heterokd.config.task_faults import setting_fault
from heterokd.config.training import UNLABELLED_SHARE, TrainingSettings
from heterokd.domains import domains, read_domain
from heterokd.errors import ConfigError, did_you_mean
from heterokd.methods import METHODS, PLUS, members_of
from heterokd.tasks import TASKS

NEVER_SEARCHED = {
    "seed": "the best seed is chance, not a better setting",
    "workers": "it changes no result",
    "gpus_per_worker": "it changes no result",
}
"""Training settings that cannot be searched, with the reason."""


def name_faults(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield key below `search.space` and sentence of each fault that can be found without importing a method."""
    space = experiment.space
    known = (*METHODS, *space.extensions)
    named = () if space.methods == "all" else space.methods
    if not named and space.methods != "all":
        yield "methods", f"the list is empty; write all, or names from {', '.join(METHODS)}"
    for method in dict.fromkeys(named):
        if not experiment.knows(method):
            if PLUS in method and all(map(experiment.knows, members_of(method))):
                yield "methods", f"{method!r}: a combination is of two different methods with a teacher; correct it"
            else:
                yield "methods", f"there is no method {method!r}; {did_you_mean(method, known)}"
        turned = PLUS.join(reversed(members_of(method)))
        if turned != method and turned in named[: named.index(method)]:
            yield "methods", f"{method!r} and {turned!r} are the same combination; remove one of them"
        if named.count(method) > 1:
            yield "methods", f"{method!r} is listed twice; remove it once"
    for key, value in space.shared.items():
        name = key.removeprefix("training.")
        if name == key or name not in TrainingSettings.model_fields:
            near = did_you_mean(name, TrainingSettings.model_fields)
            yield f"shared.{key}", f"expected training.NAME with the name of a setting; {near}"
            continue
        if name in NEVER_SEARCHED:
            yield f"shared.{key}", f"cannot be searched ({NEVER_SEARCHED[name]}); set training.{name} instead"
            continue
        has_maps = TASKS[experiment.data.task].labels_are_maps
        options = value.get("options", ()) if isinstance(value, Mapping) else ()
        found = (setting_fault(name, option, has_maps) for option in options or (None,))
        fault = next(filter(None, found), None)
        if fault is not None:
            yield f"shared.{key}", fault
            continue
        if name == UNLABELLED_SHARE and experiment.data.unlabelled is None:
            yield f"shared.{key}", "is the share of images without labels; set data.unlabelled, or remove it"
            continue
        yield from _domain_faults(f"shared.{key}", name, value, experiment.training)
    for section, key, _ in _parameters(space):
        method, _, name = key.partition(".")
        if not experiment.knows(method):
            yield f"{section}.{key}", f"there is no method {method!r}; {did_you_mean(method, known)}"
        elif not name:
            yield f"{section}.{key}", f"expected METHOD.PARAMETER; see `heterokd methods {method}`"


def method_faults(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield the faults that the methods' classes show, for a space whose names are valid."""
    space, task = experiment.space, experiment.data.task
    for method in experiment.methods:
        try:
            tasks = experiment.method_class(method).tasks
        except ConfigError as error:
            yield "methods", str(error)
            continue
        if task not in tasks:
            supported = " and ".join(sorted(tasks)) or "no task, since its methods have none in common"
            reason = f"{method!r} supports {supported}, but data set {experiment.data.dataset!r} is for {task}"
            yield "methods", f"{reason}; remove the method"
    for section, key, value in _parameters(space):
        method, _, name = key.partition(".")
        try:
            params = experiment.method_class(method).Params
        except ConfigError as error:
            if method not in experiment.methods:
                yield f"{section}.{key}", str(error)
            continue
        if name in params.model_fields:
            yield from _domain_faults(f"{section}.{key}", name, value, params())
        else:
            yield f"{section}.{key}", f"{method!r} has no parameter {name!r}; {did_you_mean(name, params.model_fields)}"


def _parameters(space: SpaceSettings) -> Iterator[tuple[str, str, object]]:
    """Yield section, key and value of each entry that is named METHOD.PARAMETER."""
    for key, value in space.overrides.items():
        yield "overrides", key, value
    for key, default in space.defaults.items():
        yield "defaults", key, default


def _domain_faults(key: str, name: str, value: object, settings: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield the faults of a domain of a field of `settings`, given its other fields."""
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
