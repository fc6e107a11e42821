"""Teacher outputs that depend on the view alone, not on what else is in the batch.

Matrix products and convolutions choose their kernels by batch size, so the last bits of a view's logits differ between
batches of 1 and of 64 (on a CPU, in six of seven networks tried); the position within a batch whose size is a fixed
multiple of 16 changed nothing in any of them. So on a CPU both the builder of a cache and the live teacher that
replaces it run the network in blocks of a fixed size. On a GPU, where bit equality is not promised, blocks only bound
memory.
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
"""Images per block on a CPU; a multiple of 16, see above."""
BLOCK_PIXELS = BLOCK * 64 * 64
"""Maximum number of pixels per block, so that larger views have smaller blocks; at least one view."""
GPU_BLOCK = 256

Compute = Callable[[NDArray[np.int64], NDArray[np.int64]], Mapping[str, Tensor]]
"""Function from index [B] and view [B] to `logits` and `embedding` of these views."""


class NetworkTeacher(Protocol):
    """Protocol of a live teacher: see `heterokd.training.teacher.LiveTeacher`."""

    network: Any
    spec: OutputSpec
    serves: Signal

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """Return the teacher's outputs for these views."""
        ...

    def classes(self, loader: EvalLoader, device: torch.device | str) -> Tensor | None:
        """Return its predictions on plain images, [N]."""
        ...


class SteadyTeacher:
    """A live teacher in fp32 whose logits and embedding of a view do not depend on the batch.

    Args:
        live: teacher to run.
    """

    def __init__(self, live: NetworkTeacher) -> None:
        self.live = live
        self.network, self.spec, self.serves = live.network, live.spec, live.serves

    def outputs(self, batch: Batch, needs: Signal) -> Outputs:
        """See `Teacher`; signals other than logits, embedding and tail come from a single forward of the batch."""
        if needs & ~(STORABLE | Signal.TAIL):
            return self.live.outputs(batch, needs)
        found: dict[str, Any] = self.tensors(batch, needs & STORABLE) if needs & STORABLE else {}
        return Outputs(**found, tail=self.network.tail if Signal.TAIL in needs else None, owner="teacher")

    def tensors(self, batch: Batch, needs: Signal) -> dict[str, Tensor]:
        """Compute those of `logits` and `embedding` of a batch that `needs` contains."""
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
        split: split with the images.
        views: policy, seed and crop of the views.
        live: teacher; runs in blocks, see `SteadyTeacher`.
        signals: LOGITS, EMBEDDING or both.
        device: device of the views and of the teacher.
    """
    steady = SteadyTeacher(live)
    loader = TrainLoader(split, views, 1, num_classes=live.spec.num_classes, device=device)

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
