"""Train one student in plain PyTorch; knows neither Ray, Optuna nor MLflow.

    train(recipe, teacher, loaders, report) -> TrainResult

`report(metrics) -> bool` is called after each epoch and returns whether to continue; otherwise the training writes its
checkpoint and returns. Everything random is a pure function of (seed, epoch), so that a resumed training gives the
same weights as an uninterrupted one.

In a sharded training (`heterokd.distributed`) each rank calls `train` with its shard of every batch; rank 0 evaluates,
reports and writes, and its `report` decides for all ranks, so that all return from the same epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterokd import distributed
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import Loaders
from heterokd.errors import CheckpointError, ConfigError, TrainingDiverged
from heterokd.networks.network import AnyNetwork
from heterokd.outputs import Batch
from heterokd.storage.disk import when_writable
from heterokd.storage.files import replacing
from heterokd.training.distiller import Distiller
from heterokd.training.evaluation import evaluate
from heterokd.training.precision import FP32, Precision, forbid_tf32
from heterokd.training.step import Updates, compile_student
from heterokd.training.student import build_student
from heterokd.training.task_modules import build_task
from heterokd.training.teacher import Teacher

Metrics = dict[str, float]
Report = Callable[[Metrics], bool]

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is also written at the end of an epoch when this much time has passed since the last one."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Attributes:
        student: the trained network (with averaged weights when `training.ema` is set), in evaluation mode.
        metrics: metrics of the last epoch.
        epochs: number of finished epochs.
        stopped: whether `report` ended the training early.
    """

    student: AnyNetwork
    metrics: Metrics
    epochs: int
    stopped: bool


def build_distiller(recipe: Recipe, teacher: Teacher | None, num_classes: int) -> Distiller:
    """Build the untrained student and its method, seeded by `recipe.training.seed`.

    Raises:
        PairError: the method cannot exist for this pair.
        NetworkError: the student cannot be built.
    """
    torch.manual_seed(recipe.training.seed)
    student = build_student(recipe, num_classes)
    teacher_spec = student.spec if teacher is None else teacher.spec
    method = recipe.method_class(recipe.method_params, student.spec, teacher_spec)
    if recipe.training.trainable == "head":
        student.requires_grad_(requires_grad=False)
        student.head.requires_grad_(requires_grad=True)
    task = build_task(recipe.task, num_classes, recipe.training.label_smoothing, recipe.data.window)
    return Distiller(student, method, task, recipe.training.task_weight)


def train(
    recipe: Recipe,
    teacher: Teacher | None,
    loaders: Loaders,
    report: Report,
    *,
    checkpoint: Path | None = None,
    checkpoint_epochs: Collection[int] = (),
    save_now: Callable[[], bool] = lambda: False,
    device: torch.device | str = "cpu",
    precision: Precision = FP32,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> TrainResult:
    """Train one student.

    Args:
        recipe: training to run.
        teacher: the frozen teacher; None only for methods that do not read it.
        loaders: training views and validation images.
        report: called with the metrics of each epoch (`epoch` counts finished ones); False ends the training. Only
            rank 0 calls it.
        checkpoint: file to resume from when it exists, and to write at checkpoint epochs; it may have been written by
            another number of workers.
        checkpoint_epochs: epochs after which a checkpoint is written.
        save_now: asked after each epoch whether a checkpoint is wanted: the machine may be about to be taken away.
        device: device to train on.
        precision: number format and memory format of the forward pass.
        wrap: wraps the distiller for data-parallel training.

    Raises:
        TrainingDiverged: a loss that is not finite; names the terms and the epoch.
        CheckpointError: the checkpoint is damaged or of another recipe.
        ConfigError: the training does not fit into the GPU's memory.
    """
    forbid_tf32(device)
    with _full_gpu_in_words(recipe, torch.device(device)):
        loop = _Loop(recipe, teacher, loaders, torch.device(device), precision, wrap)
        epoch = loop.resume(checkpoint)
        metrics: Metrics = loop.evaluate() if epoch == recipe.training.epochs else {}
        stopped, saved = False, time.monotonic()
        while epoch < recipe.training.epochs and not stopped:
            metrics = loop.train_epoch(epoch) | loop.evaluate()
            epoch += 1
            metrics["epoch"] = epoch
            go_on = distributed.broadcast(distributed.rank() != 0 or report(metrics))
            stopped = not go_on and epoch < recipe.training.epochs
            is_due = (
                epoch in checkpoint_epochs or stopped or time.monotonic() - saved > CHECKPOINT_SECONDS or save_now()
            )
            if checkpoint is not None and is_due and distributed.rank() == 0:
                loop.save(checkpoint, epoch)
                saved = time.monotonic()
        return TrainResult(loop.updates.kept.eval(), metrics, epoch, stopped)


@contextmanager
def _full_gpu_in_words(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Say what to do about a GPU that is full."""
    try:
        yield
    except torch.OutOfMemoryError:
        settings = recipe.training
        held = f" ({torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GiB in all)" if device.type == "cuda" else ""
        raise ConfigError(
            f"training.batch_size: method {recipe.method!r} with {settings.batch_size // settings.accumulate} images "
            f"at a time does not fit into what is free of {device}'s memory{held}; raise training.accumulate, give "
            "each trial more of the GPU (search.gpus_per_trial), or lower training.batch_size"
        ) from None


class _Loop:
    """The parts of one training, and what happens to them in an epoch."""

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher | None,
        loaders: Loaders,
        device: torch.device,
        precision: Precision,
        wrap: Callable[[nn.Module], nn.Module] | None,
    ) -> None:
        self.recipe, self.loaders, self.device = recipe, loaders, device
        self.distiller = build_distiller(recipe, teacher, loaders.num_classes).to(device)
        if precision.channels_last:
            self.distiller.student.to(memory_format=torch.channels_last)
        self.step = wrap(self.distiller) if wrap else self.distiller
        self.updates = Updates(self.distiller, self.step, teacher, recipe.training, len(loaders.train), precision)
        if recipe.training.compile:
            compile_student(self.distiller.student, device)
        self.teacher_classes = None
        if teacher is not None and distributed.rank() == 0:
            self.teacher_classes = teacher.classes(loaders.val, self.device)

    def train_epoch(self, epoch: int) -> Metrics:
        """One pass; losses are added up on the device and read once, at the end."""
        steps = len(self.loaders.train)
        # Dropout and stochastic methods draw from torch's generator: seeded by epoch, so that resuming changes nothing.
        torch.manual_seed(self.recipe.training.seed * 1_000_003 + epoch + distributed.random_offset())
        self.step.train()
        if self.recipe.training.trainable == "head":
            # The frozen encoder keeps its statistics and drops nothing: its features are those it is published with.
            self.distiller.student.eval().head.train()
        started, images = time.perf_counter(), 0
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(self.loaders.train.epoch(epoch)):
            together = self.loaders.train.images(number)
            share = len(batch) * distributed.size() / together
            losses = self.updates.apply(self._arrive(batch), epoch * steps + number, share)
            for name, value in losses.items():
                value = value if share == 1.0 else share * value
                if name in totals:
                    totals[name] += value
                else:
                    totals[name] = value.float().clone()
            images += together
        means = (torch.stack(list(totals.values())) / (steps * distributed.size())).tolist()
        # Every worker learns what all have found, so that a loss that is not finite ends them all alike.
        sums = distributed.all_reduce_sum(dict(zip(totals, means, strict=True)))
        metrics = {f"train/{name}": mean for name, mean in sums.items()}
        self._check_finite(metrics, epoch)
        metrics["train/learning_rate"] = float(self.updates.optimizer.param_groups[0]["lr"])
        metrics["time/images_per_second"] = images / max(time.perf_counter() - started, 1e-9)
        return metrics

    def _arrive(self, batch: Batch) -> Batch:
        """Move a batch to the device; copies to a GPU start from pinned memory, so that they are asynchronous."""
        if self.device.type == "cuda" and not batch.images.is_cuda:
            batch = replace(batch, images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
        return batch.to(self.device)

    def evaluate(self) -> Metrics:
        """The kept network on val: by the first worker, whose figures are everyone's."""
        found: Metrics = {}
        if distributed.rank() == 0:
            pairs = evaluate(
                self.updates.kept,
                self.loaders.val,
                self.distiller.task,
                teacher_classes=self.teacher_classes,
                device=self.device,
            )
            found = {f"val/{name}": value for name, value in pairs}
        return distributed.broadcast(found)

    def resume(self, file: Path | None) -> int:
        """Restore every part from a checkpoint where there is one; the number of finished epochs.

        Raises:
            CheckpointError: it is damaged, of another recipe, or not every worker sees it.
        """
        is_there = file is not None and file.exists()
        if file is None or not distributed.broadcast(is_there):
            return 0
        if not is_there:
            raise CheckpointError(f"{file}: the first worker sees it, this one does not; keep --root on a shared disk")
        epoch = self.load(file)
        if epoch != distributed.broadcast(epoch):
            raise CheckpointError(f"{file}: workers see different ones; keep --root on a shared disk")
        return epoch

    def save(self, file: Path, epoch: int) -> None:
        """Write a checkpoint as a whole or not at all; a disk that cannot be written for the moment is waited for."""
        when_writable(file, lambda: self._write(file, epoch))

    def _write(self, file: Path, epoch: int) -> None:
        content = {name: part.state_dict() for name, part in self._parts().items()}
        with replacing(file) as partial:
            torch.save({"recipe": self.recipe.hash, "epoch": epoch, **content}, partial)

    def load(self, file: Path) -> int:
        """Restore every part from a checkpoint; the number of finished epochs."""
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            recipe, epoch = content["recipe"], int(content["epoch"])
        except Exception as error:  # noqa: BLE001  torch raises many kinds for a damaged file
            kind = type(error).__name__
            raise CheckpointError(f"{file}: is damaged ({kind}); remove it to train from the start") from None
        if recipe != self.recipe.hash:
            raise CheckpointError(f"{file}: belongs to recipe {recipe}, not {self.recipe.hash}; remove it")
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        return epoch

    def _parts(self) -> dict[str, Any]:
        """What a checkpoint holds: everything but the teacher."""
        parts: dict[str, Any] = {"distiller": self.distiller, "optimizer": self.updates.optimizer}
        if self.updates.average is not None:
            parts["average"] = self.updates.average.network
        return parts

    def _check_finite(self, metrics: Metrics, epoch: int) -> None:
        broken = [key for key, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise TrainingDiverged(
                f"{', '.join(broken)} of method {self.recipe.method!r} is not finite in epoch {epoch + 1}; "
                f"lower training.learning_rate (now {self.recipe.training.learning_rate:g}) or set training.clip_grad"
            )
