"""OFD's margin, its partial distance and its sum against loops over single numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heterokd.errors import PairError
from heterokd.methods._projectors import to_smaller_grid
from heterokd.methods.ofd import OFD, ofd_loss, partial_l2
from heterokd.outputs import OutputSpec, Signal, StageSpec


def slow_partial_l2(student: np.ndarray, teacher: np.ndarray, margin: np.ndarray) -> float:
    """The three cases of the authors' program, one number at a time; maps of one grid."""
    B, C, H, W = student.shape
    total = 0.0
    for b, c, i, j in np.ndindex(B, C, H, W):
        s, t, m = float(student[b, c, i, j]), float(teacher[b, c, i, j]), float(margin[c])
        if t > 0:
            total += (s - t) ** 2
        elif t > m:
            total += (s - t) ** 2 if s > t else 0.0
        else:
            total += (s - m) ** 2 if s > m else 0.0
    return total / B


def random_stage(channels: int, student_side: int, teacher_side: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(3, channels, student_side, student_side, generator=generator)
    teacher = torch.randn(3, channels, teacher_side, teacher_side, generator=generator)
    return student, teacher, -0.2 - torch.rand(channels, generator=generator)


def test_equals_loops_over_stages_of_any_grid() -> None:
    stages = [random_stage(3, 8, 8, 0), random_stage(5, 6, 4, 1), random_stage(4, 3, 5, 2), random_stage(7, 1, 2, 3)]
    expected = 0.0
    for number, (student, teacher, margin) in enumerate(stages, start=1):
        pooled, target = (each.double().numpy() for each in to_smaller_grid(student, teacher))
        expected += slow_partial_l2(pooled, target, margin.double().numpy()) / 2 ** (4 - number)
    assert ofd_loss(*zip(*stages, strict=True)).item() == pytest.approx(expected, rel=1e-5)


def test_each_case_of_the_distance() -> None:
    margin = torch.tensor([-1.0])
    for s, t, expected in (
        (2.0, 0.5, 2.25),  # the teacher is active: both directions count
        (-2.0, 0.5, 6.25),
        (0.5, -0.5, 1.0),  # silent, above the margin: only more activity than the teacher's counts
        (-0.7, -0.5, 0.0),
        (0.5, -3.0, 2.25),  # silent, below the margin: the margin is low enough
        (-0.5, -3.0, 0.25),
        (-1.5, -3.0, 0.0),
    ):
        maps = (torch.full((1, 1, 1, 1), value) for value in (s, t))
        assert partial_l2(*maps, margin).item() == pytest.approx(expected)


def spec(serves: Signal, channels: tuple[int, ...] = (4, 6, 8, 10), kind: str = "cnn") -> OutputSpec:
    stages = tuple(StageSpec(c, s, kind) for c, s in zip(channels, (4, 8, 16, 32), strict=True))
    return OutputSpec(5, channels[-1], stages, 32, serves=serves)


PLAIN = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.TAIL


def test_reads_the_student_before_its_relu_where_it_has_one() -> None:
    teacher = spec(PLAIN | Signal.PRE_ACTIVATIONS, (5, 7, 9, 11))
    assert OFD(None, spec(PLAIN), teacher).student_needs == Signal.STAGES
    assert OFD(None, spec(PLAIN | Signal.PRE_ACTIVATIONS), teacher).student_needs == Signal.PRE_ACTIVATIONS


def test_a_teacher_without_that_relu_is_refused() -> None:
    with pytest.raises(PairError, match="before a ReLU that follows batch norm; this attention teacher has none"):
        OFD(None, spec(PLAIN), spec(PLAIN, kind="attention"))


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, margin = (each.requires_grad_() for each in random_stage(3, 4, 4, 0))
    ofd_loss([student], [teacher], [margin]).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert margin.grad is None
