"""Time the parts of a training: some of its updates, and some of its evaluation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import cast

import numpy as np
import torch
from torch import Tensor

from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import EvalLoader, TrainLoader
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import ViewSpec
from heterokd.outputs import Batch, Outputs, Signal, Tail
from heterokd.storage.workspace import Workspace
from heterokd.study.plan.costs import MethodCost
from heterokd.teachers.cache.compute import view_outputs
from heterokd.teachers.cache_policy import is_served, stored_signals
from heterokd.training.data import recipe_loaders
from heterokd.training.evaluation import evaluate, is_cheap
from heterokd.training.folds import folds_of
from heterokd.training.precision import time_step
from heterokd.training.setup import measured_precision
from heterokd.training.step import Updates
from heterokd.training.student import build_configured
from heterokd.training.task_modules import Task
from heterokd.training.teacher import LiveTeacher, Teacher
from heterokd.training.teacher_views import teacher_views
from heterokd.training.train import build_distiller

ROUNDS = 3
STEPS, SECONDS = 4, 0.25
"""Minimum number of updates, and of seconds, of a round."""
MOST_SECONDS = 2.5
"""Length of `STEPS` updates above which a round has a single one: large networks take seconds an update on a CPU."""
VIEWS = 64


@dataclass(frozen=True)
class Timed:
    """Measured costs of a training.

    Attributes:
        begin: seconds until the end of the first update.
        epoch: seconds of an epoch with evaluation, in the mean over epochs.
        spread: standard deviation of the rounds divided by their mean.
        disk: bytes of a checkpoint and of the student.
    """

    begin: float
    epoch: float
    spread: float
    disk: int


class _Replayed:
    """A teacher that replays computed outputs, at the cost of a cache."""

    def __init__(self, live: LiveTeacher) -> None:
        self.live, self.spec, self.serves = live, live.spec, live.serves
        self._known: dict[int, Outputs] = {}

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        if len(batch) not in self._known:
            self._known[len(batch)] = self.live.outputs(batch, needs & ~Signal.TAIL)
        known = self._known[len(batch)]
        stored = {
            name: getattr(known, name)
            for name, signal in (("logits", Signal.LOGITS), ("embedding", Signal.EMBEDDING))
            if signal in needs
        }
        tail = cast(Tail, self.live.network.tail) if Signal.TAIL in needs else None
        return Outputs(**stored, tail=tail, owner="teacher")

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        return None


# What is trained, where, and what a search does besides the updates.
def time_method(
    recipe: Recipe,
    splits: Splits,
    live: LiveTeacher,
    root: Workspace,
    device: str,
    view: float,
    evaluated: frozenset[int] | None = None,
) -> MethodCost:
    """Measure the cost of a training with a method.

    Args:
        recipe: the training.
        splits: its data.
        live: a teacher of the right shape.
        root: holds measured precisions.
        device: device of the training.
        view: seconds of the teacher per view.
        evaluated: see `heterokd.study.pruner.evaluated_epochs`.

    Raises:
        PairError: the method does not exist for the pair.
    """
    stored = recipe.cache.enabled and is_served(recipe, splits, live)
    timed = time_training(recipe, splits, _Replayed(live) if stored else live, root, device, evaluated)
    images = len(recipe_loaders(recipe, splits, device).train) * recipe.training.batch_size
    return MethodCost(
        begin=timed.begin,
        epoch=timed.epoch,
        live=timed.epoch + (images * view if stored else 0.0),
        stored=stored,
        disk=timed.disk,
        spread=timed.spread,
    )


def time_training(
    recipe: Recipe,
    splits: Splits,
    teacher: Teacher | None,
    root: Workspace,
    device: str,
    evaluated: frozenset[int] | None = None,
) -> Timed:
    """Time some of a training's updates; `evaluated`: see `heterokd.study.pruner.evaluated_epochs`."""
    loaders = recipe_loaders(recipe, splits, device)
    precision = measured_precision(recipe, teacher, loaders, device, root)
    began = time.perf_counter()
    distiller = build_distiller(recipe, teacher, loaders.num_classes).to(device)
    if precision.channels_last:
        distiller.student.to(memory_format=torch.channels_last)
    updates = Updates(distiller, distiller, teacher, recipe.training, len(loaders.train), precision)
    distiller.train()
    batches, numbers = _endless(loaders.train, device), count()

    def update() -> None:
        updates.apply(next(batches), min(next(numbers), updates.total - 1))

    update()
    begin = time.perf_counter() - began
    steps = [_round(update, device) for _ in range(ROUNDS)]
    mean = statistics.fmean(steps)
    pass_of_val = time_evaluation(updates.eval_network, loaders.val, distiller.task, device)
    if evaluated is not None and not is_cheap(loaders):
        pass_of_val *= len(evaluated) / recipe.training.epochs
    tensors = [*distiller.state_dict().values(), *_tensors(updates.optimizer.state)]
    student = sum(tensor.nbytes for tensor in distiller.student.state_dict().values())
    return Timed(
        begin=begin,
        epoch=len(loaders.train) * mean + pass_of_val,
        spread=statistics.stdev(steps) / mean,
        disk=student + sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor)),
    )


def time_evaluation(network: torch.nn.Module, loader: EvalLoader, task: Task, device: str) -> float:
    """Return the seconds of a pass over a split, extrapolated from a round of steps."""
    seen, seconds = 0, 0.0
    for batch in loader:
        seconds += time_step(partial(_evaluate, network, batch, task, device), device)
        seen += len(batch)
        if seconds > SECONDS:
            break
    return seconds * len(loader.split) / max(seen, 1)


def _evaluate(network: torch.nn.Module, batch: Batch, task: Task, device: str) -> None:
    list(evaluate(network, [batch], task, device=device))


def time_view(recipe: Recipe, splits: Splits, live: LiveTeacher, device: str) -> float:
    """Return the teacher's seconds per view, computed as a cache builder does."""
    signals = stored_signals(recipe.task) & live.spec.serves
    views = ViewSpec(recipe.data.policy, crop=recipe.data.view_crop, fill=recipe.data.fill)
    compute = view_outputs(splits.seen, views, live, signals=signals, device=device, precision=recipe.cache.precision)
    index = np.arange(VIEWS, dtype=np.int64) % len(splits.seen)

    def some(images: int = VIEWS) -> None:
        compute(index[:images], np.zeros(images, np.int64))

    first = time_step(lambda: some(16), device)
    if 4 * first > MOST_SECONDS:
        return first / 16
    return min(time_step(some, device) for _ in range(2)) / VIEWS


def teacher_like(recipe: Recipe, num_classes: int) -> LiveTeacher:
    """Build the recipe's teacher with random weights, which do not change its speed."""
    network = build_configured(recipe.teacher, num_classes, recipe.teacher_size)
    return LiveTeacher(network, teacher_views(recipe), folds_of(recipe))


def _round(update: object, device: str) -> float:
    """Return the seconds of an update, averaged over a round."""
    assert callable(update)
    done, seconds, each = 0, 0.0, STEPS

    def several() -> None:
        for _ in range(each):
            update()

    first = time_step(update, device)
    if first * STEPS > MOST_SECONDS:
        return first
    while done < STEPS or seconds < SECONDS:
        seconds += time_step(several, device)
        done += each
    return seconds / done


def _endless(loader: TrainLoader, device: str) -> Iterator[Batch]:
    for epoch in count():
        for batch in loader.epoch(epoch):
            yield batch.to(torch.device(device))


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
