"""HCD against its equations written out in loops, and the mask that must not silence the orthogonality loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterokd.methods import hcd
from heterokd.methods.hcd import HCD
from heterokd.outputs import Batch, Outputs, OutputSpec, StageSpec


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row.astype(np.float64)
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


def slow_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    log_s, log_t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    return temperature**2 * sum(math.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True))


def slow_terms(student, teacher, stages, labels, shares, params: HCD.Params) -> dict[str, float]:
    B, K = student.shape
    n = params.num_sublogits
    terms = {"kl": 0.0, "sub_kl": 0.0, "sub_ce": 0.0, "orthogonality": 0.0}
    for b in range(B):
        terms["kl"] += slow_kl(student[b], teacher[b], params.temperature) / B
        for stage in stages:
            fused = [params.sub_logit_scale * stage[b, j] + params.teacher_logit_scale * teacher[b] for j in range(n)]
            for j in range(n):
                terms["sub_kl"] += slow_kl(student[b], fused[j], params.temperature) / (n * B)
                smooth = (1 - params.sub_ce_smoothing) * shares[b] + params.sub_ce_smoothing / K
                terms["sub_ce"] -= float(smooth @ log_softmax(fused[j])) / (n * B)
            units = []
            for each in fused:
                masked = np.array([0.0 if c == labels[b] else float(each[c]) for c in range(K)])
                units.append(masked / math.sqrt(float((masked**2).sum())))
            for j in range(n):
                for k in range(n):
                    if j != k:
                        excess = max(0.0, float(units[j] @ units[k]) - params.threshold) ** 2
                        terms["orthogonality"] += excess / (n * (n - 1) * B)
    if params.stage_reduction == "mean":
        for name in ("sub_kl", "sub_ce", "orthogonality"):
            terms[name] /= len(stages)
    weights = (params.kl_weight, params.sub_kl_weight, params.sub_ce_weight, params.orthogonality_weight)
    return {name: weight * value for (name, value), weight in zip(terms.items(), weights, strict=True)}


def random_case(classes: int, num_sublogits: int, stages: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 5, classes, generator=generator)
    labels = torch.randint(classes, (5,), generator=generator)
    return student, teacher, torch.randn(stages, 5, num_sublogits, classes, generator=generator), labels


@pytest.mark.parametrize(
    ("classes", "params"),
    [
        (10, HCD.Params()),
        (
            6,
            HCD.Params(
                num_sublogits=2,
                temperature=1.0,
                stage_reduction="mean",
                threshold=0.1,
                sub_ce_weight=0.3,
                sub_ce_smoothing=0.2,
            ),
        ),
        (2, HCD.Params(num_sublogits=3, sub_logit_scale=0.25, teacher_logit_scale=0.75, detach_sublogits=True)),
        (4, HCD.Params(num_sublogits=1, kl_weight=8.0)),
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_equations(classes, params, soft):
    student, teacher, stages, labels = random_case(classes, params.num_sublogits, 3, seed=classes)
    one_hot = torch.nn.functional.one_hot(labels, classes).float()
    shares = 0.8 * one_hot + 0.2 / classes if soft else one_hot
    expected = slow_terms(student.numpy(), teacher.numpy(), stages.numpy(), labels.tolist(), shares.numpy(), params)
    given = shares if soft else labels
    terms = hcd.hcd_terms(student, teacher, list(stages), given, params)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    total = hcd.hcd_loss(student, teacher, list(stages), given, params)
    assert total.item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_sub_logits_are_neighbouring_columns():
    shared = torch.arange(24.0).view(2, 12)
    pieces = hcd.sub_logits(shared, 3)
    for j in range(3):
        assert torch.equal(pieces[:, j], shared[:, 4 * j : 4 * j + 4])


def test_cosines_have_a_unit_diagonal_and_ignore_the_label():
    _, _, (fused,), labels = random_case(8, 4, 1)
    cosines = hcd.sub_logit_cosines(fused, labels)
    torch.testing.assert_close(cosines.diagonal(dim1=1, dim2=2), torch.ones(5, 4))
    raised = fused.clone()
    raised[torch.arange(5), :, labels] += torch.randn(5, 4)
    torch.testing.assert_close(hcd.sub_logit_cosines(raised, labels), cosines)


def test_orthogonality_loss_moves_the_sub_logits_where_the_port_s_mask_does_not():
    _, teacher, (sub,), labels = random_case(100, 4, 1)
    fused = hcd.fuse(sub, teacher).requires_grad_()
    hcd.orthogonality_loss(fused, labels).backward()
    assert fused.grad.abs().max() > 1e-4
    pitfall = fused.detach().clone()
    pitfall[torch.arange(5), :, labels] = -1e6  # what a port of the method writes at the label
    unit = torch.nn.functional.normalize(pitfall, dim=2)
    torch.testing.assert_close(unit @ unit.mT, torch.ones(5, 4, 4))


def test_one_sub_logit_has_nothing_to_be_unlike():
    fused = torch.randn(3, 1, 6, requires_grad=True)
    loss = hcd.orthogonality_loss(fused, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.item() == 0


def test_orthogonality_loss_keeps_its_precision_under_bf16_autocast():
    _, _, (fused,), labels = random_case(20, 4, 1)
    exact = hcd.orthogonality_loss(fused, labels, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hcd.orthogonality_loss(fused, labels, 0.0), exact)


@pytest.mark.parametrize("detach", [False, True])
def test_detaching_stops_only_the_distillation_of_sub_logits(detach):
    student, teacher, (sub,), labels = random_case(6, 2, 1)
    sub.requires_grad_()
    params = HCD.Params(num_sublogits=2, detach_sublogits=detach, sub_ce_weight=0, orthogonality_weight=0)
    hcd.hcd_loss(student.requires_grad_(), teacher, [sub], labels, params).backward()
    assert (sub.grad.abs().sum().item() == 0) is detach
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["cnn", "attention", "mlp"])
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (16, 16, 16, 16), (32, 32, 32, 32)])
@pytest.mark.parametrize("image_size", [32, 224])
def test_projectors_fit_every_student(kind, strides, image_size):
    stages = tuple(StageSpec(width, stride, kind) for width, stride in zip((8, 12, 16, 20), strides, strict=True))
    spec = OutputSpec(5, 20, stages, image_size)
    method = HCD(None, spec, OutputSpec(5, 28, (), 224))
    maps = tuple(
        torch.randn(2, s.channels, spec.side(i), spec.side(i), requires_grad=True) for i, s in enumerate(stages, 1)
    )
    teacher = Outputs(torch.randn(2, 5, requires_grad=True), torch.randn(2, 28, requires_grad=True))
    student = Outputs(torch.randn(2, 5, requires_grad=True), stages=maps)
    batch = Batch(torch.empty(2, 3, 1, 1), torch.tensor([1, 4]), torch.arange(2))
    losses = method(student, teacher, batch, 0.0)
    sum(losses.values()).backward()
    assert set(losses) == {"kl", "sub_kl", "sub_ce", "orthogonality"}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in method.parameters())
    assert all(each.grad.abs().sum() > 0 for each in maps)
    assert teacher.logits.grad is None
    assert teacher.embedding.grad is None
