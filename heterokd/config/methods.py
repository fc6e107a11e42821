"""Classes and parameters of methods by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import ValidationError

from heterokd.config.extension import Extension
from heterokd.config.sentences import sentences
from heterokd.errors import ConfigError, did_you_mean
from heterokd.methods import METHODS
from heterokd.outputs import Signal
from heterokd.tasks import TaskName

if TYPE_CHECKING:
    from heterokd.method import Method, MethodParams


def method_class(name: str, extension: Extension | None = None) -> type[Method]:
    """Look up a method by name, or in the file that defines it.

    Raises:
        ConfigError: unknown method, or the class in its file cannot be built.
    """
    if extension is not None:
        return _from_file(extension)
    if name not in METHODS:
        raise ConfigError(f"method: there is no method {name!r}; {did_you_mean(name, METHODS)}")
    return METHODS[name]


@lru_cache(maxsize=64)
def _from_file(extension: Extension) -> type[Method]:
    kind: type[Method] = extension.load("heterokd.method:Method")
    from heterokd.method import MethodParams

    where = f"{extension.file}: {extension.class_name}"
    try:
        inspect.signature(kind).bind(None, None, None)
    except TypeError as error:
        raise ConfigError(
            f"{where} cannot be constructed from (params, student, teacher) ({error}); define build, which makes "
            "projectors, instead of __init__"
        ) from None
    try:
        inspect.signature(kind.forward).bind(None, None, None, None, None)
    except TypeError as error:
        raise ConfigError(
            f"{where}.forward cannot be called with (student, teacher, batch, progress) ({error}); correct it"
        ) from None
    for name in ("student_needs", "teacher_needs"):
        if not isinstance(getattr(kind, name), Signal):
            raise ConfigError(f"{where}.{name}: expected a heterokd.outputs.Signal, got {getattr(kind, name)!r}")
    if not (isinstance(kind.Params, type) and issubclass(kind.Params, MethodParams)):
        raise ConfigError(f"{where}.Params: derive it from heterokd.method.MethodParams")
    try:
        kind.Params()
    except ValidationError as error:
        missing = ", ".join(str(fault["loc"][0]) for fault in error.errors() if fault["loc"])
        raise ConfigError(f"{where}.Params: {missing or 'a parameter'} has no valid default; add a default") from None
    return kind


def method_params(
    method: str, values: Mapping[str, object], where: str = "recipe", extension: Extension | None = None
) -> MethodParams:
    """Validate plain values as the parameters of a method.

    Raises:
        ConfigError: an unknown method or parameter, or a value of the wrong type or out of bounds.
    """
    try:
        params = method_class(method, extension).Params
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    try:
        return params.model_validate(dict(values), strict=True)
    except ValidationError as error:
        raise ConfigError(sentences(error, params, where, prefix=method)) from None


def pairing(method: str, teacher: str) -> str:
    """Return the name of a method with this teacher, for the excluded methods."""
    return f"{method} from {teacher}"


def methods_of(task: TaskName) -> tuple[str, ...]:
    """Return the names of heterokd's methods for a task, without those of installed packages."""
    return tuple(name for name in METHODS.builtin if task in METHODS[name].tasks)
