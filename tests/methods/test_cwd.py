"""CWD's channel-wise term against loops over images, channels and positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from heterokd.methods.cwd import CWD, channel_wise_loss, cwd_loss
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec


def slow_channel_wise(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, temperature: float
) -> float:
    """Maps [B, C, H, W] and labels [B, H, W] of one grid."""
    B, C, H, W = student.shape
    total, images = 0.0, 0
    for b in range(B):
        places = [place for place in np.ndindex(H, W) if labels is None or labels[b][place] != IGNORE]
        images += bool(places)
        for c in range(C if places else 0):
            shares = []
            for each in (student, teacher):
                values = [float(each[b, c][place]) / temperature for place in places]
                powers = [math.exp(value - max(values)) for value in values]
                shares.append([power / sum(powers) for power in powers])
            total += sum(t * (math.log(t) - math.log(s)) for s, t in zip(*shares, strict=True))
    return temperature**2 * total / (max(images, 1) * C)


def maps(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def label_map(*shape: int, num_classes: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORE
    return labels


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("batch_size", "channels"), [(3, 5), (1, 4), (2, 1)])
def test_equals_loops(batch_size: int, channels: int, temperature: float) -> None:
    student, teacher = maps(batch_size, channels, 4, 5, seed=0), maps(batch_size, channels, 4, 5, seed=1)
    labels = label_map(batch_size, 4, 5, num_classes=3)
    if batch_size > 1:
        labels[0] = IGNORE
    for used in (labels, None):
        expected = slow_channel_wise(student, teacher, used, temperature)
        assert channel_wise_loss(student, teacher, used, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_one_channel_of_two_positions_by_hand() -> None:
    # Teacher 3:1, student 1:1 at T = 1: KL = 0.75 ln(0.75 / 0.5) + 0.25 ln(0.25 / 0.5).
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[math.log(3.0), 0.0]]]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert channel_wise_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)


def test_unlike_grids_and_labels_at_image_size() -> None:
    student, teacher = maps(2, 6, 4, 4, seed=0), maps(2, 6, 8, 8, seed=1)
    coarse = label_map(2, 4, 4, num_classes=3)
    fine = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    averaged = teacher.reshape(2, 6, 4, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(channel_wise_loss(student, teacher, fine), channel_wise_loss(student, averaged, coarse))


def test_equal_shifted_and_unlabelled_maps_cost_nothing() -> None:
    student, teacher = maps(2, 6, 4, 4, seed=0), maps(2, 6, 4, 4, seed=1)
    labels = label_map(2, 4, 4, num_classes=3)
    shift = torch.arange(6.0).reshape(1, 6, 1, 1)
    for used in (labels, None):
        assert channel_wise_loss(student, student + shift, used).item() == pytest.approx(0, abs=1e-5)
    assert channel_wise_loss(student, teacher, torch.full_like(labels, IGNORE)).item() == 0


def test_ignored_positions_take_no_gradient_and_huge_maps_stay_finite() -> None:
    base = maps(3, 6, 4, 4, seed=0)
    labels = label_map(3, 4, 4, num_classes=3)
    labels[2] = IGNORE
    for student in (base, (6e4 * base.sign()).half(), 1e30 * base):
        leaf = student.clone().requires_grad_()
        loss = channel_wise_loss(leaf, maps(3, 6, 4, 4, seed=1), labels)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.transpose(0, 1)[:, labels == IGNORE].eq(0).all()


def test_convolution_only_between_unlike_channels() -> None:
    of, other = OutputSpec(3, 6, (), 32, logits_stride=8), OutputSpec(3, 9, (), 32, logits_stride=4)
    none = CWD.Params(adversarial_weight=0)
    assert isinstance(CWD(none, of, of).regressor, nn.Identity)
    regressor = CWD(none, of, other).regressor
    assert isinstance(regressor, nn.Conv2d)
    assert regressor.weight.shape == (9, 6, 1, 1)


def test_terms_are_weighted() -> None:
    of, other = OutputSpec(3, 6, (), 32, logits_stride=8), OutputSpec(3, 9, (), 32, logits_stride=4)
    student = Outputs(logits=maps(2, 3, 4, 4, seed=0), embedding=maps(2, 6, 4, 4, seed=1))
    teacher = Outputs(logits=maps(2, 3, 8, 8, seed=2), embedding=maps(2, 9, 8, 8, seed=3))
    batch = Batch(torch.zeros(2, 3, 32, 32), label_map(2, 32, 32, num_classes=3), torch.arange(2))
    params = CWD.Params(adversarial_weight=0, kd_weight=2, map_weight=3, logit_weight=5, temperature=2)
    plain = CWD(params, of, other)
    terms = plain(student, teacher, batch, 0.5)
    assert terms.keys() == {"kd", "maps", "logits"}
    torch.testing.assert_close(terms["kd"], 2 * pixel_kd_loss(student.logits, teacher.logits, batch.labels))
    arguments = plain.regressor(student.embedding), teacher.embedding, student.logits, teacher.logits, batch.labels
    expected = cwd_loss(*arguments, map_weight=3, logit_weight=5, temperature=2)
    torch.testing.assert_close(terms["maps"] + terms["logits"], expected)
    full = CWD(None, of, other)(student, teacher, batch, 0.5)
    assert full.keys() == {"kd", "maps", "logits", "generator", "discriminator"}
