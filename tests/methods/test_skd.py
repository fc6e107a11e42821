"""SKD's pair-wise term against all pairs of positions in loops, and the discriminator that it shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterokd.methods._discriminator import FIRST_GATE, Discriminator, discriminator_loss, generator_loss
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.methods.skd import SKD, pairwise_loss, skd_loss
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec


def slow_pool(map_DHW: np.ndarray, pool: int) -> np.ndarray:
    """Largest value of each window; the last windows may be narrower."""
    D, H, W = map_DHW.shape
    pooled = np.zeros((D, -(-H // pool), -(-W // pool)))
    for i, j in np.ndindex(pooled.shape[1:]):
        pooled[:, i, j] = map_DHW[:, i * pool : (i + 1) * pool, j * pool : (j + 1) * pool].max(axis=(1, 2))
    return pooled


def slow_pairwise(student: torch.Tensor, teacher: torch.Tensor, valid: np.ndarray | None, pool: int) -> float:
    """Maps of one grid, [B, D, H, W]; `valid` [B, h, w] on the pooled grid."""
    total, count = 0.0, 0
    for b in range(len(student)):
        pooled = [slow_pool(each[b].double().numpy(), pool) for each in (student, teacher)]
        places = [place for place in np.ndindex(pooled[0].shape[1:]) if valid is None or valid[b][place]]
        for one in places:
            for two in places:
                cosines = []
                for each in pooled:
                    left, right = each[:, *one], each[:, *two]
                    lengths = math.sqrt(float(left @ left)) * math.sqrt(float(right @ right))
                    cosines.append(float(left @ right) / lengths)
                total += (cosines[0] - cosines[1]) ** 2
                count += 1
    return total / max(count, 1)


def maps(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "height", "width"), [(2, 6, 4), (1, 5, 7)])
def test_equals_loops(batch_size: int, height: int, width: int, pool: int) -> None:
    student, teacher = maps(batch_size, 3, height, width, seed=0), maps(batch_size, 8, height, width, seed=1)
    expected = slow_pairwise(student, teacher, None, pool)
    assert pairwise_loss(student, teacher, pool=pool).item() == pytest.approx(expected, abs=1e-6)


def test_ignored_positions_are_in_no_pair() -> None:
    student, teacher = maps(3, 4, 6, 6, seed=0), maps(3, 5, 6, 6, seed=1)
    coarse = torch.randint(0, 2, (3, 3, 3), generator=torch.Generator().manual_seed(2))
    coarse[coarse == 1] = IGNORE
    coarse[2] = IGNORE
    labels = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    expected = slow_pairwise(student, teacher, (coarse != IGNORE).numpy(), 2)
    assert pairwise_loss(student, teacher, labels).item() == pytest.approx(expected, abs=1e-6)
    changed = student.clone()
    changed[2] = 0
    assert pairwise_loss(changed, teacher, labels).item() == pytest.approx(expected, abs=1e-6)


def test_unlike_grids_are_averaged() -> None:
    student, teacher = maps(2, 3, 4, 4, seed=0), maps(2, 5, 8, 8, seed=1)
    averaged = teacher.reshape(2, 5, 4, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(pairwise_loss(student, teacher), pairwise_loss(student, averaged))
    torch.testing.assert_close(pairwise_loss(teacher, student), pairwise_loss(averaged, student))


def test_equal_scaled_empty_and_huge_maps() -> None:
    student = maps(2, 6, 8, 8, seed=0)
    assert pairwise_loss(student, 7 * student).item() == pytest.approx(0, abs=1e-6)
    assert pairwise_loss(student, maps(2, 6, 8, 8, seed=1), torch.full((2, 8, 8), IGNORE)).item() == 0
    for extreme in (torch.zeros(2, 6, 8, 8), 6e4 * student.sign(), 1e-20 * student):
        leaf = extreme.clone().requires_grad_()
        loss = pairwise_loss(leaf, student)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def spec(stride: int, side: int = 64, dim: int = 6, num_classes: int = 4) -> OutputSpec:
    return OutputSpec(num_classes, dim, (), side, logits_stride=stride)


def outputs(of: OutputSpec, seed: int, leaf: bool = False) -> Outputs:
    side = of.image_size // (of.logits_stride or 1)
    return Outputs(
        logits=maps(2, of.num_classes, side, side, seed=seed).requires_grad_(leaf),
        embedding=maps(2, of.embedding_dim, side, side, seed=seed + 10).requires_grad_(leaf),
    )


BATCH = Batch(torch.zeros(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64)), torch.arange(2))


def test_terms_with_and_without_a_discriminator() -> None:
    student, teacher = outputs(spec(8), 0), outputs(spec(4, dim=9), 1)
    plain = SKD(SKD.Params(adversarial_weight=0, kd_weight=2, pairwise_weight=3), spec(8), spec(4, dim=9))
    assert not list(plain.parameters())
    terms = plain(student, teacher, BATCH, 0.5)
    assert terms.keys() == {"kd", "pairwise"}
    torch.testing.assert_close(terms["kd"], 2 * pixel_kd_loss(student.logits, teacher.logits, BATCH.labels))
    arguments = student.embedding, teacher.embedding, student.logits, teacher.logits, BATCH.labels
    expected = skd_loss(*arguments, kd_weight=2, pairwise_weight=3)
    torch.testing.assert_close(sum(terms.values()), expected)
    full = SKD(None, spec(8), spec(4, dim=9))(student, teacher, BATCH, 0.5)
    assert full.keys() == {"kd", "pairwise", "generator", "discriminator"}


# --- the discriminator ----------------------------------------------------------------------------------------------


def test_hinge_by_hand() -> None:
    student, teacher = torch.tensor([-2.0, -0.5, 1.0, 0.0]), torch.tensor([2.0, 0.5, -1.0, 1.0])
    assert discriminator_loss(student, teacher).item() == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 0.5 + 2 + 1) / 4)
    assert generator_loss(student).item() == pytest.approx(1.5 / 4)


def test_each_term_trains_its_own_side_alone() -> None:
    judge = Discriminator(spec(8))
    student, teacher = outputs(spec(8), 0, leaf=True).logits, outputs(spec(4), 1, leaf=True).logits
    generator, own = judge.losses(student, teacher, BATCH.labels)
    generator.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in judge.parameters())
    student.grad = None
    own.backward()
    assert student.grad is None
    assert teacher.grad is None
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in judge.parameters())


def test_it_learns_to_tell_them_and_the_generator_to_mislead_it() -> None:
    torch.manual_seed(0)
    judge = Discriminator(spec(8), width=8)
    student = maps(2, 4, 8, 8, seed=0).requires_grad_()
    teacher = 3 * maps(2, 4, 8, 8, seed=1).relu()
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        own = judge.losses(student, teacher, BATCH.labels)[1]
        own.backward()
        optimizer.step()
        first = own.item() if first is None else first
    assert own.item() < 0.5 * first
    judge.eval()
    before, _ = judge.losses(student, teacher, BATCH.labels)
    before.backward()
    with torch.no_grad():
        student -= 0.1 * student.grad / student.grad.norm()
    assert judge.losses(student, teacher, BATCH.labels)[0] < before


@pytest.mark.parametrize(
    ("side", "stride", "halvings"), [(512, 8, 4), (512, 4, 4), (256, 8, 3), (64, 8, 1), (32, 32, 1)]
)
def test_depth_follows_the_grid_and_any_grid_is_taken(side: int, stride: int, halvings: int) -> None:
    judge = Discriminator(spec(stride, side), width=8)
    convolutions = [layer for layer in judge.layers if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == halvings + 1
    for size in ((1, 1), (3, 9), (64, 128)):
        assert judge(maps(1, 4, *size, seed=0)).isfinite().all()


def test_ignored_pixels_are_not_judged() -> None:
    judge = Discriminator(spec(8), width=8).eval()
    labels = BATCH.labels.clone()
    labels[:, :32] = IGNORE
    student, teacher = outputs(spec(8), 0, leaf=True).logits, outputs(spec(8), 1).logits
    generator, own = judge.losses(student, teacher, labels)
    generator.backward()
    assert student.grad is not None
    assert student.grad[:, :, :4].eq(0).all()
    assert student.grad[:, :, 4:].ne(0).any()
    changed = teacher.clone()
    changed[:, :, :4] = 100
    torch.testing.assert_close(judge.losses(student, changed, labels)[1], own)


def test_weights_are_spectrally_normalised() -> None:
    judge = Discriminator(spec(8, 512), width=8)
    for _ in range(20):
        judge(maps(1, 4, 64, 64, seed=0))
    judge.eval()
    for layer in judge.layers:
        if isinstance(layer, torch.nn.Conv2d) and layer.out_channels > 1:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.05)
    assert all(layer.gate.item() == pytest.approx(FIRST_GATE) for layer in judge.layers if hasattr(layer, "gate"))
