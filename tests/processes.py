"""Processes of the tests, forked from one that has imported torch, timm and MLflow: that takes seconds each time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "timm", "mlflow", "heterokd.execution.run"])


def exit_code(run: Callable[..., None], *arguments: object) -> int | None:
    """How a function ends in another process: minus a signal's number where one killed it."""
    process = CONTEXT.Process(target=run, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def start_group(run: Callable[..., None], count: int, *arguments: object) -> None:
    """Run `run(rank, *arguments)` in `count` processes at once; an exception in one of them is raised here."""
    torch.multiprocessing.start_processes(run, arguments, nprocs=count, start_method="forkserver")
