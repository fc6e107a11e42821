"""Train a student in plain PyTorch, without Ray, Optuna and MLflow.

    train(recipe, teacher, loaders, report) -> TrainResult

`report(metrics) -> bool` is called after each epoch and returns whether to continue; otherwise the training writes its
checkpoint and returns. All random numbers are a pure function of (seed, epoch), so that a resumed training gives the
same weights as an uninterrupted training.

In a sharded training (`heterokd.distributed`) each rank calls `train` with its shard of every batch; rank 0 evaluates,
reports and writes, and the result of its `report` holds for all ranks, so that all return after the same epoch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import heterokd.distributed as distributed
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import Loaders
from heterokd.errors import CheckpointError, ConfigError, TrainingDiverged
from heterokd.networks.network import AnyNetwork
from heterokd.networks.weights import load_weights
from heterokd.outputs import Batch
from heterokd.storage.study_dir import previous_checkpoint
from heterokd.training.best_epoch import BestEpoch
from heterokd.training.checkpoint import Checkpoint, read_checkpoint, set_aside, write_checkpoint
from heterokd.training.distiller import AuxiliaryHead, Distiller
from heterokd.training.evaluation import evaluate
from heterokd.training.meters import named_metrics
from heterokd.training.optim import freeze_batch_norm, freeze_slow_layers
from heterokd.training.precision import FP32, Precision, forbid_tf32
from heterokd.training.step import Updates, compile_student
from heterokd.training.student import build_student
from heterokd.training.task_modules import SegmentationTask, build_task
from heterokd.training.teacher import Teacher

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
Report = Callable[[Metrics], bool]
"""Called with the metrics of each epoch (`epoch` counts finished epochs); returns whether to continue."""

CHECKPOINT_SECONDS = 60.0
"""Maximum time between checkpoints; they are written at the end of an epoch."""


@dataclass(frozen=True)
class TrainOptions:
    """Where and how a training runs; the recipe holds everything else.

    Attributes:
        checkpoint: file to resume from if it exists, and to write; another number of workers may have written it.
        checkpoint_epochs: epochs after which a checkpoint is written.
        evaluated_epochs: epochs after which the network is evaluated, besides the last; None: all.
        save_now: called after each epoch; returns whether to write a checkpoint because the machine may be preempted.
        device: device to train on.
        precision: number format and memory format of the forward pass.
        newest_epoch: epochs of the newest checkpoint that may be resumed from; None: of any.
        start: weights that the student starts from, of its own number of classes; None: as the recipe says.
        best: keeps the best epoch's weights, and ends the training at a plateau; None: it runs to its last epoch.
    """

    checkpoint: Path | None = None
    checkpoint_epochs: Collection[int] = ()
    evaluated_epochs: Collection[int] | None = None
    save_now: Callable[[], bool] = lambda: False
    device: torch.device | str = "cpu"
    precision: Precision = FP32
    newest_epoch: int | None = None
    start: Path | None = None
    best: BestEpoch | None = None


DEFAULT_OPTIONS = TrainOptions()


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Attributes:
        student: the trained network (with averaged weights if `training.ema` is set), in evaluation mode.
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
    freeze_slow_layers(student.body, recipe.training)
    training = recipe.training
    task = build_task(
        recipe.task, num_classes, training.label_smoothing, recipe.data.inference, pixel_loss=training.pixel_loss
    )
    auxiliary = AuxiliaryHead(student.spec, training.auxiliary_weight) if training.auxiliary_weight else None
    return Distiller(student, method, task, training.task_weight, auxiliary)


def train(
    recipe: Recipe, teacher: Teacher | None, loaders: Loaders, report: Report, options: TrainOptions = DEFAULT_OPTIONS
) -> TrainResult:
    """Train a student.

    Args:
        recipe: training to run.
        teacher: the frozen teacher; None only for methods that do not read it.
        loaders: training views and validation images.
        report: called by rank 0 after each epoch; False ends the training.
        options: checkpoint, device and precision.

    Raises:
        TrainingDiverged: a loss is not finite; names the terms and the epoch.
        CheckpointError: the workers see different checkpoints.
        ConfigError: the training does not fit into the GPU's memory.
    """
    device, checkpoint = torch.device(options.device), options.checkpoint
    forbid_tf32(device)
    with _explained_out_of_memory(recipe, device):
        loop = _Loop(recipe, teacher, loaders, options)
        epoch = loop.resume(checkpoint, options.newest_epoch)
        if options.best is not None:
            options.best.resume(epoch)
        metrics: Metrics = loop.evaluate() if epoch == recipe.training.epochs else {}
        stopped, saved = False, time.monotonic()
        while epoch < recipe.training.epochs and not stopped:
            metrics = loop.train_epoch(epoch)
            epoch += 1
            if epoch == recipe.training.epochs or options.evaluated_epochs is None or epoch in options.evaluated_epochs:
                metrics |= loop.evaluate()
            metrics["epoch"] = epoch
            go_on = distributed.broadcast(distributed.rank() != 0 or loop.report(metrics, report))
            stopped = not go_on and epoch < recipe.training.epochs
            is_late = time.monotonic() - saved > CHECKPOINT_SECONDS
            # A picture of the method shows the network of the last epoch with its projectors.
            is_drawn = epoch == recipe.training.epochs and loop.distiller.method.has_figure
            is_due = epoch in options.checkpoint_epochs or stopped or is_late or is_drawn or options.save_now()
            if checkpoint is not None and is_due and distributed.rank() == 0:
                loop.save(checkpoint, epoch)
                saved = time.monotonic()
        return TrainResult(loop.updates.eval_network.eval(), metrics, epoch, stopped)


@contextmanager
def _explained_out_of_memory(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Replace torch's out-of-memory error by a sentence that names the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError:
        images = recipe.training.batch_size // recipe.training.accumulate
        total = f" ({torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GiB in total)" if device.type == "cuda" else ""
        raise ConfigError(
            f"training.batch_size: out of memory: method {recipe.method!r} with {images} images at a time does not "
            f"fit into the free memory of {device}{total}; raise training.accumulate, give each trial more of the GPU "
            "(search.gpus_per_trial), or lower training.batch_size"
        ) from None


class _Loop:
    """The parts of a training, and its epochs."""

    def __init__(self, recipe: Recipe, teacher: Teacher | None, loaders: Loaders, options: TrainOptions) -> None:
        device, precision = torch.device(options.device), options.precision
        self.recipe, self.loaders, self.device, self.best = recipe, loaders, device, options.best
        self.distiller = build_distiller(recipe, teacher, loaders.num_classes)
        if options.start is not None:
            load_weights(self.distiller.student, options.start)
        if loaders.pixel_weights is not None and isinstance(self.distiller.task, SegmentationTask):
            self.distiller.task.loss.weigh_classes(loaders.pixel_weights)
        self.distiller.to(device)
        if precision.channels_last:
            self.distiller.student.to(memory_format=torch.channels_last)
        self.step = distributed.data_parallel(self.distiller)
        self.updates = Updates(self.distiller, self.step, teacher, recipe.training, len(loaders.train), precision)
        if recipe.training.compile:
            compile_student(self.distiller.student, device)
        self.teacher_classes = None
        if teacher is not None and distributed.rank() == 0:
            self.teacher_classes = teacher.classes(loaders.val, self.device)

    def train_epoch(self, epoch: int) -> Metrics:
        """Train for an epoch; losses are summed on the device and read once, at the end."""
        steps = len(self.loaders.train)
        # Dropout and stochastic methods draw from torch's generator: seeded by epoch, so that resuming changes nothing.
        torch.manual_seed(self.recipe.training.seed * 1_000_003 + epoch + distributed.random_offset())
        self.step.train()
        if self.recipe.training.freeze_batch_norm:
            freeze_batch_norm(self.distiller.student)
        if self.recipe.training.trainable == "head":
            # The frozen encoder keeps its running statistics and has no dropout: its features are the published ones.
            self.distiller.student.eval().head.train()
        started = time.perf_counter()
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(self.loaders.train.epoch(epoch)):
            share = len(batch) * distributed.size() / self.loaders.train.images(number)
            losses = self.updates.apply(self._to_device(batch), epoch * steps + number, share)
            for name, value in losses.items():
                value = value if share == 1.0 else share * value
                if name in totals:
                    totals[name] += value
                else:
                    totals[name] = value.float().clone()
        means = (torch.stack(list(totals.values())) / (steps * distributed.size())).tolist()
        # Every rank gets the means of all ranks, so that all raise if a loss is not finite.
        sums = distributed.all_reduce_sum(dict(zip(totals, means, strict=True)))
        metrics = {f"train/{name}": mean for name, mean in sums.items()}
        self._check_finite(metrics, epoch)
        metrics["train/learning_rate"] = max(float(group["lr"]) for group in self.updates.optimizer.param_groups)
        seconds = max(time.perf_counter() - started, 1e-9)
        metrics["time/images_per_second"] = self.loaders.train.images_per_epoch / seconds
        return metrics

    def _to_device(self, batch: Batch) -> Batch:
        """Move a batch to the device; copies to a GPU start from pinned memory, so that they are asynchronous."""
        if self.device.type == "cuda" and not batch.images.is_cuda:
            batch = replace(batch, images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
        return batch.to(self.device)

    def _check_finite(self, metrics: Metrics, epoch: int) -> None:
        broken = [key for key, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise TrainingDiverged(
                f"{', '.join(broken)} of method {self.recipe.method!r} is not finite in epoch {epoch + 1}; "
                f"lower training.learning_rate (now {self.recipe.training.learning_rate:g}) or set training.clip_grad"
            )

    def evaluate(self) -> Metrics:
        """Evaluate the network on val: rank 0 does, and all ranks get its metrics."""
        metrics: Metrics = {}
        if distributed.rank() == 0:
            pairs = evaluate(
                self.updates.eval_network,
                self.loaders.val,
                self.distiller.task,
                teacher_classes=self.teacher_classes,
                device=self.device,
            )
            metrics = named_metrics(pairs, self.loaders.class_names)
        return distributed.broadcast(metrics)

    def report(self, metrics: Metrics, report: Report) -> bool:
        """Keep the epoch if it is the best, and report it; return whether to continue."""
        improves = self.best is None or self.best.update(metrics, self.updates.eval_network)
        return report(metrics) and improves

    def resume(self, file: Path | None, newest_epoch: int | None) -> int:
        """Restore every part from the newest checkpoint that can be used; return its number of finished epochs.

        Rank 0 chooses it; without any, the training starts from its first epoch.

        Raises:
            CheckpointError: the workers see different files.
        """
        if file is None:
            return 0
        found = distributed.broadcast(self._restore_newest(file, newest_epoch) if distributed.rank() == 0 else None)
        if found is None:
            return 0
        chosen, epoch = found
        if distributed.rank() != 0:
            chosen = file.with_name(chosen.name)  # this worker's copy, where each has a folder
            if not chosen.exists():
                raise CheckpointError(
                    f"{chosen}: worker 0 sees this file, this worker does not; put --root on a shared disk"
                )
            checkpoint = read_checkpoint(chosen, self.recipe.hash, self._parts())
            if checkpoint.epoch != epoch:
                raise CheckpointError(f"{chosen}: the workers see different files; put --root on a shared disk")
            self._restore(chosen, checkpoint)
        return epoch

    def _restore_newest(self, file: Path, newest_epoch: int | None) -> tuple[Path, int] | None:
        """Restore the newest usable checkpoint; rename unusable ones, so that they are not read again."""
        for candidate in (file, previous_checkpoint(file)):
            if not candidate.exists():
                continue
            try:
                checkpoint = read_checkpoint(candidate, self.recipe.hash, self._parts())
                epoch = checkpoint.epoch
                if newest_epoch is not None and epoch > newest_epoch:
                    raise CheckpointError(
                        f"{candidate}: is of epoch {epoch}, but reports are complete only up to epoch {newest_epoch}"
                    )
                self._restore(candidate, checkpoint)
            except CheckpointError as error:
                kept = set_aside(candidate)
                logger.warning("%s; renamed to %s, the training resumes from an earlier epoch", error, kept.name)
            else:
                return candidate, epoch
        return None

    def _restore(self, file: Path, checkpoint: Checkpoint) -> None:
        """Restore every part, or none.

        Raises:
            CheckpointError: a part does not fit.
        """
        parts = self._parts()
        before = {name: deepcopy(part.state_dict()) for name, part in parts.items()}
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint.states[name])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  torch and methods raise exceptions of many kinds
            for name, part in parts.items():
                part.load_state_dict(before[name])
            raise CheckpointError(f"{file}: does not fit this training ({type(error).__name__})") from None

    def save(self, file: Path, epoch: int) -> None:
        """Write a checkpoint, keep the previous checkpoint, and wait for a disk that cannot be written at present."""
        states = {name: part.state_dict() for name, part in self._parts().items()}
        write_checkpoint(file, Checkpoint(self.recipe.hash, epoch, states))

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Return what a checkpoint holds: everything but the teacher."""
        parts: dict[str, nn.Module | torch.optim.Optimizer] = {
            "distiller": self.distiller,
            "optimizer": self.updates.optimizer,
        }
        if self.updates.average is not None:
            parts["average"] = self.updates.average.module
        return parts
