"""gathered(): the batch of all data-parallel workers, for losses that compare images with one another.

Such a loss is not the mean of its values on the workers' parts of a batch. Each worker computes it on the whole batch
instead, and only its own images pass a gradient on. A training weighs a worker's loss by its share of the batch times
the number of workers (1 where all have as many images), because data-parallel training then averages the workers'
gradients of each weight; the gradient that passes is divided by that share. The result equals one process with the
whole batch, for weights before the gathering as for weights after it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heterokd import group


def gathered(tensor: Tensor) -> Tensor:
    """The parts [B_w, ...] of all workers one after the other, [sum_w B_w, ...], with gradient to the own part.

    Every worker must call it at the same point, and must compute the same loss from the result. Without several
    workers it returns the tensor itself.

    Args:
        tensor: this worker's part; the first axis may differ between workers, the others may not.
    """
    if group.size() == 1:
        return tensor
    whole: Tensor = _Gather.apply(tensor)
    return whole


class _Gather(torch.autograd.Function):
    """All parts forward; backward, the own part's gradient over its share of the whole."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        lengths = [torch.empty(1, dtype=torch.int64, device=tensor.device) for _ in range(group.size())]
        dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
        counts = torch.cat(lengths).tolist()
        ctx.start, ctx.length = sum(counts[: group.rank()]), len(tensor)
        # Parts of unlike length (an epoch's last batch) travel padded: not every backend gathers unlike shapes.
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own: Tensor = gradient[ctx.start : ctx.start + ctx.length] * (len(gradient) / max(ctx.length, 1))
        return own
