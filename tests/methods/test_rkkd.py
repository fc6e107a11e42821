"""RKKD against a float64 recomputation, one pair of classes at a time, and the memory it promises."""

from __future__ import annotations

import math
import resource
from multiprocessing.queues import Queue

import numpy as np
import pytest
import torch
from processes import CONTEXT, exit_code

from heterokd.methods import rkkd
from heterokd.methods.kd import kd_loss
from heterokd.methods.rkkd import RKKD, blocks, rank_loss, rkkd_loss
from heterokd.outputs import Batch, Outputs, OutputSpec


def slow_rank(student: np.ndarray, teacher: np.ndarray, steepness: float) -> tuple[float, np.ndarray]:
    """The term and its gradient, two loops over the classes."""
    batch_size, num_classes = student.shape
    total, gradient = 0.0, np.zeros(student.shape)
    for row in range(batch_size):
        concordance = 0.0
        for i in range(num_classes):
            for j in range(i + 1, num_classes):
                one = math.tanh(steepness * (student[row, i] - student[row, j]))
                other = math.tanh(steepness * (teacher[row, i] - teacher[row, j]))
                concordance += one * other
                slope = steepness * (1 - one**2) * other
                gradient[row, i] -= slope
                gradient[row, j] += slope
        total += 1 - 2 / (num_classes * (num_classes - 1)) * concordance
    return total / batch_size, gradient * 2 / (num_classes * (num_classes - 1)) / batch_size


def logits(batch_size: int, num_classes: int, seed: int) -> torch.Tensor:
    return torch.randn(batch_size, num_classes, generator=torch.Generator().manual_seed(seed)) * 2


SPEC = OutputSpec(num_classes=10, embedding_dim=4, stages=())


@pytest.mark.parametrize("block", [7, 64, rkkd.CPU_BLOCK], ids="block of {}".format)
@pytest.mark.parametrize("steepness", [0.3, 1.0])
@pytest.mark.parametrize(("batch_size", "num_classes"), [(16, 10), (1, 10), (8, 3), (8, 2), (2, 100)])
def test_value_and_gradient_equal_the_formula(batch_size: int, num_classes: int, steepness: float, block: int) -> None:
    student, teacher = logits(batch_size, num_classes, 0).requires_grad_(), logits(batch_size, num_classes, 1)
    teacher.requires_grad_()
    expected, gradient = slow_rank(student.detach().double().numpy(), teacher.detach().double().numpy(), steepness)
    loss = rank_loss(student, teacher, steepness, block)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), 3 * gradient, rtol=1e-3, atol=1e-6)
    assert teacher.grad is None


def test_is_kendalls_tau_when_steep() -> None:
    """Against the definition: concordant pairs minus discordant ones, over all."""
    student, teacher = logits(4, 12, 0), logits(4, 12, 1)
    taus = []
    for row in range(4):
        pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
        signs = [
            torch.sign((student[row, i] - student[row, j]) * (teacher[row, i] - teacher[row, j])) for i, j in pairs
        ]
        taus.append(sum(signs).item() / len(pairs))
    assert rank_loss(student, teacher, 1e5).item() == pytest.approx(1 - np.mean(taus), abs=1e-5)


def test_same_opposite_and_no_order() -> None:
    order = torch.arange(10.0).repeat(4, 1)
    assert rank_loss(order, 2 * order + 1, 20.0).item() == pytest.approx(0.0, abs=1e-5)
    assert rank_loss(order, -order, 20.0).item() == pytest.approx(2.0, abs=1e-5)
    assert rank_loss(torch.zeros(4, 10), order, 20.0).item() == pytest.approx(1.0, abs=1e-5)


def test_identical_networks_are_still_spread() -> None:
    """Finite k: the term of an identical student is above 0 and its gradient widens the logits."""
    student = logits(4, 10, 0).requires_grad_()
    loss = rkkd_loss(student, student.detach())
    loss.backward()
    assert 0 < loss.item() < 1
    assert (student.grad * student.detach()).sum() < 0


def test_blocks_cover_every_pair_once_and_are_bounded() -> None:
    for batch_size, num_classes in ((64, 1000), (1, 2), (3, 21_841), (256, 100), (5, 5_000)):
        for size in (rkkd.BLOCK, rkkd.CPU_BLOCK):
            covered = np.zeros((batch_size, num_classes), dtype=int)
            for images, rows in blocks(batch_size, num_classes, size):
                covered[images, rows] += 1
                assert len(range(batch_size)[images]) * len(range(num_classes)[rows]) * num_classes <= size
            assert (covered == 1).all()


def measure_memory(answers: Queue[float]) -> None:
    """MiB that a large batch takes beyond a small one."""

    def step(batch_size: int, num_classes: int) -> int:
        student = torch.randn(batch_size, num_classes, requires_grad=True)
        rank_loss(student, torch.randn(batch_size, num_classes), block=rkkd.BLOCK).backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    small = step(4, 10)
    answers.put((step(64, 1000) - small) / 1024)


def test_memory_stays_bounded() -> None:
    """64 images of 1000 classes, in a GPU's blocks: one tensor of all pairs alone would take 256 MB."""
    answers = CONTEXT.Queue()
    assert exit_code(measure_memory, answers) == 0
    bound, needed = rkkd.LIVE_TENSORS * rkkd.BLOCK * 4 / 2**20, answers.get(timeout=10)
    assert needed < bound + 16, f"{needed} MiB"


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("student_sign", [1.0, -1.0, 0.0])
def test_large_and_equal_logits_stay_finite(num_classes: int, student_sign: float) -> None:
    teacher = torch.linspace(-1e4, 1e4, num_classes).repeat(4, 1)
    student = (student_sign * teacher).requires_grad_()
    loss = rkkd_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_bfloat16_is_computed_in_float32() -> None:
    student, teacher = logits(8, 10, 0).bfloat16().requires_grad_(), logits(8, 10, 1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rkkd_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, rkkd_loss(student.float(), teacher.float()))


def test_terms_are_weighted() -> None:
    student, teacher = logits(8, 10, 0), logits(8, 10, 1)
    method = RKKD(RKKD.Params(temperature=2.0, weight=3.0, rank_weight=5.0, steepness=0.5), SPEC, SPEC)
    batch = Batch(torch.zeros(8, 3, 4, 4), torch.arange(8), torch.arange(8))
    terms = method(Outputs(logits=student), Outputs(logits=teacher), batch, 0.5)
    assert terms.keys() == {"kd", "rank"}
    torch.testing.assert_close(terms["kd"], 3 * kd_loss(student, teacher, 2.0))
    torch.testing.assert_close(terms["rank"], 5 * rank_loss(student, teacher, 0.5))
    torch.testing.assert_close(sum(terms.values()), rkkd_loss(student, teacher, 0.5, 3.0, 5.0, 2.0))
