"""Updates: from a batch to new weights. Nothing in here waits for the device: no number is read back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heterokd.config.training import TrainingSettings
from heterokd.networks.network import AnyNetwork
from heterokd.outputs import Batch, Losses, Outputs, Signal
from heterokd.training.distiller import Distiller
from heterokd.training.optim import WeightAverage, build_optimizer, build_schedule
from heterokd.training.precision import Precision
from heterokd.training.sync_batch_norm import shared_batch_norms
from heterokd.training.teacher import Teacher

logger = logging.getLogger(__name__)


class Updates:
    """The optimizer's side of one training.

    Args:
        distiller: student and method.
        step: the distiller, or its data-parallel form.
        teacher: who answers for the teacher; None for methods that need nothing of it.
        settings: of the training.
        steps_per_epoch: updates of an epoch.
        precision: number format of the forward pass.

    Attributes:
        optimizer: over the distiller's trainable parameters.
        average: of the student's weights, when `settings.ema` is set.
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
        self.teacher = teacher if distiller.teacher_needs != Signal.NONE else None
        self.total = settings.epochs * steps_per_epoch
        self.parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = build_optimizer(
            distiller, settings.optimizer, settings.learning_rate, settings.weight_decay, settings.momentum
        )
        self.schedule = build_schedule(
            self.optimizer,
            settings.schedule,
            epochs=settings.epochs,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=settings.warmup_epochs,
            learning_rate=settings.learning_rate,
            min_learning_rate=settings.min_learning_rate,
        )
        self.average = None if settings.ema is None else WeightAverage(distiller.student, settings.ema)

    @property
    def kept(self) -> AnyNetwork:
        """The network that is evaluated and kept."""
        return self.distiller.student if self.average is None else cast(AnyNetwork, self.average.network)

    def apply(self, batch: Batch, update: int, share: float = 1.0) -> Losses:
        """One optimizer update, the `update`-th of the training, counted from 0.

        Args:
            batch: on the distiller's device.
            update: its number.
            share: of the workers' mean image count that this one's batch has: its loss weighs as much in the mean.

        Returns:
            `loss` and its terms, means over this worker's batch, without gradient, still on the device.
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
            self.average.update(first=update == 0)
        return losses

    def _accumulate(self, batch: Batch, progress: float, weight: float) -> Losses:
        """`weight` times the gradients of the whole batch, from one part of it after the other."""
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
        """Add `share` of the gradients of one part's loss."""
        shared = shared_batch_norms(asked=self.settings.sync_batch_norm)
        with self.precision.autocast(self.device), shared:
            outputs = Outputs(owner="teacher")
            if self.teacher is not None:
                outputs = self.teacher.outputs(batch, self.distiller.teacher_needs)
            loss, losses = self.step(batch, outputs, progress)
        (loss if share == 1.0 else share * loss).backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """Workers exchange gradients once an update, after its last part."""
        if isinstance(self.step, DistributedDataParallel):
            return cast(AbstractContextManager[None], self.step.no_sync())
        return nullcontext()


def split_batch(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in `parts` of nearly equal size, in order; fewer where it has fewer images."""
    images = len(batch)
    edges = sorted({images * part // parts for part in range(parts + 1)})
    for start, end in pairwise(edges):
        yield replace(
            batch,
            images=batch.images[start:end],
            labels=batch.labels[start:end],
            index=batch.index[start:end],
            shown=None if batch.shown is None else batch.shown[start:end],
        )


def compile_student(student: nn.Module, device: torch.device) -> bool:
    """Let torch.compile make kernels of the student's forward; whether it can.

    Where it cannot (no compiler, no Triton), one sentence is logged and the student stays as it is.
    """

    def twice(x: Tensor) -> Tensor:
        return x + x

    try:
        torch.compile(twice)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001  every backend has errors of its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning("training.compile: torch.compile does not work here (%s); training goes on without it", reason)
        return False
    # A training has a few batch sizes and keeps them: kernels for each, none for sizes that vary.
    student.compile(dynamic=False)
    return True
