"""Optimizer updates of a training. No value is read back, so nothing here waits for the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heterokd.config.training import TrainingSettings
from heterokd.networks.network import AnyNetwork
from heterokd.outputs import Batch, Losses, Outputs, Signal
from heterokd.training.distiller import Distiller
from heterokd.training.optim import build_optimizer, build_schedule, training_groups
from heterokd.training.precision import Precision
from heterokd.training.sync_batch_norm import shared_batch_norms
from heterokd.training.teacher import Teacher

logger = logging.getLogger(__name__)


class Updates:
    """Applies optimizer updates: forward, backward, clipping, schedule, weight average.

    Args:
        distiller: student and method.
        step: the distiller, or its data-parallel wrapper.
        teacher: the teacher, live or cached; None for methods that do not read it.
        settings: section `training` of the recipe.
        steps_per_epoch: updates per epoch.
        precision: number format of the forward pass.

    Attributes:
        optimizer: optimizer of the distiller's trainable parameters.
        average: exponential moving average of the student's weights, if `settings.ema` is set.
    """

    def __init__(
        self,
        distiller: Distiller,
        step: nn.Module,
        teacher: Teacher | None,
        settings: TrainingSettings,
        steps_per_epoch: int,
        precision: Precision,
    ) -> None:
        self.distiller, self.step, self.settings, self.precision = distiller, step, settings, precision
        self.needs = distiller.teacher_needs
        self.teacher = teacher if self.needs != Signal.NONE else None
        self.total = settings.epochs * steps_per_epoch
        self.parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        groups = training_groups(distiller, distiller.student, settings)
        self.optimizer = build_optimizer(
            distiller, settings.optimizer, settings.learning_rate, settings.weight_decay, settings.momentum, groups
        )
        self.schedule = build_schedule(self.optimizer, settings, steps_per_epoch)
        self.average = None if settings.ema is None else ModelEmaV3(distiller.student, settings.ema)

    @property
    def eval_network(self) -> AnyNetwork:
        """Network that is evaluated and saved: the student, or its average."""
        return self.distiller.student if self.average is None else cast(AnyNetwork, self.average.module)

    def apply(self, batch: Batch, update: int, share: float = 1.0) -> Losses:
        """Apply one optimizer update.

        Args:
            batch: batch on the distiller's device.
            update: number of the update in the training, counted from 0.
            share: weight of the loss: image count of this rank's batch divided by the mean over ranks.

        Returns:
            `loss` and its terms, means over this rank's batch, detached, on the device.
        """
        for parameter in self.parameters:
            parameter.grad = None
        losses = self._accumulate(batch, update / self.total, share)
        if self.settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step_update(update + 1)
        if self.average is not None:
            # Counted from 1: the first update copies the weights.
            self.average.update(self.distiller.student, step=update + 1)
        return losses

    def _accumulate(self, batch: Batch, progress: float, weight: float) -> Losses:
        """Accumulate `weight` times the gradients of the batch, part by part; return its losses."""
        if self.settings.accumulate == 1:
            return self._differentiate(batch, progress, weight)
        sums: Losses = {}
        parts = list(split_batch(batch, self.settings.accumulate))
        for number, part in enumerate(parts, start=1):
            share = len(part) / len(batch)
            with self._unsynchronised() if number < len(parts) else nullcontext():
                for name, value in self._differentiate(part, progress, weight * share).items():
                    sums[name] = sums[name] + share * value if name in sums else share * value
        return sums

    def _differentiate(self, batch: Batch, progress: float, share: float) -> Losses:
        """Add `share` times the gradients of a part's loss; return the part's losses."""
        with self.precision.autocast(self.device), shared_batch_norms(enabled=self.settings.sync_batch_norm):
            outputs = Outputs(owner="teacher") if self.teacher is None else self.teacher.outputs(batch, self.needs)
            loss, losses = self.step(batch, outputs, progress)
        (loss if share == 1.0 else share * loss).backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """Return a context without the gradient all-reduce, which happens once per update, in the last part."""
        if isinstance(self.step, DistributedDataParallel):
            return cast(AbstractContextManager[None], self.step.no_sync())
        return nullcontext()


def split_batch(batch: Batch, parts: int) -> Iterator[Batch]:
    """Split a batch into `parts` of nearly equal size, in order; fewer if it has fewer images."""
    images = len(batch)
    edges = sorted({images * part // parts for part in range(parts + 1)})
    for start, end in pairwise(edges):
        yield replace(
            batch,
            images=batch.images[start:end],
            labels=batch.labels[start:end],
            index=batch.index[start:end],
            shown=None if batch.shown is None else batch.shown[start:end],
            weights=None if batch.weights is None else batch.weights[start:end],
            labelled=None if batch.labelled is None else batch.labelled[start:end],
        )


def compile_student(student: nn.Module, device: torch.device) -> bool:
    """Compile the student's forward with torch.compile; return whether that works on this machine.

    If it does not (no compiler, no Triton), log a warning and leave the student unchanged.
    """

    def twice(x: Tensor) -> Tensor:
        return x + x

    try:
        torch.compile(twice)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001  backends raise different errors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning("training.compile: torch.compile does not work here (%s); training continues without it", reason)
        return False
    # A training has a few fixed batch sizes, each compiled: dynamic sizes are slower.
    student.compile(dynamic=False)
    return True
