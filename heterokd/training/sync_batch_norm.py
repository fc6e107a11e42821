"""Batch norms whose statistics are those of all workers' images (`training.sync_batch_norm`).

torch's own SyncBatchNorm runs on GPUs only and takes the place of modules, of which timm has kinds of its own (a batch
norm with its activation). Here the function that all of them call is replaced while a step runs: modules, checkpoints
and published weights stay as they are, on any device and backend. One exchange forward and one backward each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from heterokd import distributed as group

NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def shared_batch_norms(*, asked: bool) -> AbstractContextManager[object]:
    """The context of a step: batch norms that train see the images of all workers, where that is asked and there are.

    Args:
        asked: `training.sync_batch_norm`.
    """
    return _SharedBatchNorms() if asked and group.size() > 1 else nullcontext()


class _SharedBatchNorms(TorchFunctionMode):
    """Every call of `F.batch_norm` in training mode becomes `shared_batch_norm`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            given = dict(zip(NAMES, args, strict=False)) | kwargs
            if given.pop("training", False):
                return shared_batch_norm(given.pop("input"), **given)
        return func(*args, **kwargs)


def shared_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` in training mode on the parts [B_w, C, *] of all workers; the part of this one, normalised.

    The parts may differ in their first axis. Statistics are in float32, running ones are updated as torch does.
    """
    axes = [0, *range(2, x.dim())]
    values = x.float()
    var_C, mean_C = torch.var_mean(values, dim=axes, correction=0)
    count_C = torch.full_like(mean_C, x.numel() / x.shape[1])
    everyone_W3C: Tensor = _Every.apply(torch.stack((mean_C, var_C, count_C)))
    means_WC, vars_WC, counts_WC = everyone_W3C.unbind(1)
    total_C = counts_WC.sum(0)
    shares_WC = counts_WC / total_C
    mean_C = (shares_WC * means_WC).sum(0)
    # Of the parts' variances and of the distances of their means: no difference of large squares.
    var_C = (shares_WC * (vars_WC + (means_WC - mean_C).square())).sum(0)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean_C.to(running_mean.dtype), momentum)
            running_var.lerp_((var_C * (total_C / (total_C - 1))).to(running_var.dtype), momentum)
    shape = (1, -1, *(1 for _ in axes[1:]))
    scale_C = torch.rsqrt(var_C + eps)
    if weight is not None:
        scale_C = scale_C * weight.float()
    normal = (values - mean_C.view(shape)) * scale_C.view(shape)
    return (normal if bias is None else normal + bias.float().view(shape)).to(x.dtype)


class _Every(torch.autograd.Function):
    """`group.every`; backward, the sum over workers of the gradients that reached this one's place."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everyone: Tensor = group.all_gather(rows)
        return everyone

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        own: Tensor = gradient[group.rank()]
        return own
