"""MLDR-KD against a recomputation entry by entry."""

from __future__ import annotations

import math

import pytest
import torch

from heterokd.methods.conformance.random_pairs import STUDENTS, TEACHERS
from heterokd.methods.mldr_kd import MLDRKD, mldr_kd_loss
from heterokd.outputs import Batch, Outputs


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(teacher: list[float], student: list[float]) -> float:
    pairs = zip(softmax(teacher), softmax(student), strict=True)
    return sum(p * math.log(p / q) for p, q in pairs)


def slow(student: list[list[float]], teacher: list[list[float]], alpha: float) -> float:
    """Loops over images b, classes k and columns: the equations of the module's docstring."""
    images, classes = range(len(student)), range(len(student[0]))
    root = math.sqrt(len(classes))
    of_classes = [
        divergence([t[i] * t[j] / root for i in classes], [s[i] * s[j] / root for i in classes])
        for s, t in zip(student, teacher, strict=True)
        for j in classes
    ]
    of_images = [
        divergence(
            [teacher[a][k] * teacher[b][k] / root for a in images],
            [student[a][k] * student[b][k] / root for a in images],
        )
        for k in classes
        for b in images
    ]
    probabilities = [divergence(t, s) for s, t in zip(student, teacher, strict=True)]
    return sum(
        sum(values) / len(values) * weight
        for values, weight in ((of_classes, 1), (of_images, 1), (probabilities, alpha))
    )


@pytest.mark.parametrize(("images", "classes"), [(6, 4), (2, 7), (1, 3)])
def test_equals_the_formula(images: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(images, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = slow((student / 2).tolist(), (teacher / 2).tolist(), 3.0)
    assert mldr_kd_loss(student, teacher, 2.0, 3.0).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert mldr_kd_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_the_fused_logits_are_weighted_per_class_by_shares_that_sum_to_1() -> None:
    student, teacher = STUDENTS["cnn"], TEACHERS["hierarchical"]
    method = MLDRKD(None, student, teacher)
    stages = tuple(
        torch.randn(3, spec.channels, student.side(j), student.side(j)) for j, spec in enumerate(student.stages, 1)
    )
    logits = torch.randn(3, student.num_classes)
    for head in method.heads:  # every stage gives the same logits, so any shares give these
        torch.nn.init.zeros_(head.weight)
        with torch.no_grad():
            head.bias.copy_(torch.arange(student.num_classes).float())
    batch = Batch(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long), torch.arange(3))
    terms = method(
        Outputs(logits=logits, stages=stages), Outputs(logits=torch.randn(3, student.num_classes)), batch, 0.0
    )
    assert terms["stages"].item() == pytest.approx(4 * terms["fused"].item(), rel=1e-5)
