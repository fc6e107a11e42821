"""IFVD's variation maps against loops over images, classes and pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterokd.methods.ifvd import IFVD, coarse_labels, ifvd_loss, intra_class_loss, variation_map
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec


def slow_variation(map_BDHW: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Maps [B, D, H, W] and labels [B, H, W] of one grid; 0 where ignored."""
    values, B = map_BDHW.double().numpy(), len(labels)
    found = np.zeros(labels.shape)
    for b in range(B):
        for c in set(labels[b].flatten().tolist()) - {IGNORE}:
            places = [place for place in np.ndindex(labels.shape[1:]) if labels[b][place] == c]
            prototype = sum(values[b, :, i, j] for i, j in places) / len(places)
            for i, j in places:
                vector = values[b, :, i, j]
                lengths = math.sqrt(float(vector @ vector)) * math.sqrt(float(prototype @ prototype))
                found[b, i, j] = float(vector @ prototype) / lengths
    return found


def maps(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def label_map(*shape: int, num_classes: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORE
    return labels


@pytest.mark.parametrize(("batch_size", "num_classes"), [(3, 5), (1, 4), (2, 2), (2, 200)])
def test_equals_loops(batch_size: int, num_classes: int) -> None:
    student, teacher = maps(batch_size, 6, 4, 5, seed=0), maps(batch_size, 9, 4, 5, seed=1)
    labels = label_map(batch_size, 4, 5, num_classes=num_classes)
    slow = [slow_variation(each, labels) for each in (student, teacher)]
    fast = variation_map(student, labels, num_classes).double().numpy()
    np.testing.assert_allclose(fast.reshape(labels.shape), slow[0], rtol=1e-5, atol=1e-6)
    expected = float(((slow[0] - slow[1]) ** 2).sum()) / int((labels != IGNORE).sum())
    assert intra_class_loss(student, teacher, labels, num_classes).item() == pytest.approx(expected, rel=1e-5)


def test_prototypes_are_of_one_image() -> None:
    student, teacher = maps(2, 6, 4, 4, seed=0), maps(2, 6, 4, 4, seed=1)
    labels = label_map(2, 4, 4, num_classes=3)
    each = [intra_class_loss(student[b : b + 1], teacher[b : b + 1], labels[b : b + 1], 3) for b in (0, 1)]
    shares = (labels != IGNORE).flatten(1).sum(dim=1) / (labels != IGNORE).sum()
    torch.testing.assert_close(intra_class_loss(student, teacher, labels, 3), (torch.stack(each) * shares).sum())


def test_unlike_grids_and_labels_at_image_size() -> None:
    student, teacher = maps(2, 6, 4, 4, seed=0), maps(2, 9, 8, 8, seed=1)
    coarse = label_map(2, 4, 4, num_classes=3)
    fine = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    averaged = teacher.reshape(2, 9, 4, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(
        intra_class_loss(student, teacher, fine, 3), intra_class_loss(student, averaged, coarse, 3)
    )


def test_equal_maps_no_labels_zeros_and_huge_maps() -> None:
    student, teacher = maps(2, 6, 4, 4, seed=0), maps(2, 6, 4, 4, seed=1)
    labels = label_map(2, 4, 4, num_classes=3)
    assert intra_class_loss(student, 5 * student, labels, 3).item() == pytest.approx(0, abs=1e-10)
    for extreme in (torch.zeros_like(student), 6e4 * student.sign(), 1e-20 * student):
        for used in (labels, torch.full_like(labels, IGNORE)):
            leaf = extreme.clone().requires_grad_()
            loss = intra_class_loss(leaf, teacher, used, 3)
            loss.backward()
            assert loss.isfinite()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
    assert intra_class_loss(student, teacher, torch.full_like(labels, IGNORE), 3).item() == 0


def test_terms_are_weighted() -> None:
    of, other = OutputSpec(3, 6, (), 32, logits_stride=8), OutputSpec(3, 9, (), 32, logits_stride=8)
    student = Outputs(logits=maps(2, 3, 4, 4, seed=0), embedding=maps(2, 6, 4, 4, seed=1))
    teacher = Outputs(logits=maps(2, 3, 4, 4, seed=2), embedding=maps(2, 9, 4, 4, seed=3))
    batch = Batch(torch.zeros(2, 3, 32, 32), label_map(2, 32, 32, num_classes=3), torch.arange(2))
    params = IFVD.Params(adversarial_weight=0, kd_weight=2, variation_weight=3)
    plain = IFVD(params, of, other)
    terms = plain(student, teacher, batch, 0.5)
    assert terms.keys() == {"kd", "variation"}
    torch.testing.assert_close(terms["kd"], 2 * pixel_kd_loss(student.logits, teacher.logits, batch.labels))
    arguments = student.embedding, teacher.embedding, student.logits, teacher.logits, batch.labels
    torch.testing.assert_close(sum(terms.values()), ifvd_loss(*arguments, params))
    full = IFVD(None, of, other)(student, teacher, batch, 0.5)
    assert full.keys() == {"kd", "variation", "generator", "discriminator"}


def test_a_position_takes_the_label_of_its_corner_or_of_its_centre() -> None:
    labels = torch.arange(36).view(1, 6, 6)
    assert coarse_labels(labels, (2, 3), "corner").tolist() == [[[0, 2, 4], [18, 20, 22]]]
    assert coarse_labels(labels, (2, 3), "centre").tolist() == [[[7, 9, 11], [25, 27, 29]]]
    assert torch.equal(coarse_labels(labels, (6, 6)), labels)
    student, teacher = maps(1, 4, 3, 3, seed=0), maps(1, 4, 3, 3, seed=1)
    fine = label_map(1, 6, 6, num_classes=3)
    corner = intra_class_loss(student, teacher, fine[:, ::2, ::2], 3)
    torch.testing.assert_close(intra_class_loss(student, teacher, fine, 3), corner)
    assert not torch.isclose(intra_class_loss(student, teacher, fine, 3, "centre"), corner)
