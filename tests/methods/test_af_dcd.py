"""Af-DCD against loops over patches, pixels and groups in float64, and against the released form's normalisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heterokd.errors import PairError
from heterokd.methods.af_dcd import (
    PUBLISHED_VALUES,
    AfDCD,
    af_dcd_loss,
    contrastive_loss,
    random_mask,
    reconstruction_loss,
)
from heterokd.methods.pixel_kd import pixel_kd_loss
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec

TAU = 0.5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_valid(*shape: int, seed: int = 9) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.3


def slow_pool(maps: Tensor, valid: Tensor, pooling: int) -> dict[tuple[int, int, int], list[float]]:
    """The vector of every pooled pixel that has a valid one: key (image, row, column)."""
    B, D, H, W = maps.shape
    pooled = {}
    for b in range(B):
        for y in range(0, H, pooling):
            for x in range(0, W, pooling):
                inside = [
                    (v, u)
                    for v in range(y, min(y + pooling, H))
                    for u in range(x, min(x + pooling, W))
                    if valid[b, v, u]
                ]
                if inside:
                    pooled[b, y // pooling, x // pooling] = [
                        max(maps[b, d, v, u].item() for v, u in inside) for d in range(D)
                    ]
    return pooled


def slow_contrast(
    student: Tensor, teacher: Tensor, valid: Tensor, groups: int, patch: int, pooling: int, every: bool = False
) -> float:
    students, teachers = slow_pool(student, valid, pooling), slow_pool(teacher, valid, pooling)
    width = student.shape[1] // groups
    total = 0.0
    for (b, y, x), own in students.items():
        same_patch = [
            key for key in teachers if (key[0], key[1] // patch, key[2] // patch) == (b, y // patch, x // patch)
        ]
        for m in range(groups):
            part = own[m * width : (m + 1) * width]

            def close(key: tuple[int, int, int], n: int, part: list[float] = part) -> float:
                other = teachers[key][n * width : (n + 1) * width]
                return -sum(abs(s - t) for s, t in zip(part, other, strict=True)) / TAU

            positive = close((b, y, x), m)
            negatives = [
                close(key, n)
                for key in same_patch
                for n in range(groups)
                if (n != m if not every else (key, n) != ((b, y, x), m))
            ]
            total -= math.log(math.exp(positive) / (math.exp(positive) + sum(map(math.exp, negatives))))
    return total / len(students)


SETTINGS = {
    "whole patches": (4, 2, 2, (8, 8)),
    "rests": (4, 2, 2, (7, 9)),
    "no pooling": (2, 3, 1, (6, 4)),
    "one pixel a patch": (4, 1, 2, (4, 6)),
}


@pytest.mark.parametrize("negatives", ["groups", "all"])
@pytest.mark.parametrize("case", SETTINGS)
def test_contrast_equals_loops(case: str, negatives: str) -> None:
    groups, patch, pooling, side = SETTINGS[case]
    student, teacher = normal(2, 8, *side, seed=0), normal(2, 8, *side, seed=1)
    valid = random_valid(2, *side)
    if case != "no pooling":
        valid[0, :pooling, :pooling] = False  # a pooled pixel of nothing
    for mask, given in ((valid, valid), (torch.ones_like(valid), None)):
        expected = slow_contrast(student, teacher, mask, groups, patch, pooling, negatives == "all")
        found = contrastive_loss(student, teacher, given, TAU, groups, patch, pooling, negatives)
        assert found.item() == pytest.approx(expected, rel=1e-4)


def test_contrast_of_pixels_alone() -> None:
    """One group: whole pixels are told from the patch's others."""
    student, teacher = normal(2, 8, 4, 4, seed=0), normal(2, 8, 4, 4, seed=1)
    everybody = torch.ones(2, 4, 4, dtype=torch.bool)
    found = contrastive_loss(student, teacher, None, TAU, groups=1, patch=4, pooling=1, negatives="all").item()
    assert found == pytest.approx(slow_contrast(student, teacher, everybody, 1, 4, 1, every=True), rel=1e-4)
    assert contrastive_loss(student, teacher, None, TAU, groups=1, patch=4, pooling=1).item() == 0


def test_maps_smaller_than_a_patch_make_one() -> None:
    student, teacher = normal(1, 8, 3, 6, seed=0), normal(1, 8, 3, 6, seed=1)
    pooled = [F.max_pool2d(each, (3, 4), ceil_mode=True) for each in (student, teacher)]
    expected = contrastive_loss(*pooled, None, TAU, 4, 2, 1)
    torch.testing.assert_close(contrastive_loss(student, teacher, None, TAU, 4, 4, 4), expected)


def test_what_is_ignored_does_not_matter() -> None:
    student, teacher, valid = normal(2, 32, 8, 8, seed=0), normal(2, 32, 8, 8, seed=1), random_valid(2, 8, 8)
    noise = 100 * ~valid.unsqueeze(1)
    for loss in (contrastive_loss, reconstruction_loss):
        changed = loss(student + noise, teacher - noise, valid)
        torch.testing.assert_close(changed, loss(student, teacher, valid))
        student.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(student, teacher, valid), student)
        student = student.detach()
        assert (gradient * ~valid.unsqueeze(1) == 0).all()
        assert gradient.isfinite().all()


def test_reconstruction_equals_loops() -> None:
    student, teacher, valid = normal(2, 3, 4, 5, seed=0), normal(2, 3, 4, 5, seed=1), random_valid(2, 4, 5)
    for mask, given in ((valid, valid), (torch.ones_like(valid), None)):
        squares = [
            (student[b, d, y, x].double() - teacher[b, d, y, x].double()).item() ** 2
            for b in range(2)
            for d in range(3)
            for y in range(4)
            for x in range(5)
            if mask[b, y, x]
        ]
        assert reconstruction_loss(student, teacher, given).item() == pytest.approx(sum(squares) / 2, rel=1e-5)
        mean = sum(squares) / len(squares) * PUBLISHED_VALUES
        assert reconstruction_loss(student, teacher, given, "mean").item() == pytest.approx(mean, rel=1e-5)


def test_the_mean_form_is_free_of_the_maps_size() -> None:
    student, teacher = normal(1, 4, 6, 6, seed=0), normal(1, 4, 6, 6, seed=1)
    twice = [each.repeat(1, 1, 2, 2) for each in (student, teacher)]
    small, large = (reconstruction_loss(*pair, reduction="mean") for pair in ((student, teacher), twice))
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(reconstruction_loss(*twice), 4 * reconstruction_loss(student, teacher))


def test_both_terms_together() -> None:
    student, teacher, valid = normal(2, 32, 16, 16, seed=0), normal(2, 32, 16, 16, seed=1), random_valid(2, 16, 16)
    expected = 2e-6 * reconstruction_loss(student, teacher, valid) + 0.005 * contrastive_loss(student, teacher, valid)
    torch.testing.assert_close(af_dcd_loss(student, teacher, valid), expected)
    everybody = torch.ones(1, 16, 16, dtype=torch.bool)
    assert contrastive_loss(teacher, teacher) < contrastive_loss(student, teacher)
    assert reconstruction_loss(teacher, teacher, everybody) == 0


def test_masks_depend_on_image_and_progress_alone() -> None:
    index = torch.tensor([5, 0, 7])
    mask = random_mask(index, 0.25, (40, 50), 0.75)
    assert mask.shape == (3, 1, 40, 50)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.25] * 3, abs=0.04)
    assert torch.equal(random_mask(index.flip(0), 0.25, (40, 50), 0.75), mask.flip(0))
    assert not torch.equal(random_mask(index, 0.5, (40, 50), 0.75), mask)
    assert random_mask(index, 0.5, (40, 50), 0).all()


# --- the method ----------------------------------------------------------------------------------------------------


def small(student_dim: int = 6, teacher_dim: int = 12, num_classes: int = 3, **params: object) -> AfDCD:
    torch.manual_seed(0)
    specs = [OutputSpec(num_classes, dim, (), 64) for dim in (student_dim, teacher_dim)]
    return AfDCD(AfDCD.Params.model_validate(params), *specs)


def inputs(batch_size: int = 2, num_classes: int = 3, scale: float = 1) -> tuple[Outputs, Outputs, Batch]:
    """Unlike widths; the student's stride is 4, the teacher's 8."""
    student = Outputs(normal(batch_size, num_classes, 16, 16, seed=0), normal(batch_size, 6, 16, 16, seed=1) * scale)
    teacher = Outputs(normal(batch_size, num_classes, 8, 8, seed=2), normal(batch_size, 12, 8, 8, seed=3) * scale)
    labels = torch.randint(0, num_classes, (batch_size, 64, 64), generator=torch.Generator().manual_seed(4))
    labels = labels.masked_fill(~random_valid(batch_size, 64, 64), IGNORE)
    for side in (student, teacher):
        side.embedding.requires_grad_()
    return student, teacher, Batch(torch.zeros(batch_size, 3, 64, 64), labels, torch.arange(batch_size))


def test_terms_equal_their_parts_and_gradients_arrive() -> None:
    student, teacher, batch = inputs()
    method = small(kd_weight=2.0, reconstruction_weight=3e-6, contrast_weight=0.02)
    terms = method(student, teacher, batch, 0.5)
    assert list(terms) == ["kd", "reconstruction", "contrast"]
    mask = random_mask(batch.index, 0.5, (8, 8), 0.75)
    ours, theirs = F.avg_pool2d(student.embedding, 2), teacher.embedding
    rebuilt = method.generator(F.conv2d(ours, method.align.weight, method.align.bias) * mask)
    valid = batch.labels[:, 4::8, 4::8] != IGNORE
    torch.testing.assert_close(terms["kd"], 2 * pixel_kd_loss(student.logits, teacher.logits, batch.labels))
    torch.testing.assert_close(terms["reconstruction"], 3e-6 * reconstruction_loss(rebuilt, theirs, valid))
    assert method.groups == 12, "the next divisor of the teacher's width"
    torch.testing.assert_close(terms["contrast"], 0.02 * contrastive_loss(rebuilt, theirs, valid, groups=12))
    torch.stack(list(terms.values())).sum().backward()
    assert student.embedding.grad is not None
    assert teacher.embedding.grad is None
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in method.parameters())


def test_widths_without_groups_are_refused() -> None:
    with pytest.raises(PairError, match="7 channels make one group"):
        small(teacher_dim=7, groups=6)
    assert small(teacher_dim=7, groups=6, negatives="all").groups == 1
    assert not list(small(student_dim=12).align.parameters())


@pytest.mark.parametrize("case", ["one image", "two classes", "nothing valid", "large"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_edge_cases_are_finite(case: str, reduction: str) -> None:
    num_classes = 2 if case == "two classes" else 3
    batch_size = 1 if case == "one image" else 2
    student, teacher, batch = inputs(batch_size, num_classes, scale=6e4 if case == "large" else 1)
    if case == "nothing valid":
        batch.labels.fill_(IGNORE)
    terms = small(num_classes=num_classes, reduction=reduction)(student, teacher, batch, 1.0)
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.isfinite() for term in terms.values())
    assert student.embedding.grad is not None
    assert student.embedding.grad.isfinite().all()
    if case == "nothing valid":
        assert all(term == 0 for term in terms.values())


def test_bfloat16_maps_give_nearly_the_same() -> None:
    student, teacher, batch = inputs()
    expected = small()(student, teacher, batch, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = small()(student.map(torch.Tensor.bfloat16), teacher.map(torch.Tensor.bfloat16), batch, 0.0)
    for name, term in found.items():
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(expected[name].item(), rel=0.05)


def test_training_reconstructs_the_teacher() -> None:
    student, teacher, batch = inputs()
    method, losses = small(), []
    optimizer = torch.optim.Adam([student.embedding, *method.parameters()], lr=0.02)
    for step in range(40):
        terms = method(student, teacher, batch, step / 40)
        loss = terms["reconstruction"] + terms["contrast"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
