"""Separable convolutions as products of matrices against their layers one after the other."""

from __future__ import annotations

import copy

import pytest
import torch

from heterokd.methods._projectors import ConvProjector, SeparableConv
from heterokd.outputs import OutputSpec, StageSpec


def assert_same(module: torch.nn.Module, layers: torch.nn.Module, *shape: int) -> None:
    """Equal values, gradients and running means, in float64."""
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, expected = module.double()(x), layers.double()(y)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    found.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, y.grad)
    for one, other in zip(module.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(list(module.buffers()), list(layers.buffers()))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4), (5, 3), (8, 8), (14, 14)])
@pytest.mark.parametrize("stride", [1, 2])
def test_separable_convolutions(size: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    module = SeparableConv(6, 10, stride)
    assert_same(module, torch.nn.Sequential(*copy.deepcopy(module)), 3, 6, *size)


def test_the_mean_comes_before_a_linear_map() -> None:
    torch.manual_seed(0)
    module = ConvProjector(OutputSpec(5, 8, (StageSpec(6, 32, "cnn"),), 224), 1, 8)
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert_same(module, torch.nn.Sequential(copy.deepcopy(module.layers), pool), 3, 6, 7, 7)
