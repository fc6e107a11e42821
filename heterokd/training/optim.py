"""Optimizer and learning-rate schedule of a training, from timm."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import TypedDict

import timm.optim as timm_optim
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from timm.scheduler.tanh_lr import TanhLRScheduler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from heterokd.config.training import TrainingSettings
from heterokd.networks.combined import CombinedNetwork
from heterokd.networks.network import AnyNetwork

FUSED_DEVICES = {"cpu", "cuda", "xpu"}
"""Devices on which torch's optimizers have fused kernels."""


ParameterGroup = dict[str, object]
"""A group of an optimizer's parameters with its settings."""


def build_optimizer(
    module: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    groups: list[ParameterGroup] | None = None,
) -> torch.optim.Optimizer:
    """Build timm's optimizer of the trainable parameters of `module`; norms and biases are not decayed.

    Optimizers with a fused implementation use it: a single kernel updates all weights. `groups` replace the parameters
    of `module`, see `layer_groups`.
    """
    is_fused = has_fused(name) and {parameter.device.type for parameter in module.parameters()} <= FUSED_DEVICES
    create = partial(
        timm_optim.create_optimizer_v2,  # type: ignore[attr-defined]
        module if groups is None else groups,
        opt=name,
        lr=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        filter_bias_and_bn=True,
    )
    optimizer: torch.optim.Optimizer = create(fused=True) if is_fused else create()
    if is_fused and isinstance(optimizer, torch.optim.SGD):
        _start_momentum(optimizer)
    return optimizer


LEAST_SCALE = 0.05
"""Share of the learning rate below which a layer is not trained: it would hardly change, at a cost."""


def freeze_slow_layers(body: nn.Module, settings: TrainingSettings) -> None:
    """Freeze the layers whose learning rate `settings.layer_decay` scales below `LEAST_SCALE`."""
    if settings.layer_decay is not None:
        timm_optim.param_groups_layer_decay(  # type: ignore[attr-defined]
            body, layer_decay=settings.layer_decay, no_opt_scale=LEAST_SCALE
        )


def freeze_batch_norm(network: nn.Module) -> None:
    """Let batch norms use their running statistics and keep them; weights and biases are still trained."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.eval()


def head_groups(
    module: nn.Module, encoder: Iterable[nn.Parameter], settings: TrainingSettings
) -> list[ParameterGroup] | None:
    """Return parameter groups whose `lr_scale` is `settings.head_lr_scale` outside of the encoder; None if it is 1."""
    if settings.head_lr_scale == 1:
        return None
    of_encoder = {id(parameter) for parameter in encoder}
    groups: list[ParameterGroup] = []
    for inside, scale in ((True, 1.0), (False, settings.head_lr_scale)):
        members = [each for each in module.parameters() if each.requires_grad and (id(each) in of_encoder) is inside]
        groups += _decayed(members, settings.weight_decay, scale)
    return groups


def _decayed(members: list[nn.Parameter], weight_decay: float, scale: float) -> list[ParameterGroup]:
    """Return groups of biases and norms, which are not decayed, and of the other parameters."""
    parts = [[each for each in members if (each.ndim > 1) is wide] for wide in (False, True)]
    return [
        {"params": part, "weight_decay": decay, "lr_scale": scale}
        for part, decay in zip(parts, (0.0, weight_decay), strict=True)
        if part
    ]


def layer_groups(module: nn.Module, body: nn.Module, settings: TrainingSettings) -> list[ParameterGroup] | None:
    """Return parameter groups whose `lr_scale` falls by `settings.layer_decay` per layer of `body`; None without it.

    Layers are those of timm's `group_matcher`. Parameters of `module` outside of `body` have the full learning rate,
    like the classifier. A schedule multiplies the learning rate by `lr_scale`.
    """
    if settings.layer_decay is None:
        return None
    groups: list[ParameterGroup] = timm_optim.param_groups_layer_decay(  # type: ignore[attr-defined]
        body, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
    )
    of_body = {id(parameter) for parameter in body.parameters()}
    others = [each for each in module.parameters() if each.requires_grad and id(each) not in of_body]
    return groups + _decayed(others, settings.weight_decay, 1.0)


def training_groups(module: nn.Module, student: AnyNetwork, settings: TrainingSettings) -> list[ParameterGroup] | None:
    """Return the parameter groups of a training of `module`, which holds the student; None: all learn alike."""
    assert not isinstance(student, CombinedNetwork)  # students are single networks
    return layer_groups(module, student.body, settings) or head_groups(module, student.encoder_parameters, settings)


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
    kind = timm_optim.get_optimizer_class(name, bind_defaults=False)  # type: ignore[attr-defined]
    return "fused" in inspect.signature(kind).parameters


class _Warmup(TypedDict):
    """Arguments that all schedulers of timm share."""

    t_in_epochs: bool
    warmup_t: int
    warmup_lr_init: float
    warmup_prefix: bool


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, steps_per_epoch: int
) -> Scheduler | None:
    """Build timm's schedule, stepped once per optimizer update; None for a constant learning rate.

    The warm-up is part of the epochs and starts at a hundredth of the maximum.
    """
    name, lowest = settings.schedule, settings.min_learning_rate
    updates = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), updates - 1)
    scales = settings.layer_decay is not None or settings.head_lr_scale != 1  # which a schedule applies
    if name == "constant" and warmup == 0 and not scales:
        return None
    shared: _Warmup = {
        "t_in_epochs": False,
        "warmup_t": warmup,
        "warmup_lr_init": settings.learning_rate / 100 if warmup else 0.0,
        "warmup_prefix": True,
    }
    decay = updates - warmup
    scheduler: Scheduler
    if name == "cosine":
        scheduler = CosineLRScheduler(optimizer, t_initial=decay, lr_min=lowest, **shared)
    elif name == "tanh":
        scheduler = TanhLRScheduler(optimizer, t_initial=decay, lr_min=lowest, **shared)
    elif name == "poly":
        scheduler = PolyLRScheduler(optimizer, t_initial=decay, lr_min=lowest, power=0.9, **shared)
    elif name == "step":
        # A tenth at each third of the training: ImageNet's 30 / 60 / 90 of 100 epochs.
        scheduler = StepLRScheduler(optimizer, decay_t=max(1, round(0.3 * decay)), **shared)
    else:
        scheduler = StepLRScheduler(optimizer, decay_t=updates + 1, decay_rate=1.0, **shared)
    scheduler.step_update(0)
    return scheduler
