"""TeKAP against a float64 recomputation, one number at a time, and its noise against what noise has to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterokd.methods.kd import kd_loss
from heterokd.methods.tekap import TeKAP, normal_noise, perturb, perturbed_loss, tekap_loss
from heterokd.outputs import Batch, Outputs, OutputSpec


def softmax(logits: np.ndarray, temperature: float) -> list[float]:
    top = max(logits)
    powers = [math.exp((value - top) / temperature) for value in logits]
    total = sum(powers)
    return [power / total for power in powers]


def slow_kd(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        shares = softmax(student_row, temperature), softmax(teacher_row, temperature)
        total += sum(t * (math.log(t) - math.log(s)) for s, t in zip(*shares, strict=True))
    return temperature**2 * total / len(student)


def logits(batch_size: int, num_classes: int, seed: int) -> torch.Tensor:
    return torch.randn(batch_size, num_classes, generator=torch.Generator().manual_seed(seed)) * 3


SPEC = OutputSpec(num_classes=10, embedding_dim=4, stages=())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(("batch_size", "num_classes"), [(16, 10), (1, 10), (8, 2), (4, 1000)])
def test_equals_the_formula(batch_size: int, num_classes: int, copies: int, temperature: float) -> None:
    student, teacher = logits(batch_size, num_classes, 0), logits(batch_size, num_classes, 1)
    noise = normal_noise(torch.arange(batch_size), 0.5, copies, num_classes)
    assert noise.shape == (copies, batch_size, num_classes)
    students, teachers = student.double().numpy(), teacher.double().numpy()
    perturbed = sum(slow_kd(students, 0.9 * teachers + 0.1 * one, temperature) for one in noise.double().numpy())
    expected = 0.9 * slow_kd(students, teachers, temperature) + 0.72 * perturbed
    loss = tekap_loss(student, teacher, noise, 0.1, 0.9, 0.72, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_gradient_equals_differences_of_the_formula() -> None:
    student, teacher = logits(2, 5, 0).requires_grad_(), logits(2, 5, 1).requires_grad_()
    noise = normal_noise(torch.arange(2), 0.5, 3, 5)
    tekap_loss(student, teacher, noise).backward()
    assert teacher.grad is None
    teachers = [teacher.detach().double().numpy()]
    teachers += [0.9 * teachers[0] + 0.1 * one for one in noise.double().numpy()]
    for row in range(2):
        for column in range(5):
            ends = []
            for sign in (1, -1):
                moved = student.detach().double().numpy().copy()
                moved[row, column] += sign * 1e-5
                ends.append(0.9 * slow_kd(moved, teachers[0], 4.0))
                ends[-1] += 0.72 * sum(slow_kd(moved, one, 4.0) for one in teachers[1:])
            assert student.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-4)


def test_without_noise_the_copies_are_the_teacher() -> None:
    student, teacher = logits(8, 10, 0), logits(8, 10, 1)
    copies = perturb(teacher, normal_noise(torch.arange(8), 0.0, 3, 10), 0.0)
    torch.testing.assert_close(perturbed_loss(student, copies), 3 * kd_loss(student, teacher, 4.0))
    assert perturbed_loss(teacher, copies).item() == pytest.approx(0.0, abs=1e-5)


# --- the noise -----------------------------------------------------------------------------------------------------


def test_noise_is_standard_normal_and_independent() -> None:
    """Moments, tails and the shares of tenths, each within five standard errors; all pairs of neighbours unrelated."""
    noise = normal_noise(torch.arange(1000), 0.3, 3, 100).double()
    count = noise.numel()
    assert abs(noise.mean().item()) < 5 / math.sqrt(count)
    assert abs(noise.var().item() - 1) < 5 * math.sqrt(2 / count)
    assert abs(noise.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / count)
    tenths = torch.histc(torch.special.ndtr(noise), bins=10, min=0, max=1) / count
    assert (tenths - 0.1).abs().max().item() < 5 * math.sqrt(0.09 / count)
    for one, other in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[:, :, 1:], noise[:, :, :-1])):
        assert abs((one * other).mean().item()) < 5 / math.sqrt(one.numel())
    later = normal_noise(torch.arange(1000), 0.3 + 1e-8, 3, 100).double()
    assert abs((noise * later).mean().item()) < 5 / math.sqrt(count)


def test_noise_belongs_to_the_image_and_the_step_and_not_to_the_batch() -> None:
    index = torch.tensor([7, 0, 123_456, 2])
    noise = normal_noise(index, 0.25, 3, 10)
    assert torch.equal(normal_noise(index.flip(0), 0.25, 3, 10), noise.flip(1))
    assert torch.equal(normal_noise(index[:1], 0.25, 3, 10), noise[:, :1])
    torch.manual_seed(1)
    assert torch.equal(normal_noise(index, 0.25, 3, 10), noise)
    for other in (normal_noise(index + 1, 0.25, 3, 10), normal_noise(index, 0.5, 3, 10)):
        assert not torch.isclose(other, noise).any()


def test_noise_is_finite_and_new_at_every_step_of_a_long_training() -> None:
    seen = [normal_noise(torch.tensor([0]), step / 100_000, 1, 2)[0, 0].tolist() for step in range(2000)]
    assert len({tuple(row) for row in seen}) == len(seen)
    assert all(math.isfinite(value) for row in seen for value in row)
    assert torch.isfinite(normal_noise(torch.tensor([0, 2**31, 2**40]), 1.0, 3, 1000)).all()


# --- the method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("student_sign", [1.0, -1.0, 0.0])
def test_large_logits_stay_finite(num_classes: int, student_sign: float) -> None:
    teacher = torch.linspace(-1e4, 1e4, num_classes).repeat(4, 1)
    student = (student_sign * teacher).requires_grad_()
    loss = tekap_loss(student, teacher, normal_noise(torch.arange(4), 0.0, 3, num_classes))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_bfloat16_is_computed_in_float32() -> None:
    student, teacher = logits(8, 10, 0).bfloat16(), logits(8, 10, 1).bfloat16()
    noise = normal_noise(torch.arange(8), 0.0, 3, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tekap_loss(student, teacher, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, tekap_loss(student.float(), teacher.float(), noise))


def test_terms_are_weighted_and_follow_index_and_progress() -> None:
    student, teacher = logits(8, 10, 0), logits(8, 10, 1)
    params = TeKAP.Params(temperature=2.0, weight=3.0, perturbed_weight=5.0, noise_share=0.2, copies=2)
    method = TeKAP(params, SPEC, SPEC)
    batch = Batch(torch.zeros(8, 3, 4, 4), torch.arange(8), torch.arange(8) + 40)
    terms = method(Outputs(logits=student), Outputs(logits=teacher), batch, 0.5)
    assert terms.keys() == {"kd", "perturbed"}
    copies = perturb(teacher, normal_noise(batch.index, 0.5, 2, 10), 0.2)
    torch.testing.assert_close(terms["kd"], 3 * kd_loss(student, teacher, 2.0))
    torch.testing.assert_close(terms["perturbed"], 5 * perturbed_loss(student, copies, 2.0))
    later = method(Outputs(logits=student), Outputs(logits=teacher), batch, 0.6)
    assert later["perturbed"] != terms["perturbed"]
