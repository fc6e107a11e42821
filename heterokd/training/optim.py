"""Optimizer, learning-rate schedule and weight average of a training, from timm."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from itertools import chain
from typing import Any

import timm.optim as timm_optim
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from timm.scheduler.tanh_lr import TanhLRScheduler
from torch import Tensor, nn

# Devices on which torch's optimizers have fused kernels.
FUSED_DEVICES = ("cpu", "cuda", "xpu")


def build_optimizer(
    module: nn.Module, name: str, learning_rate: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """Build timm's optimizer of the trainable parameters of `module`; norms and biases are not decayed.

    Optimizers with a fused implementation use it: a single kernel updates all weights.
    """
    on = {parameter.device.type for parameter in module.parameters()}
    fused: dict[str, Any] = {"fused": True} if has_fused(name) and on <= set(FUSED_DEVICES) else {}
    optimizer: torch.optim.Optimizer = timm_optim.create_optimizer_v2(  # type: ignore[attr-defined]
        module,
        opt=name,
        lr=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        filter_bias_and_bn=True,
        **fused,
    )
    if fused and isinstance(optimizer, torch.optim.SGD):
        _start_momentum(optimizer)
    return optimizer


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Initialise the momentum of every weight with zeros.

    The fused kernel refuses weights with and without momentum in the same update, as happens when a weight gets its
    first gradient later than others. The first update is the same: 0 times the momentum, plus the gradient.
    """
    for group in optimizer.param_groups:
        if group["momentum"] and not group["dampening"]:
            for weight in group["params"]:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


@lru_cache(maxsize=64)
def has_fused(name: str) -> bool:
    """Return whether an optimizer has a fused implementation."""
    return (
        "fused"
        in inspect.signature(
            timm_optim.get_optimizer_class(name, bind_defaults=False)  # type: ignore[attr-defined]
        ).parameters
    )


class WeightAverage:
    """Exponential moving average of a network's weights and buffers, updated by a single fused kernel.

    Args:
        network: network in training.
        decay: decay of the average per update.

    Attributes:
        network: copy of the network with the averaged weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network)
        self.decay = decay
        self._means: list[Tensor] = []
        self._values: list[Tensor] = []
        self._counts: list[tuple[Tensor, Tensor]] = []
        averaged = chain(self.network.parameters(), self.network.buffers())
        for mean, value in zip(averaged, chain(network.parameters(), network.buffers()), strict=True):
            if mean.is_floating_point():
                self._means.append(mean.detach())
                self._values.append(value.detach())
            else:
                self._counts.append((mean, value))

    @torch.no_grad()
    def update(self, *, first: bool) -> None:
        """Move the average towards the current weights; the first update copies them."""
        torch._foreach_lerp_(self._means, self._values, 1.0 if first else 1 - self.decay)
        for mean, value in self._counts:
            mean.copy_(value)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float,
    learning_rate: float,
    min_learning_rate: float,
) -> Scheduler | None:
    """Build timm's schedule, stepped once per optimizer update; None for a constant learning rate.

    The warm-up is part of the epochs and starts at a hundredth of the peak.
    """
    updates = epochs * steps_per_epoch
    warmup = min(round(warmup_epochs * steps_per_epoch), updates - 1)
    if name == "constant" and warmup == 0:
        return None
    shared: dict[str, Any] = {
        "t_in_epochs": False,
        "warmup_t": warmup,
        "warmup_lr_init": learning_rate / 100 if warmup else 0.0,
        "warmup_prefix": True,
    }
    decay = updates - warmup
    scheduler: Scheduler
    if name == "cosine":
        scheduler = CosineLRScheduler(optimizer, t_initial=decay, lr_min=min_learning_rate, **shared)
    elif name == "tanh":
        scheduler = TanhLRScheduler(optimizer, t_initial=decay, lr_min=min_learning_rate, **shared)
    elif name == "poly":
        scheduler = PolyLRScheduler(optimizer, t_initial=decay, lr_min=min_learning_rate, power=0.9, **shared)
    elif name == "step":
        # A tenth at each third of the training: ImageNet's 30 / 60 / 90 of 100 epochs.
        scheduler = StepLRScheduler(optimizer, decay_t=max(1, round(0.3 * decay)), **shared)
    else:
        scheduler = StepLRScheduler(optimizer, decay_t=updates + 1, decay_rate=1.0, **shared)
    scheduler.step_update(0)
    return scheduler
