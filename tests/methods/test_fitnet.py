"""FitNet against loops over images, channels and positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heterokd.methods._projectors import to_smaller_grid
from heterokd.methods.fitnet import FitNet, fitnet_loss
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec, Signal, StageSpec


def slow_pool(array: np.ndarray, side: int) -> np.ndarray:
    """Averages [B, C, H, H] over windows that end where the next begins, or overlap when H is no multiple of side."""
    B, C, H, _ = array.shape
    pooled = np.zeros((B, C, side, side))
    for i in range(side):
        for j in range(side):
            rows = slice(i * H // side, -(-(i + 1) * H // side))
            columns = slice(j * H // side, -(-(j + 1) * H // side))
            pooled[:, :, i, j] = array[:, :, rows, columns].mean(axis=(2, 3))
    return pooled


def slow_fitnet(student_maps, teacher_maps, regressors) -> float:
    total = 0.0
    for student_map, teacher_map, (weight, bias) in zip(student_maps, teacher_maps, regressors, strict=True):
        side = min(student_map.shape[2], teacher_map.shape[2])
        target = slow_pool(teacher_map, side)
        projected = np.zeros((len(student_map), len(weight), *student_map.shape[2:]))
        for channel in range(len(weight)):
            projected[:, channel] = bias[channel]
            for source in range(student_map.shape[1]):
                projected[:, channel] += weight[channel, source] * student_map[:, source]
        projected = slow_pool(projected, side)  # after the convolution here, before it in the method
        total += float(((projected - target) ** 2).mean())
    return total


def spec(channels: tuple[int, ...], strides: tuple[int, ...], kind: str) -> OutputSpec:
    stages = tuple(StageSpec(c, s, kind) for c, s in zip(channels, strides, strict=True))
    return OutputSpec(5, channels[-1], stages, 64)


SPECS = {
    "cnn": spec((4, 6, 8, 10), (4, 8, 16, 32), "cnn"),
    "attention": spec((7, 7, 7, 7), (16, 16, 16, 16), "attention"),
    "odd": spec((3, 5, 7, 9), (7, 14, 28, 64), "mlp"),
}


def maps_of(of: OutputSpec, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, stage.channels, of.side(i), of.side(i)) for i, stage in enumerate(of.stages, 1)]
    return tuple(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("stages", ["1234", "34", "2"])
@pytest.mark.parametrize("teacher", SPECS)
@pytest.mark.parametrize("student", SPECS)
def test_equals_loops(student: str, teacher: str, stages: str) -> None:
    method = FitNet(FitNet.Params(stages=stages, weight=0.7), SPECS[student], SPECS[teacher])
    student_maps, teacher_maps = maps_of(SPECS[student], 0), maps_of(SPECS[teacher], 1)
    batch = Batch(torch.empty(3, 3, 1, 1), torch.zeros(3, dtype=torch.long), torch.arange(3))
    terms = method(Outputs(stages=student_maps), Outputs(stages=teacher_maps), batch, 0.5)
    assert set(terms) == {"hint"}
    chosen = [int(digit) - 1 for digit in stages]
    regressors = [
        (layer.weight.detach().double().numpy()[:, :, 0, 0], layer.bias.detach().double().numpy())
        for layer in method.regressors.values()
    ]
    arrays = [[maps[i].detach().double().numpy() for i in chosen] for maps in (student_maps, teacher_maps)]
    assert terms["hint"].item() == pytest.approx(0.7 * slow_fitnet(*arrays, regressors), rel=1e-5)
    terms["hint"].backward()
    assert all((each.grad is not None) is (i in chosen) for i, each in enumerate(student_maps))
    assert all(each.grad is None for each in teacher_maps)


def test_equal_maps_cost_nothing() -> None:
    maps = maps_of(SPECS["cnn"], 0)
    assert fitnet_loss(maps, maps).item() == 0


def test_grids_of_one_position_and_grids_that_do_not_divide() -> None:
    one, seven, four = torch.randn(2, 3, 1, 1), torch.randn(2, 3, 7, 7), torch.randn(2, 3, 4, 4)
    assert fitnet_loss([one], [seven]).isfinite()
    small, large = to_smaller_grid(seven, four)
    assert small.shape == large.shape == (2, 3, 4, 4)
    torch.testing.assert_close(small.double().numpy(), slow_pool(seven.double().numpy(), 4), rtol=1e-5, atol=1e-6)
    assert large is four


# --- segmentation: the map before the classifier ----------------------------------------------------------------------


def test_segmentation_compares_the_positions_that_have_a_label() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 4, 4, 4, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 6, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (3, 4, 4), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORE
    labels[2] = IGNORE
    student_spec, teacher_spec = OutputSpec(3, 4, (), 64, logits_stride=16), OutputSpec(3, 6, (), 64, logits_stride=8)
    method = FitNet(FitNet.Params(weight=0.7), student_spec, teacher_spec)
    assert method.student_needs == method.teacher_needs == Signal.EMBEDDING
    fine = labels.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    batch = Batch(torch.empty(3, 3, 64, 64), fine, torch.arange(3))
    terms = method(Outputs(embedding=student), Outputs(embedding=teacher), batch, 0.5)
    target = slow_pool(teacher.double().numpy(), 4)
    weight, bias = (each.detach().double().numpy() for each in method.regressors["map"].parameters())
    total, count = 0.0, 0
    for b, i, j in np.ndindex(*labels.shape):
        if labels[b, i, j] != IGNORE:
            projected = weight[:, :, 0, 0] @ student[b, :, i, j].detach().double().numpy() + bias
            total += float(((projected - target[b, :, i, j]) ** 2).mean())
            count += 1
    assert terms["hint"].item() == pytest.approx(10 * 0.7 * total / count, rel=1e-5)
    terms["hint"].backward()
    assert student.grad is not None
    assert student.grad.transpose(0, 1)[:, labels == IGNORE].eq(0).all()


def test_published_weights_of_both_tasks() -> None:
    params = FitNet.Params()
    assert (params.weight, params.weight * params.segmentation_factor) == (1, 10)


def test_labels_everywhere_and_nowhere() -> None:
    maps, others = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    everywhere, nowhere = torch.zeros(2, 32, 32).long(), torch.full((2, 32, 32), IGNORE)
    torch.testing.assert_close(fitnet_loss([maps], [others], everywhere), fitnet_loss([maps], [others]))
    assert fitnet_loss([maps], [others], nowhere).item() == 0
