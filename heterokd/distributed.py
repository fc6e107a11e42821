"""Process group and collectives of a sharded training: ranks, reductions, gathers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_ALONE = ContextVar("alone", default=False)


def size() -> int:
    """How many workers share the training."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def rank() -> int:
    """This worker's number, from 0; the first one measures, reports and writes."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """While open, this process has no other workers: for what one of them does while the others wait."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def broadcast(value: T) -> T:
    """The value of the first worker, on every worker; each must call it at the same point."""
    if size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    said: T = box[0]
    return said


def all_reduce_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over all workers, name by name; a worker that lacks a name adds nothing to it."""
    if size() == 1:
        return dict(values)
    everyone: list[Any] = [None] * size()
    dist.all_gather_object(everyone, dict(values))
    names = dict.fromkeys(name for one in everyone for name in one)
    return {name: sum(one.get(name, 0.0) for one in everyone) for name in names}


def all_gather(rows: Tensor) -> Tensor:
    """The tensors [*] of all workers, [size, *], without gradient; all have the same shape.

    By a sum, which every backend has on every device; each place has one summand, so nothing is rounded.
    """
    places = rows.new_zeros((size(), *rows.shape))
    places[rank()] = rows
    dist.all_reduce(places)
    return places


def data_parallel(module: nn.Module) -> nn.Module:
    """The module as all workers train it: gradients are averaged over them.

    A method need not use all its weights at every step, so those without a gradient are looked for. Gradients lie in
    what is sent, which saves a copy of them in every step, and their memory once.
    """
    if size() == 1:
        return module
    return DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True)


def random_offset() -> int:
    """What tells a worker's seed from the others': without it they would drop out the same units at a step."""
    return rank() * 2**40


def gathered(tensor: Tensor) -> Tensor:
    """The parts [B_w, ...] of all workers one after the other, [sum_w B_w, ...], with gradient to the own part.

    Every worker must call it at the same point, and must compute the same loss from the result. Without several
    workers it returns the tensor itself.

    Args:
        tensor: this worker's part; the first axis may differ between workers, the others may not.
    """
    if size() == 1:
        return tensor
    whole: Tensor = _Gather.apply(tensor)
    return whole


class _Gather(torch.autograd.Function):
    """All parts forward; backward, the own part's gradient over its share of the whole."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        lengths = [torch.empty(1, dtype=torch.int64, device=tensor.device) for _ in range(size())]
        dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
        counts = torch.cat(lengths).tolist()
        ctx.start, ctx.length = sum(counts[: rank()]), len(tensor)
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
