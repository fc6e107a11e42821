"""Process group and collectives of a sharded training: ranks, reductions, gathers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_ALONE = ContextVar("alone", default=False)


def size() -> int:
    """Number of workers of the training."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Rank of this worker; rank 0 evaluates, reports and writes."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Treat this process as the only worker, for work that rank 0 does while the others wait."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def broadcast(value: T) -> T:
    """Broadcast rank 0's value to all ranks; every worker must call it at the same point."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Sum over all workers, name by name; a missing name counts as 0."""
    if size() == 1:
        return dict(values)
    received: list[Mapping[str, float]] = [{}] * size()
    dist.all_gather_object(received, dict(values))
    names = dict.fromkeys(name for part in received for name in part)
    return {name: sum(part.get(name, 0.0) for part in received) for name in names}


def all_gather(rows: Tensor) -> Tensor:
    """All-gather tensors [*] of equal shape to [size, *], without gradient.

    Uses all-reduce, which every backend supports on every device; each element has a single non-zero summand, so that
    the result is exact.
    """
    parts = rows.new_zeros((size(), *rows.shape))
    parts[rank()] = rows
    dist.all_reduce(parts)
    return parts


def data_parallel(module: nn.Module) -> nn.Module:
    """Wrap a module in DistributedDataParallel if there are several workers.

    A method need not use all its weights in every step, hence `find_unused_parameters`; gradients as bucket views save
    a copy per step and their memory.
    """
    if size() == 1:
        return module
    return DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True)


def random_offset() -> int:
    """Offset of this worker's seed, so that workers draw different dropout masks."""
    return rank() * 2**40


def gathered(tensor: Tensor) -> Tensor:
    """Concatenate the parts [B_w, ...] of all workers to [sum_w B_w, ...], with gradient to the local part.

    Every worker must call it at the same point, and must compute the same loss from the result. A single worker gets
    its tensor unchanged.

    Args:
        tensor: this worker's part; only the first axis may differ between workers.
    """
    if size() == 1:
        return tensor
    whole: Tensor = _Gather.apply(tensor)
    return whole


class _GatherContext(Protocol):
    """The local part's position in the gathered tensor."""

    start: int
    length: int


class _Gather(torch.autograd.Function):
    """Forward, all parts; backward, the gradient of the local part divided by its share of the rows."""

    @staticmethod
    def forward(ctx: _GatherContext, tensor: Tensor) -> Tensor:
        lengths = [torch.empty(1, dtype=torch.int64, device=tensor.device) for _ in range(size())]
        dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
        counts = torch.cat(lengths).tolist()
        ctx.start, ctx.length = sum(counts[: rank()]), len(tensor)
        # Pad parts of different lengths (an epoch's last batch): not every backend gathers different shapes.
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: _GatherContext, gradient: Tensor) -> Tensor:
        local: Tensor = gradient[ctx.start : ctx.start + ctx.length] * (len(gradient) / max(ctx.length, 1))
        return local
