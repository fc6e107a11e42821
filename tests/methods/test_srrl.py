"""SRRL: the teacher's classifier on projected features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from heterokd.methods.srrl import SRRL, feature_mean_loss
from heterokd.outputs import EVERY_NETWORK, Batch, Outputs, OutputSpec, Signal, StageSpec


class Classifier(nn.Module):
    """A teacher's tail: the mean over positions, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, j: int) -> Tensor:
        assert j == 5
        return self.head(x.mean(dim=(2, 3)))


def specs(teacher_serves: Signal) -> tuple[OutputSpec, OutputSpec]:
    student = OutputSpec(3, 4, (StageSpec(4, 32),) * 4, image_size=64)
    return student, OutputSpec(3, 6, (StageSpec(6, 16),) * 4, image_size=64, serves=teacher_serves)


@pytest.mark.parametrize("serves", [EVERY_NETWORK, EVERY_NETWORK | Signal.PRE_ACTIVATIONS])
def test_a_student_with_the_teachers_features_has_no_loss(serves: Signal) -> None:
    student, teacher = specs(serves)
    method, tail = SRRL(None, student, teacher).eval(), Classifier()
    maps = torch.randn(2, 4, 2, 2)
    target = nn.functional.interpolate(method.projector(maps), size=(4, 4), mode="bilinear").detach()
    target = (
        target - target.mean(dim=(2, 3), keepdim=True) + method.projector(maps).mean(dim=(2, 3), keepdim=True).detach()
    )
    outputs = Outputs(logits=tail(target, 5), stages=(target,) * 4, tail=tail)
    batch = Batch(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long), torch.arange(2))
    terms = method(Outputs(stages=(maps,) * 4), outputs, batch, 0.0)
    assert terms["feature"].item() == pytest.approx(0, abs=1e-10)
    assert bool((method.projector(maps) < 0).any()) == (
        serves == EVERY_NETWORK
    )  # rectified where the teacher's features are


def test_feature_means() -> None:
    student, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 4, 4)
    gaps = [
        (sum(student[b, c].flatten().tolist()) / 4 - sum(teacher[b, c].flatten().tolist()) / 16) ** 2
        for b in range(2)
        for c in range(3)
    ]
    assert feature_mean_loss(student, teacher).item() == pytest.approx(sum(gaps) / 6, rel=1e-5)
