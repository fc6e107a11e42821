"""Batch norms with the statistics of all workers' images (`training.sync_batch_norm`).

torch's SyncBatchNorm, to which torch and timm can convert a network, refuses tensors on a CPU, and the conversion
replaces modules. Here `F.batch_norm`, which all batch norms of torch and timm call, is replaced while a step runs:
modules, checkpoints and published weights stay unchanged, on any device and backend. It costs an all-reduce in the
forward and another in the backward pass.
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

import heterokd.distributed as group

NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
"""Parameters of `F.batch_norm`, in order."""


def shared_batch_norms(*, enabled: bool) -> AbstractContextManager[object]:
    """Return the context of a step: batch norms in training mode use the images of all workers if there are several."""
    return _SharedBatchNorms() if enabled and group.size() > 1 else nullcontext()


class _SharedBatchNorms(TorchFunctionMode):
    """Redirects `F.batch_norm` in training mode to `shared_batch_norm`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            arguments = dict(zip(NAMES, args, strict=False)) | kwargs
            if arguments.pop("training", False):
                return shared_batch_norm(arguments.pop("input"), **arguments)
        return func(*args, **kwargs)


# The parameters are those of F.batch_norm.
def shared_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Apply `F.batch_norm` in training mode to the parts [B_w, C, *] of all workers; return this worker's part.

    The parts may differ in their first axis. Statistics are in float32; running statistics are updated as in torch.
    """
    axes = [0, *range(2, x.dim())]
    values = x.float()
    var_C, mean_C = torch.var_mean(values, dim=axes, correction=0)
    count_C = torch.full_like(mean_C, x.numel() / x.shape[1])
    gathered_W3C: Tensor = _AllGather.apply(torch.stack((mean_C, var_C, count_C)))
    means_WC, vars_WC, counts_WC = gathered_W3C.unbind(1)
    total_C = counts_WC.sum(0)
    shares_WC = counts_WC / total_C
    mean_C = (shares_WC * means_WC).sum(0)
    # From the parts' variances and the distances of their means: no difference of large squares.
    var_C = (shares_WC * (vars_WC + (means_WC - mean_C).square())).sum(0)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean_C.to(running_mean.dtype), momentum)
            running_var.lerp_((var_C * (total_C / (total_C - 1))).to(running_var.dtype), momentum)
    shape = (1, -1, *(1 for _ in axes[1:]))
    scale_C = torch.rsqrt(var_C + eps)
    if weight is not None:
        scale_C = scale_C * weight.float()
    normalised = (values - mean_C.view(shape)) * scale_C.view(shape)
    return (normalised if bias is None else normalised + bias.float().view(shape)).to(x.dtype)


class _AllGather(torch.autograd.Function):
    """`group.all_gather` with gradient: backward, the sum over workers of the gradients of this worker's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return group.all_gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[group.rank()]
