"""Teacher outputs that depend on the view alone, not on what else is in the batch.

Matrix products and convolutions choose their kernels by batch size, so the last bits of a view's logits differ between
batches of 1 and of 64 (on a CPU, in six of seven networks tested); the position within a batch whose size is a fixed
multiple of 16 changed nothing in any of them. So on a CPU the network runs in blocks of a fixed size, both when a cache
is built and when a teacher computes what a cache lacks. On a GPU, where bit equality is not promised, blocks only bound
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.io.loaders import TrainLoader
from heterokd.datasets.io.split import Split
from heterokd.datasets.views.policy import ViewSpec
from heterokd.outputs import Batch, Signal
from heterokd.teachers.cache.key import STORABLE
from heterokd.training.teacher import LiveTeacher

BLOCK = 32
"""Images per block on a CPU; a multiple of 16, see above."""
BLOCK_PIXELS = BLOCK * 64 * 64
"""Maximum number of pixels per block, so that larger views have smaller blocks; at least one view."""
GPU_BLOCK = 256

Compute = Callable[[NDArray[np.int64], NDArray[np.int64]], Mapping[str, Tensor]]
"""Function from index [B] and view [B] to `logits` and `embedding` of these views."""


def block_outputs(
    live: LiveTeacher, batch: Batch, needs: Signal, precision: Literal["fp32", "bf16"] = "fp32"
) -> dict[str, Tensor]:
    """Compute `logits` and `embedding` of a batch, those that `needs` contains, in blocks of fixed size.

    The forward pass is in fp32, or under autocast in bf16; the outputs are float32. Of a cross-fitted teacher, the
    images of each fold are in separate blocks.
    """
    rows = list(live.fold_rows(batch).values())
    if len(rows) <= 1:
        return _blocks(live, batch, needs, precision)
    found = [_blocks(live, _chosen(batch, part), needs, precision) for part in rows]
    order = torch.cat(rows).argsort().to(batch.images.device)
    return {name: torch.cat([part[name] for part in found])[order] for name in found[0]}


def _chosen(batch: Batch, rows: Tensor) -> Batch:
    """Return the images of a batch at these positions, which are on the CPU."""
    there = rows.to(batch.images.device)
    shown = None if batch.shown is None else batch.shown[rows]
    return Batch(images=batch.images[there], labels=batch.labels[there], index=batch.index[there], shown=shown)


def _blocks(live: LiveTeacher, batch: Batch, needs: Signal, precision: Literal["fp32", "bf16"]) -> dict[str, Tensor]:
    device, size = batch.images.device, _block_size(batch.images)
    parts: dict[str, list[Tensor]] = {}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, len(batch), size):
            rows = slice(start, start + size)
            shown = None if batch.shown is None else batch.shown[rows]
            block = Batch(images=batch.images[rows], labels=batch.labels[rows], index=batch.index[rows], shown=shown)
            count = len(block)
            if count < size and device.type == "cpu":
                repeated = torch.arange(size).clamp(max=count - 1)
                shown = None if shown is None else shown[repeated]
                block = replace(block, images=block.images[repeated], shown=shown)
            outputs = live.outputs(block, needs)
            if Signal.LOGITS in needs:
                parts.setdefault("logits", []).append(outputs.logits[:count])
            if Signal.EMBEDDING in needs:
                parts.setdefault("embedding", []).append(outputs.embedding[:count])
    return {name: torch.cat(pieces).float() for name, pieces in parts.items()}


def view_outputs(
    split: Split,
    views: ViewSpec,
    live: LiveTeacher,
    *,
    signals: Signal = STORABLE,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Compute:
    """Return a function that computes a live teacher's outputs for any view of a split, as `TrainLoader` renders it.

    Args:
        split: split with the images.
        views: policy, seed and crop of the views.
        live: the teacher.
        signals: LOGITS, EMBEDDING or both.
        device: device of the views and of the teacher.
        precision: number format of the forward pass.
    """
    loader = TrainLoader(split, views, 1, num_classes=live.spec.num_classes, device=device)

    def compute(index: NDArray[np.int64], view: NDArray[np.int64]) -> Mapping[str, Tensor]:
        return block_outputs(live, loader.views_of(index, view), signals, precision)

    return compute


def _block_size(images: Tensor) -> int:
    if images.device.type != "cpu":
        return GPU_BLOCK
    return max(min(BLOCK, BLOCK_PIXELS // (images.shape[-2] * images.shape[-1])), 1)
