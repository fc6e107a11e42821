"""Training steps whose losses and weights are compared with those of the authors' programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor, nn


def randn(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


@torch.no_grad()
def fill(module: nn.Module, generator: Generator, deviation: float = 0.3) -> None:
    """Set all parameters to normal numbers."""
    for parameter in module.parameters():
        parameter.copy_(deviation * randn(generator, *parameter.shape))


def digest(tensors: Iterable[Tensor]) -> float:
    """Sum all numbers with different weights, so that no two errors cancel out."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    return (flat * torch.arange(len(flat)).double().cos()).sum().item()


def sgd(modules: Sequence[nn.Module]) -> torch.optim.SGD:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
