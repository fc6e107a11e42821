"""RSD against a float64 recomputation, one number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterokd.methods.rsd import RSD, cross_correlation, rsd_loss
from heterokd.outputs import Batch, Outputs, OutputSpec

STUDENT = OutputSpec(num_classes=10, embedding_dim=6, stages=())
TEACHER = OutputSpec(num_classes=10, embedding_dim=9, stages=())


def pearson(left: list[float], right: list[float]) -> float:
    left_mean, right_mean = sum(left) / len(left), sum(right) / len(right)
    product = left_square = right_square = 0.0
    for a, b in zip(left, right, strict=True):
        product += (a - left_mean) * (b - right_mean)
        left_square += (a - left_mean) ** 2
        right_square += (b - right_mean) ** 2
    return product / math.sqrt(left_square * right_square)


def slow_rsd(student: np.ndarray, teacher: np.ndarray, off_diagonal_weight: float) -> float:
    """The equation as it stands: sums."""
    total = 0.0
    for i in range(student.shape[1]):
        for j in range(teacher.shape[1]):
            entry = pearson(list(student[:, i]), list(teacher[:, j]))
            total += (entry - 1) ** 2 if i == j else off_diagonal_weight * entry**2
    return total


def embedding(batch_size: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(batch_size, dim, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def run(method: RSD, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    labels = torch.zeros(len(student), dtype=torch.long) if labels is None else labels
    batch = Batch(torch.zeros(len(student), 3, 4, 4), labels, torch.arange(len(student)))
    terms = method(Outputs(embedding=student), Outputs(embedding=teacher), batch, 0.0)
    assert terms.keys() == {"rsd"}
    return terms["rsd"]


@pytest.mark.parametrize("off_diagonal_weight", [5e-3, 0.1])
@pytest.mark.parametrize(("batch_size", "dim"), [(32, 8), (2, 8), (8, 24), (16, 1)])
def test_equals_the_formula(batch_size: int, dim: int, off_diagonal_weight: float) -> None:
    student, teacher = embedding(batch_size, dim, 0), embedding(batch_size, dim, 1)
    expected = slow_rsd(student.double().numpy(), teacher.double().numpy(), off_diagonal_weight)
    total = rsd_loss(student, teacher, off_diagonal_weight, "sum")
    assert total.item() == pytest.approx(expected, rel=1e-4)
    mean = rsd_loss(student, teacher, off_diagonal_weight, "mean")
    assert mean.item() == pytest.approx(expected / dim, rel=1e-4)


def test_cross_correlation_is_numpys() -> None:
    student, teacher = embedding(32, 5, 0), embedding(32, 7, 1)
    expected = np.corrcoef(student.double().numpy().T, teacher.double().numpy().T)[:5, 5:]
    np.testing.assert_allclose(cross_correlation(student, teacher).numpy(), expected, atol=1e-6)


def test_cross_correlation_stays_float32_under_autocast() -> None:
    student, teacher = embedding(32, 5, 0), embedding(32, 7, 1)
    exact = cross_correlation(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cross_correlation(student, teacher), exact)


def test_identical_uncorrelated_embeddings_give_zero() -> None:
    # Columns of a Hadamard matrix: mean 0, and orthogonal to one another.
    row = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    columns = torch.kron(torch.kron(row, row), row)[:, 1:]
    assert rsd_loss(columns, columns).item() == pytest.approx(0.0, abs=1e-6)
    assert rsd_loss(3 * columns + 5, columns).item() == pytest.approx(0.0, abs=1e-6)
    assert rsd_loss(-columns, columns).item() == pytest.approx(4.0 * 7, rel=1e-5)


def test_constant_dimensions_are_finite_and_pass_no_gradient() -> None:
    student, teacher = embedding(16, 4, 0), embedding(16, 4, 1)
    student[:, 0] = 3.0
    teacher[:, 2] = 0.0  # a dead ReLU
    student.requires_grad_()
    loss = rsd_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert torch.equal(student.grad[:, 0], torch.zeros(16))


def test_large_embeddings_stay_finite() -> None:
    student, teacher = (embedding(16, 8, 0) * 1e4).requires_grad_(), embedding(16, 8, 1) * 1e4
    loss = rsd_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(rsd_loss(embedding(16, 8, 0), embedding(16, 8, 1)).item(), rel=1e-4)
    assert torch.isfinite(student.grad).all()


def test_projector_is_linear_norm_gelu_linear() -> None:
    torch.manual_seed(0)
    method = RSD(RSD.Params(weight=2.0, off_diagonal_weight=0.01, hidden_dim=16, reduction="sum"), STUDENT, TEACHER)
    student, teacher = embedding(12, 6, 0), embedding(12, 9, 1)

    first, norm, _, last = method.projector
    hidden = student.double().numpy() @ first.weight.detach().double().numpy().T
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + norm.eps)
    hidden = np.vectorize(lambda value: 0.5 * value * (1 + math.erf(value / math.sqrt(2))))(hidden)
    projected = hidden @ last.weight.detach().double().numpy().T

    expected = 2.0 * slow_rsd(projected, teacher.double().numpy(), 0.01)
    assert run(method, student, teacher).item() == pytest.approx(expected, rel=1e-4)
    mixed = torch.rand(12, 10).softmax(dim=1)
    assert run(method, student, teacher, mixed).item() == pytest.approx(expected, rel=1e-4)


def test_defaults_are_those_of_the_authors_program() -> None:
    """Reference: `rsd_loss` of VISION-SJTU/RSD at commit be825ae, in float64, times its `--rsd-loss-weight`."""
    draw = torch.Generator().manual_seed(22)
    student, teacher = (torch.randn(128, 96, generator=draw, dtype=torch.float64) for _ in range(2))
    params = RSD.Params()
    loss = params.weight * rsd_loss(student, teacher, params.off_diagonal_weight, params.reduction)
    assert loss.item() == pytest.approx(9.91140821, rel=2e-5)


def test_projector_is_twice_as_wide_as_the_student() -> None:
    torch.manual_seed(0)
    wide = OutputSpec(num_classes=10, embedding_dim=256, stages=())
    first, norm, _, last = RSD(None, wide, TEACHER).projector
    assert (first.weight.shape, norm.num_features, last.weight.shape) == ((512, 256), 512, (9, 512))
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.05), "uniform weights of this width have 0.036"
    uniform, *_ = RSD(RSD.Params(initialisation="uniform"), wide, TEACHER).projector
    assert uniform.weight.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.05)
    assert RSD(RSD.Params(hidden_dim=7), wide, TEACHER).projector[0].out_features == 7


def test_batch_of_one_gives_zero() -> None:
    method = RSD(None, STUDENT, TEACHER)
    student = embedding(1, 6, 0).requires_grad_()
    loss = run(method, student, embedding(1, 9, 1))
    loss.backward()
    assert loss.item() == 0.0


def test_training_aligns_the_embeddings() -> None:
    """A student that sees a linear mix of what the teacher sees can be brought close by the projector alone."""
    torch.manual_seed(0)
    teacher = torch.randn(64, 4)
    student = teacher @ torch.randn(4, 6)
    spec = OutputSpec(num_classes=10, embedding_dim=4, stages=())
    method = RSD(RSD.Params(hidden_dim=32), STUDENT, spec)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    start = run(method, student, teacher).item()
    for _ in range(60):
        optimizer.zero_grad()
        run(method, student, teacher).backward()
        optimizer.step()
    assert run(method, student, teacher).item() < 0.1 * start
