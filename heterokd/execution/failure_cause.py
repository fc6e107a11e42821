"""Cause of a failure: the trial itself, a process that died, the machine, or Ray.

Only the first is recorded as the trial's failure at once. Ray's exceptions are known by the names of their classes, so
that this module imports neither Ray nor torch.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import StrEnum

OF_MACHINE = frozenset(
    {
        errno.EIO,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.ESTALE,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
    }
)
"""Errors of disks, file systems, networks and process limits."""

MESSAGES = (
    "uncorrectable ecc error",
    "no cuda-capable device",
    "busy or unavailable",
    "cuda driver",
    "gpu is lost",
    "nccl error",
    "connection closed by peer",
    "connection reset by peer",
    "can't start new thread",
    "disk i/o error",
    "database is locked",
    "database or disk is full",
    "readonly database",
    "out of memory",
    "cannot allocate memory",
    "input/output error",
    "stale file handle",
)
"""Parts of messages of torch, SQLite and operating systems for faults of a machine, in lower case."""

LIBRARIES = frozenset({"sqlite3", "sqlalchemy", "optuna", "mlflow"})
"""Libraries whose exceptions are known by these messages, besides errors of the runtime and of operating systems."""

TYPES = frozenset(
    {
        "builtins.ConnectionError",
        "builtins.MemoryError",
        "requests.exceptions.RequestException",
        "torch.distributed.DistNetworkError",
        "torch.distributed.DistStoreError",
    }
)
"""Classes of exceptions for faults of a machine; a trial's memory is decided before, see `is_out_of_memory`."""

WRAPPERS = frozenset({"RayTaskError", "UserCodeException", "UserExceptionWithTraceback", "TrainingFailedError"})
"""Exceptions of Ray that carry exceptions of the code that Ray ran, or of its processes."""

DEAD = frozenset({"RayActorError", "WorkerCrashedError", "WorkerHealthCheckFailedError"})
"""Exceptions of Ray for a process that died."""

NODE_LOST = frozenset({"NodeDiedError", "LocalRayletDiedError", "OwnerDiedError"})
"""Exceptions of Ray for a node that died."""

NODE_HAS_DIED = "its node has died"
"""Part of the message of Ray's exception for an actor whose node died."""


class Cause(StrEnum):
    """Cause of a failure."""

    TRIAL = "trial"
    """An exception of the training: the trial has failed."""
    PROCESS = "process"
    """A process died (killed, a crash, or out of memory): its trial has failed if it makes no progress."""
    MACHINE = "machine"
    """A disk, a network, a GPU or a node failed: the trial is interrupted."""
    RAY = "ray"
    """Ray failed: the trial is interrupted."""

    @property
    def is_fault(self) -> bool:
        """Whether the machine or Ray is at fault."""
        return self in (Cause.MACHINE, Cause.RAY)


def cause_of(error: BaseException) -> Cause:
    """Return the cause of an exception, from it and from the exceptions that led to it.

    >>> cause_of(ValueError("shapes differ"))
    <Cause.TRIAL: 'trial'>
    >>> cause_of(OSError(errno.EIO, "Input/output error"))
    <Cause.MACHINE: 'machine'>
    """
    found = {cause for each in _chain(error) if (cause := _shown_by(each)) is not None}
    # A process that dies breaks the connections of others, which is no fault of the network.
    return next((cause for cause in (Cause.PROCESS, Cause.MACHINE, Cause.RAY) if cause in found), Cause.TRIAL)


def first_line_of(error: BaseException) -> str:
    """Return type and message, in a line, of an exception, or of that which Ray carries for the code that it ran."""
    carried = (each for each in _chain(error) if not (_names_in_ray(each) & WRAPPERS or _is_of_callback(each)))
    inner = next(carried, error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__


def fault_sentence(error: BaseException) -> str:
    """Return a clause that says what failed: the machine, or Ray."""
    what = "the machine" if cause_of(error) == Cause.MACHINE else "Ray"
    return f"{what} failed ({first_line_of(error)})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, the exceptions that it carries, and those that led to it; each once."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        each = waiting.pop(0)
        if not isinstance(each, BaseException) or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if _names_in_ray(each) & WRAPPERS:
            failures = getattr(each, "worker_failures", {})
            waiting += [getattr(each, name, None) for name in ("cause", "_base_exc", "controller_failure")]
            waiting += failures.values()
        waiting.append(each.__cause__ or each.__context__)


def _names_in_ray(error: BaseException) -> set[str]:
    """Return the names of an exception's classes that Ray defines."""
    return {base.__name__ for base in type(error).__mro__ if base.__module__.partition(".")[0] == "ray"}


def _is_of_callback(error: BaseException) -> bool:
    """Whether Tune raised an exception in place of one of a callback, whose traceback is its message."""
    return "TuneError" in _names_in_ray(error) and (error.__cause__ or error.__context__) is not None


def _shown_by(error: BaseException) -> Cause | None:
    """Return the cause that an exception alone shows; None if it shows none."""
    names = _names_in_ray(error)
    if names & WRAPPERS or _is_of_callback(error):
        return None
    if names & NODE_LOST or (names & DEAD and (getattr(error, "preempted", False) or NODE_HAS_DIED in str(error))):
        return Cause.MACHINE
    if names:
        return Cause.PROCESS if names & DEAD else Cause.RAY
    if isinstance(error, OSError) and error.errno in OF_MACHINE:
        return Cause.MACHINE
    qualified = {f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__}
    if qualified & TYPES:
        return Cause.MACHINE
    is_of_library = isinstance(error, (RuntimeError, OSError)) or type(error).__module__.partition(".")[0] in LIBRARIES
    if is_of_library and any(part in str(error).lower() for part in MESSAGES):
        return Cause.MACHINE
    return None
