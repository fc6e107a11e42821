"""Whose fault an exception is, by the exceptions that Ray, torch, SQLite and operating systems raise."""

from __future__ import annotations

import errno
import os
import sqlite3

import pytest
import ray.exceptions as of_ray
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.tune.error import TuneError

from heterokd.errors import DataError
from heterokd.execution.failure_cause import Cause, cause_of, fault_sentence

DEAD_NODE = "The actor died because its node has died. Node Id: 9e87"


def in_ray(error: Exception) -> Exception:
    """The exception that the driver gets for one that a task or an actor raised."""
    return of_ray.RayTaskError("run_trial", str(error), error).as_instanceof_cause()


def after(cause: Exception, error: Exception) -> Exception:
    """An exception raised while another one is handled."""
    error.__context__ = cause
    return error


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "checkpoint.pt")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("shapes differ"), Cause.TRIAL),
        (ValueError("this method runs out of memory of its past"), Cause.TRIAL),
        (os_error(errno.ENOENT), Cause.TRIAL),
        (RuntimeError("CUDA error: device-side assert triggered"), Cause.TRIAL),
        (in_ray(KeyError("weight")), Cause.TRIAL),
        (WorkerGroupError("", {0: UserExceptionWithTraceback(KeyError("a"), "text")}), Cause.TRIAL),
        (os_error(errno.EIO), Cause.MACHINE),
        (os_error(errno.ENOSPC), Cause.MACHINE),
        (os_error(errno.ESTALE), Cause.MACHINE),
        (after(os_error(errno.EIO), DataError("a.png: cannot be read")), Cause.MACHINE),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), Cause.MACHINE),
        (MemoryError(), Cause.MACHINE),
        (RuntimeError("can't start new thread"), Cause.MACHINE),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered", 214), Cause.MACHINE),
        (torch.distributed.DistNetworkError("the client socket has timed out"), Cause.MACHINE),
        (sqlite3.OperationalError("disk I/O error"), Cause.MACHINE),
        (in_ray(os_error(errno.EIO)), Cause.MACHINE),
        (of_ray.RayActorError(error_msg=DEAD_NODE), Cause.MACHINE),
        (of_ray.RayActorError(preempted=True), Cause.MACHINE),
        (of_ray.NodeDiedError("its raylet was killed"), Cause.MACHINE),
        (of_ray.ActorDiedError(), Cause.PROCESS),
        (in_ray(WorkerGroupError("", {0: RuntimeError("Connection closed by peer"), 1: of_ray.ActorDiedError()})),
         Cause.PROCESS),
        (of_ray.RaySystemError("the store is gone"), Cause.RAY),
        (of_ray.GetTimeoutError("no answer"), Cause.RAY),
        (TuneError("Trials did not complete"), Cause.RAY),
        (after(KeyError("a bug of a listener"), TuneError("Traceback (most recent call last):")), Cause.TRIAL),
        (after(of_ray.RaySystemError("gone"), TuneError("Traceback (most recent call last):")), Cause.RAY),
        (in_ray(ControllerError(of_ray.RaySystemError("gone"))), Cause.RAY),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)  # fmt: skip
def test_cause(error: Exception, cause: Cause) -> None:
    assert cause_of(error) == cause


def test_exceptions_that_refer_to_each_other_end() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert cause_of(first) == Cause.TRIAL


def test_a_fault_is_named_in_a_line_by_the_exception_that_ray_carries() -> None:
    error = in_ray(os_error(errno.EIO))
    assert fault_sentence(error) == "the machine failed (OSError: [Errno 5] Input/output error: 'checkpoint.pt')"
    assert (
        fault_sentence(of_ray.RaySystemError("gone\nsecond line")) == "Ray failed (RaySystemError: System error: gone)"
    )
