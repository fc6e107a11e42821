"""AT against its two forms written out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterokd.errors import PairError
from heterokd.methods.at import AT, at_loss, attention_map
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec, Signal, StageSpec


def slow_attention(map_CHW: np.ndarray, power: float) -> list[float]:
    C, H, W = map_CHW.shape
    flat = [sum(abs(float(map_CHW[c, i, j])) ** power for c in range(C)) for i in range(H) for j in range(W)]
    length = math.sqrt(sum(value**2 for value in flat))
    return [value / length for value in flat]


def slow_at(student_maps, teacher_maps, power: float, form: str) -> float:
    """The maps of each stage already have one grid."""
    total = 0.0
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        for own, other in zip(student_map, teacher_map, strict=True):
            q_s, q_t = slow_attention(own, power), slow_attention(other, power)
            squares = sum((a - b) ** 2 for a, b in zip(q_s, q_t, strict=True))
            value = squares if form == "code" else math.sqrt(squares) / 2
            total += value / (len(q_s) * len(student_map))
    return total


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_equals_loops(power: float, form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(3, c, side, side, generator=generator) for c, side in ((4, 6), (8, 3), (5, 1))]
    teacher = [torch.randn(3, c, side, side, generator=generator) for c, side in ((7, 6), (2, 3), (5, 1))]
    expected = slow_at([each.numpy() for each in student], [each.numpy() for each in teacher], power, form)
    assert at_loss(student, teacher, power, form).item() == pytest.approx(expected, rel=1e-5)


def test_the_finer_map_is_averaged_before_the_power() -> None:
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    pooled = student.reshape(2, 3, 4, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(at_loss([student], [teacher]), at_loss([pooled], [teacher]))
    torch.testing.assert_close(at_loss([teacher], [student]), at_loss([teacher], [pooled]))


def test_scale_and_channels_do_not_matter() -> None:
    maps = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(attention_map(maps), attention_map(1e15 * maps[:, torch.randperm(6)]))
    assert at_loss([maps], [torch.cat((maps, maps), dim=1)]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("map_BCHW", [torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 1, 1), 1e30 * torch.randn(2, 3, 4, 4)])
def test_empty_single_and_huge_maps_stay_finite(map_BCHW: torch.Tensor, form: str, power: float) -> None:
    for target in (torch.randn(2, 5, 4, 4), map_BCHW.clone()):
        student = map_BCHW.clone().requires_grad_()
        loss = at_loss([student], [target], power, form)
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_the_teacher_takes_no_gradient() -> None:
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    at_loss([student], [teacher]).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_single_positions_everywhere_are_refused() -> None:
    stages = tuple(StageSpec(8, stride) for stride in (4, 8, 16, 32))
    small, large = OutputSpec(5, 8, stages, 32), OutputSpec(5, 8, stages, 224)
    AT(AT.Params(stages="34"), small, large)
    AT(AT.Params(stages="4"), large, large)
    with pytest.raises(PairError, match="one position"):
        AT(AT.Params(stages="4"), small, large)


# --- segmentation: the map before the classifier ----------------------------------------------------------------------


def map_outputs(channels: int, side: int, seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(embedding=torch.randn(3, channels, side, side, generator=generator))


def label_maps() -> torch.Tensor:
    """Patches as large as a position of an 8x8 map of 64x64 images; the last image has no label."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 3, (3, 8, 8), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORE
    labels[2] = IGNORE
    return labels


@pytest.mark.parametrize("form", ["code", "paper"])
def test_segmentation_compares_the_positions_that_have_a_label(form: str) -> None:
    student_spec, teacher_spec = (OutputSpec(3, dim, (), 64, logits_stride=8) for dim in (4, 7))
    method = AT(AT.Params(weight=2.0, form=form), student_spec, teacher_spec)
    assert method.student_needs == method.teacher_needs == Signal.EMBEDDING
    student, teacher, labels = map_outputs(4, 8, 0), map_outputs(7, 8, 1), label_maps()
    fine = labels.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    terms = method(student, teacher, Batch(torch.zeros(3, 3, 64, 64), fine, torch.arange(3)), 0.5)
    total, positions = 0.0, 0
    for b in range(2):  # the third has none
        kept = [each.embedding[b][:, labels[b] != IGNORE].unsqueeze(2).numpy() for each in (student, teacher)]
        q_s, q_t = (slow_attention(each, 2.0) for each in kept)
        squares = sum((x - y) ** 2 for x, y in zip(q_s, q_t, strict=True))
        total += squares if form == "code" else math.sqrt(squares) / (2 * len(q_s) * len(labels))
        positions += len(q_s)
    expected = total / positions if form == "code" else total
    assert terms["attention"].item() == pytest.approx(10 * 2.0 * expected, rel=1e-5)


def test_published_weights_of_both_tasks() -> None:
    params = AT.Params()
    assert (params.weight, params.weight * params.segmentation_factor) == (1000, 10000)


def test_labels_everywhere_equal_no_labels() -> None:
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    for form in ("code", "paper"):
        whole = at_loss([student], [teacher], 2.0, form)
        torch.testing.assert_close(at_loss([student], [teacher], 2.0, form, torch.zeros(2, 32, 32).long()), whole)


def test_a_decoder_of_one_position_is_refused() -> None:
    small, large = OutputSpec(3, 8, (), 16, logits_stride=16), OutputSpec(3, 8, (), 64, logits_stride=16)
    AT(None, large, large)
    with pytest.raises(PairError, match="larger images"):
        AT(None, small, large)
