"""VkD: its term against a recomputation, and a projection that stays orthogonal."""

from __future__ import annotations

from statistics import fmean, pvariance

import pytest
import torch

from heterokd.methods.vkd import VkD, vkd_loss
from heterokd.outputs import Batch, Outputs, OutputSpec


def test_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    total = []
    for row, target in zip(student.tolist(), teacher.tolist(), strict=True):
        centre, scale = fmean(target), (pvariance(target) + 1e-5) ** 0.5
        for value, goal in zip(row, target, strict=True):
            gap = abs(value - (goal - centre) / scale)
            total.append(gap - 0.5 if gap > 1 else gap**2 / 2)
    assert vkd_loss(student, teacher).item() == pytest.approx(fmean(total), rel=1e-5)


@pytest.mark.parametrize(("student_dim", "teacher_dim"), [(5, 9), (9, 5), (6, 6)])
def test_the_projection_stays_orthogonal_while_it_learns(student_dim: int, teacher_dim: int) -> None:
    student, teacher = (OutputSpec(num_classes=3, embedding_dim=dim, stages=()) for dim in (student_dim, teacher_dim))
    method = VkD(None, student, teacher)
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1, weight_decay=0.1)
    batch = Batch(torch.zeros(8, 3, 4, 4), torch.zeros(8, dtype=torch.long), torch.arange(8))
    inputs = Outputs(embedding=torch.randn(8, student_dim), logits=torch.randn(8, 3))
    goal = Outputs(embedding=torch.randn(8, teacher_dim), logits=torch.randn(8, 3))
    before = method.projector.matrix().detach()
    for _ in range(3):
        optimizer.zero_grad()
        method(inputs, goal, batch, 0.0)["embedding"].backward()
        optimizer.step()
    assert not torch.allclose(method.projector.matrix(), before, atol=1e-2)
    values = torch.linalg.svdvals(method.projector.matrix())
    torch.testing.assert_close(values, torch.ones_like(values))
