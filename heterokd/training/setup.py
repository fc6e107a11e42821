"""Resolve `precision: auto` of a recipe by timing a few steps."""

from __future__ import annotations

from collections.abc import Callable

import torch

import heterokd.distributed as distributed
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import Loaders
from heterokd.outputs import Outputs
from heterokd.storage.workspace import Workspace
from heterokd.training.precision import Precision, resolve_precision, time_step
from heterokd.training.step import split_batch
from heterokd.training.teacher import Teacher
from heterokd.training.train import build_distiller

WARM_UP, SLOW = 2, 2.0
"""Steps before a precision is timed; a single step if it takes more seconds than `SLOW`."""


def measured_precision(
    recipe: Recipe, teacher: Teacher | None, loaders: Loaders, device: torch.device | str, root: Workspace
) -> Precision:
    """Return the precision of a recipe; rank 0 resolves `auto` for all ranks, once per device and shape."""
    steps: dict[Precision, Callable[[], object]] = {}

    def step_in(precision: Precision) -> Callable[[], object]:
        distiller = build_distiller(recipe, teacher, loaders.num_classes).to(device)
        if precision.channels_last:
            distiller.student.to(memory_format=torch.channels_last)
        whole = next(iter(loaders.train.epoch(0))).to(torch.device(device))
        batch = next(split_batch(whole, recipe.training.accumulate))
        needs = distiller.teacher_needs

        def step() -> None:
            with precision.autocast(torch.device(device)):
                outputs = Outputs() if teacher is None else teacher.outputs(batch, needs)
                loss, _ = distiller(batch, outputs, 0.5)
            loss.backward()

        for _ in range(WARM_UP):
            if time_step(step, device) > SLOW:
                break
        return step

    def seconds(precision: Precision) -> float:
        if precision not in steps:
            steps[precision] = step_in(precision)
        return time_step(steps[precision], device)

    images = recipe.training.batch_size // distributed.size()
    part = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": images})})
    chosen: Precision | None = None
    if distributed.rank() == 0:
        with distributed.alone():
            chosen = resolve_precision(part, device, seconds, root.path / "precision.json")
    chosen = distributed.broadcast(chosen)
    assert chosen is not None  # rank 0 has chosen
    return chosen
