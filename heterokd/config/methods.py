"""What configurations need of methods, by name: their parameters, their tasks, whether they read a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from heterokd.config.sentences import sentences
from heterokd.errors import ConfigError, did_you_mean
from heterokd.methods import METHODS
from heterokd.outputs import Signal
from heterokd.tasks import TaskName

if TYPE_CHECKING:
    from heterokd.method import MethodParams


def method_params(method: str, values: Mapping[str, Any], where: str = "recipe") -> MethodParams:
    """Check plain values and return them as the method's parameters.

    Raises:
        ConfigError: an unknown method or parameter, or a value of the wrong type or out of bounds.
    """
    if method not in METHODS:
        raise ConfigError(f"{where}: method: there is no method {method!r}; {did_you_mean(method, METHODS)}")
    try:
        return METHODS[method].Params.model_validate(dict(values), strict=True)
    except ValidationError as error:
        raise ConfigError(sentences(error, METHODS[method].Params, where, prefix=method)) from None


def reads_teacher(method: str) -> bool:
    """Whether a method reads any output of the teacher; if not, its training is the same for every teacher."""
    return METHODS[method].teacher_needs != Signal.NONE


def pairing(method: str, teacher: str) -> str:
    """Name a method with one of several teachers, as the excluded methods list it."""
    return f"{method} from {teacher}"


def methods_of(task: TaskName) -> tuple[str, ...]:
    """Names of heterokd's methods whose equations are written for a task; installed packages do not change them."""
    return tuple(name for name in METHODS.builtin if task in METHODS[name].tasks)
