"""PixelKD against a float64 recomputation, one pixel at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterokd.methods.pixel_kd import PixelKD, pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec


def slow_softmax(logits: np.ndarray, temperature: float) -> list[float]:
    top = max(logits)
    powers = [math.exp((value - top) / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def slow_pixel_kd(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, temperature: float, direction: str
) -> float:
    """Both logits [B, K, H, W] and the labels [B, H, W] on one grid."""
    B, _, H, W = student.shape
    total, count = 0.0, 0
    for b, i, j in np.ndindex(B, H, W):
        if labels is not None and labels[b, i, j] == IGNORE:
            continue
        left = slow_softmax(teacher[b, :, i, j].double().numpy(), temperature)
        right = slow_softmax(student[b, :, i, j].double().numpy(), temperature)
        if direction == "student_teacher":
            left, right = right, left
        total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(left, right, strict=True))
        count += 1
    return temperature**2 * total / max(count, 1)


def maps(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def label_map(*shape: int, num_classes: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORE
    return labels


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("batch_size", "num_classes"), [(3, 5), (1, 5), (2, 2)])
def test_equals_loops(batch_size: int, num_classes: int, temperature: float, direction: str) -> None:
    shape = (batch_size, num_classes, 4, 6)
    student, teacher = maps(*shape, seed=0), maps(*shape, seed=1)
    labels = label_map(batch_size, 4, 6, num_classes=num_classes)
    for used in (labels, None):
        expected = slow_pixel_kd(student, teacher, used, temperature, direction)
        assert pixel_kd_loss(student, teacher, used, temperature, direction).item() == pytest.approx(expected, rel=1e-5)


def test_unlike_grids() -> None:
    """A teacher twice as fine is read between pixels: the mean of the four that a student's pixel covers."""
    student, teacher = maps(2, 3, 4, 6, seed=0), maps(2, 3, 8, 12, seed=1)
    covered = teacher.reshape(2, 3, 4, 2, 6, 2).mean(dim=(3, 5))
    fine = label_map(2, 4, 6, num_classes=3).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    expected = slow_pixel_kd(student, covered, fine[:, ::8, ::8], 1.0, "teacher_student")
    assert pixel_kd_loss(student, teacher, fine).item() == pytest.approx(expected, rel=1e-5)
    assert pixel_kd_loss(teacher, student, fine).isfinite()


def test_ignored_pixels_and_the_teacher_take_no_gradient() -> None:
    student = maps(2, 3, 4, 4, seed=0).requires_grad_()
    teacher = maps(2, 3, 4, 4, seed=1).requires_grad_()
    labels = label_map(2, 4, 4, num_classes=3)
    pixel_kd_loss(student, teacher, labels).backward()
    assert teacher.grad is None
    ignored = (labels == IGNORE).unsqueeze(1).expand_as(student)
    assert student.grad is not None
    assert student.grad[ignored].eq(0).all()
    assert student.grad[~ignored].ne(0).any()


def test_equal_logits_no_labels_and_large_logits() -> None:
    student = maps(2, 3, 4, 4, seed=0)
    assert pixel_kd_loss(student, student + 3).item() == pytest.approx(0, abs=1e-6)
    nothing = torch.full((2, 4, 4), IGNORE)
    assert pixel_kd_loss(student, -student, nothing).item() == 0
    large = (6e4 * student.sign()).half().requires_grad_()
    loss = pixel_kd_loss(large, -large.detach())
    loss.backward()
    assert loss.isfinite()
    assert large.grad is not None
    assert large.grad.isfinite().all()


def test_term_is_weighted() -> None:
    spec = OutputSpec(3, 4, (), logits_stride=4)
    student, teacher = maps(2, 3, 4, 4, seed=0), maps(2, 3, 8, 8, seed=1)
    labels = label_map(2, 16, 16, num_classes=3)
    method = PixelKD(PixelKD.Params(temperature=2.0, weight=3.0), spec, spec)
    terms = method(
        Outputs(logits=student), Outputs(logits=teacher), Batch(torch.zeros(2, 3, 16, 16), labels, torch.arange(2)), 0.0
    )
    assert terms.keys() == {"kd"}
    torch.testing.assert_close(terms["kd"], 3 * pixel_kd_loss(student, teacher, labels, 2.0))
