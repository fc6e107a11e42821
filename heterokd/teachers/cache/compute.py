"""Teacher outputs that depend on the view alone, not on what else is in the batch.

Matrix products and convolutions choose their kernels by batch size, so the last bits of a view's logits differ between
batches of 1 and of 64 (on a CPU, in six of seven networks tried); the place within a batch of one size that is a
multiple of 16 changed nothing in any of them. So on a CPU both the builder of a cache and who stands in for it run the
teacher in blocks of one fixed size. On a GPU, where bit equality is not promised, blocks only bound memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterokd.datasets.io.loaders import EvalLoader, TrainLoader
from heterokd.datasets.io.split import Split
from heterokd.datasets.views.policy import ViewSpec
from heterokd.outputs import Batch, Outputs, OutputSpec, Signal
from heterokd.teachers.cache.key import STORABLE

BLOCK = 32
"""Images of a block on a CPU; a multiple of 16, see above."""
BLOCK_PIXELS = BLOCK * 64 * 64
"""Larger views come in smaller blocks: at most this many pixels, at least one view."""
GPU_BLOCK = 256

Compute = Callable[[NDArray[np.int64], NDArray[np.int64]], Mapping[str, Tensor]]
"""`logits` and `embedding` of the views named by index and view [B]."""


class NetworkTeacher(Protocol):
    """A live teacher: see `heterokd.training.teacher.LiveTeacher`."""

    network: Any
    spec: OutputSpec
    serves: Signal

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """The teacher's outputs for these views."""
        ...

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        """[N] its decisions on plain images."""
        ...


class SteadyTeacher:
    """A live teacher in fp32 whose logits and embedding of a view are the same in any batch.

    Args:
        live: the network that runs.
    """

    def __init__(self, live: NetworkTeacher) -> None:
        self.live = live
        self.network, self.spec, self.serves = live.network, live.spec, live.serves

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """See `Teacher`; signals other than logits, embedding and tail come from one pass of the whole batch."""
        if needs & ~(STORABLE | Signal.TAIL):
            return self.live.outputs(batch, needs)
        found: dict[str, Any] = self.tensors(batch, needs & STORABLE) if needs & STORABLE else {}
        return Outputs(**found, tail=self.network.tail if Signal.TAIL in needs else None, owner="teacher")

    def tensors(self, batch: Batch, needs: Signal) -> dict[str, Tensor]:
        """`logits` and `embedding` of a batch, as far as `needs` asks for them."""
        device = batch.images.device
        size = _block(batch.images)
        parts: dict[str, list[Tensor]] = {}
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(batch), size):
                block = _rows(batch, start, size)
                count = len(block)
                if count < size and device.type == "cpu":
                    last = torch.arange(size).clamp(max=count - 1)
                    block = replace(block, images=block.images[last])
                outputs = self.live.outputs(block, needs)
                if Signal.LOGITS in needs:
                    parts.setdefault("logits", []).append(outputs.logits[:count])
                if Signal.EMBEDDING in needs:
                    parts.setdefault("embedding", []).append(outputs.embedding[:count])
        return {name: torch.cat(pieces).float() for name, pieces in parts.items()}

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        """See `Teacher`."""
        return self.live.classes(loader, device)


def view_outputs(
    split: Split,
    views: ViewSpec,
    live: NetworkTeacher,
    *,
    signals: Signal = STORABLE,
    device: torch.device | str = "cpu",
) -> Compute:
    """Return a function that computes a live teacher's outputs for any view of a split, made as `TrainLoader` makes it.

    Args:
        split: the images.
        views: policy, seed and crop of the views.
        live: teacher; runs in blocks, see `SteadyTeacher`.
        signals: LOGITS, EMBEDDING or both.
        device: where the views are made and the teacher runs.
    """
    steady = SteadyTeacher(live)
    classes = live.spec.num_classes
    loader = TrainLoader(split, views.policy, 1, views.seed, crop=views.crop, num_classes=classes, device=device)

    def compute(index: NDArray[np.int64], view: NDArray[np.int64]) -> Mapping[str, Tensor]:
        return steady.tensors(loader.views_of(index, view), signals)

    return compute


def _block(images: Tensor) -> int:
    if images.device.type != "cpu":
        return GPU_BLOCK
    return max(min(BLOCK, BLOCK_PIXELS // (images.shape[-2] * images.shape[-1])), 1)


def _rows(batch: Batch, start: int, size: int) -> Batch:
    rows = slice(start, start + size)
    return Batch(images=batch.images[rows], labels=batch.labels[rows], index=batch.index[rows])
