"""SRD against a recomputation number by number."""

from __future__ import annotations

import math
from statistics import fmean, pvariance

import pytest
import torch

from heterokd.methods.srd import BN_EPS, LOG_EPS, SRD, srd_loss
from heterokd.outputs import Batch, Outputs, OutputSpec


def standardised(column: list[float]) -> list[float]:
    return [(value - fmean(column)) / math.sqrt(pvariance(column) + BN_EPS) for value in column]


@pytest.mark.parametrize("form", ["difference", "correlation"])
def test_equals_the_formula(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for dim in range(5):
        g, h = standardised(student[:, dim].tolist()), standardised(teacher[:, dim].tolist())
        if form == "difference":
            total += sum(abs(a - b) ** 3 for a, b in zip(g, h, strict=True))
        else:
            total += abs(1 - fmean(a * b for a, b in zip(g, h, strict=True))) ** 3
    assert srd_loss(student, teacher, 3, form).item() == pytest.approx(math.log(total + LOG_EPS), rel=1e-5)


def test_equal_embeddings_and_a_single_image_have_a_finite_loss() -> None:
    same = torch.randn(4, 6)
    assert srd_loss(same, same).item() == pytest.approx(math.log(LOG_EPS), rel=1e-4)
    spec = OutputSpec(num_classes=3, embedding_dim=6, stages=())
    method = SRD(None, spec, spec)
    batch = Batch(torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.long), torch.arange(1))
    outputs = Outputs(embedding=same[:1], logits=torch.zeros(1, 3))
    assert method(outputs, outputs, batch, 0.0)["embedding"].item() == 0
