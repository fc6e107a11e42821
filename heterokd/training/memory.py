"""Estimate the GPU memory of a training on the CPU, from a single step with a few images.

Memory that grows with the batch (tensors saved by autograd, the largest maps) is measured and scaled; the rest
(weights, gradients, the optimizer's state) is counted after the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from heterokd.config.data_sizes import data_at
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.device_pixels import RESIDENT_SHARE
from heterokd.datasets.io.loaders import EVAL_BATCH, open_split
from heterokd.datasets.io.split import Split, Splits
from heterokd.outputs import Batch, Outputs, Signal
from heterokd.tasks import TASKS
from heterokd.training.optim import build_optimizer, training_groups
from heterokd.training.student import build_configured
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import build_distiller

CONTEXT_BYTES = 600 * 2**20
"""GPU memory of a process before its first tensor: the CUDA context, kernels and handles of cuDNN and cuBLAS."""

SLACK = 1.25
"""Factor for the allocator's rounding and fragmentation."""

WORKSPACE_BYTES = 3 * 2**29
"""Largest workspace of cuDNN's fastest algorithms: 1.5 GiB for ResNet18's fp32 convolutions at 128 pixels and
batch 64 on an H200, twice what the step itself keeps (`WORKSPACE_STEPS`); tiny networks need almost none."""
WORKSPACE_STEPS = 2

IMAGES = 2
"""Number of images of the measured step."""

MAPS_AT_A_TIME = 3
"""Number of the largest maps that exist at once without autograd: a layer's input, its output and a shortcut."""


def estimate_memory(recipe: Recipe, splits: Splits, gpu_bytes: int) -> int:
    """Estimate the GPU memory of a recipe's training, in bytes; meant as an upper bound.

    A split that takes a small share of the GPU's memory, `gpu_bytes`, stays there.

    Raises:
        PairError: the method cannot exist for the pair.
        NetworkError: a network cannot be built.
    """
    settings = recipe.training
    teacher = LiveTeacher(build_configured(recipe.teacher, splits.num_classes, recipe.teacher_size))
    distiller = build_distiller(recipe, teacher, splits.num_classes)
    groups = training_groups(distiller, distiller.student, settings)
    optimizer = build_optimizer(
        distiller, settings.optimizer, settings.learning_rate, settings.weight_decay, settings.momentum, groups
    )
    batch = _images(recipe, splits.num_classes, recipe.data.view_size)
    seen = batch
    if recipe.teacher_size != recipe.data.image_size:
        seen = _images(recipe, splits.num_classes, data_at(recipe.data, recipe.teacher_size).view_size)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if settings.precision == "bf16" else nullcontext()
    reads_teacher = distiller.teacher_needs != Signal.NONE
    with autocast, _largest(teacher.network) as of_teacher:
        outputs = teacher.outputs(seen, distiller.teacher_needs) if reads_teacher else Outputs(owner="teacher")
    distiller.train()
    if settings.trainable == "head":
        distiller.student.eval()
    with _saved([distiller, teacher.network]) as saved, _largest(distiller) as of_student:
        with autocast:
            loss, _ = distiller(batch, outputs, 0.5)
        saved_bytes = sum(saved.values())
    loss.backward()
    optimizer.step()

    fixed = _bytes(distiller.parameters()) + _bytes(distiller.buffers())
    fixed += _bytes(parameter.grad for parameter in distiller.parameters())
    fixed += _bytes(value for state in optimizer.state.values() for value in state.values())
    fixed += 0 if settings.ema is None else _bytes(distiller.student.parameters())
    fixed += _bytes(teacher.network.parameters()) if reads_teacher else 0
    fixed += sum(_resident(split, gpu_bytes) for split in (splits.seen, splits.val))
    if reads_teacher and seen is not batch:
        fixed += sum(_resident_at(split, recipe.teacher_size, gpu_bytes) for split in (splits.seen, splits.val))

    image = (batch.images.nbytes + (seen.images.nbytes if seen is not batch else 0)) / IMAGES
    maps = MAPS_AT_A_TIME * max(of_student[0], of_teacher[0]) / IMAGES
    step = settings.batch_size // settings.accumulate * (saved_bytes / IMAGES + maps + image)
    eval_batch = open_split(splits.val, splits.num_classes, max(settings.batch_size, EVAL_BATCH)).batch_size
    evaluation = eval_batch * (maps + image)
    workspace = min(WORKSPACE_BYTES, WORKSPACE_STEPS * max(step, evaluation))
    return CONTEXT_BYTES + int(SLACK * (fixed + max(step, evaluation)) + workspace)


def _images(recipe: Recipe, num_classes: int, size: tuple[int, int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    height, width = size
    shape = (IMAGES, *TASKS[recipe.task].label_shape((height, width)))
    return Batch(
        images=torch.rand(IMAGES, 3, height, width, generator=generator),
        labels=torch.randint(num_classes, shape, generator=generator),
        index=torch.arange(IMAGES),
    )


def _resident(split: Split, gpu_bytes: int) -> int:
    """Return the bytes of a split that stays on the device; 0 if it is read batch by batch."""
    first = np.zeros(1, np.int64)
    image = split.images.read(first).nbytes
    if len(split) * image > RESIDENT_SHARE * gpu_bytes:
        return 0
    return len(split) * (image + (0 if split.label_maps is None else split.label_maps.read(first).nbytes))


def _resident_at(split: Split, size: int, gpu_bytes: int) -> int:
    """Return `_resident` of a split's images at another size."""
    whole = len(split) * 3 * size**2
    return whole if whole <= RESIDENT_SHARE * gpu_bytes else 0


def _bytes(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


@contextmanager
def _saved(modules: list[nn.Module]) -> Iterator[dict[int, int]]:
    """Record the bytes of each storage that autograd saves, except weights and buffers."""
    weights = {
        tensor.untyped_storage().data_ptr()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        # Detached, because a tensor that refers to its node would keep the whole graph alive.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield storages


@contextmanager
def _largest(module: nn.Module) -> Iterator[list[int]]:
    """Record the bytes of the largest tensor that a layer returns, as a list with a single entry."""
    found = [0]

    def measure(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            found[0] = max(found[0], output.nbytes)

    handles = [
        layer.register_forward_hook(measure) for layer in module.modules() if next(layer.children(), None) is None
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
