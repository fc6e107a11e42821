"""OFA against its two equations written out in loops, and its branches on maps of every kind and size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterokd.methods._projectors import TokenProjector
from heterokd.methods.ofa import OFA, ofa_loss, ofa_paper_loss
from heterokd.outputs import Batch, Outputs, OutputSpec, StageSpec


def softmax(row: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(row.astype(np.float64) / temperature - (row / temperature).max())
    return powers / powers.sum()


def slow(form: str, student, teacher, labels, eps: float, temperature: float) -> float:
    total = 0.0
    for z_s, z_t, y in zip(student.numpy(), teacher.numpy(), labels.tolist(), strict=True):
        p_s, p_t = softmax(z_s, temperature), softmax(z_t, temperature)
        for c in range(len(p_s)):
            m = float(c == y)
            if form == "code":
                total -= ((p_t[c] + m) ** eps - m) * math.log(p_s[c])
            else:
                total += ((1 + p_t[c]) ** eps if m else p_t[c]) * math.log(p_t[c] / p_s[c])
    return total / len(labels)


@pytest.mark.parametrize(("form", "loss"), [("code", ofa_loss), ("paper", ofa_paper_loss)])
@pytest.mark.parametrize(("classes", "eps", "temperature"), [(10, 1.0, 1.0), (7, 1.4, 2.0), (2, 1.6, 0.5)])
def test_equation(form, loss, classes, eps, temperature):
    torch.manual_seed(classes)
    student, teacher = 3 * torch.randn(6, classes), 3 * torch.randn(6, classes)
    labels = torch.randint(classes, (6,))
    expected = slow(form, student, teacher, labels, eps, temperature)
    assert loss(student, teacher, labels, eps, temperature).item() == pytest.approx(expected, rel=1e-5)
    shares = 0.7 * torch.nn.functional.one_hot(labels, classes) + 0.3 / classes
    assert loss(student, teacher, shares, eps, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_code_form_with_eps_one_is_cross_entropy_with_the_teacher():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(5, 9), torch.randn(5, 9), torch.randint(9, (5,))
    expected = torch.nn.functional.cross_entropy(student, teacher.softmax(dim=1))
    torch.testing.assert_close(ofa_loss(student, teacher, labels), expected)


def test_paper_form_vanishes_where_the_student_equals_the_teacher():
    logits, labels = torch.randn(5, 9), torch.randint(9, (5,))
    assert ofa_paper_loss(logits, logits, labels, 1.3).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [ofa_loss, ofa_paper_loss])
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([[400.0, -400.0, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-300.0, 300.0, 0.0]]), torch.tensor([2]), 1.5)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def pair(kind: str, image_size: int, isotropic: bool) -> tuple[OutputSpec, OutputSpec]:
    strides = (16, 16, 16, 16) if isotropic else (4, 8, 16, 32)
    widths = (24, 24, 24, 24) if isotropic else (8, 12, 18, 26)
    stages = tuple(StageSpec(width, stride, kind) for width, stride in zip(widths, strides, strict=True))
    return OutputSpec(5, widths[-1], stages, image_size), OutputSpec(5, 32, (), image_size)


@pytest.mark.parametrize("kind", ["cnn", "attention", "mlp"])
@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("image_size", [32, 224])
def test_branches_fit_every_student(kind, isotropic, image_size):
    student_spec, teacher_spec = pair(kind, image_size, isotropic)
    method = OFA(None, student_spec, teacher_spec)
    stages = tuple(
        torch.randn(2, stage.channels, student_spec.side(i), student_spec.side(i), requires_grad=True)
        for i, stage in enumerate(student_spec.stages, 1)
    )
    student = Outputs(torch.randn(2, 5, requires_grad=True), stages=stages)
    teacher = Outputs(torch.randn(2, 5, requires_grad=True))
    losses = method(student, teacher, Batch(torch.empty(2, 3, 1, 1), torch.tensor([1, 4]), torch.arange(2)), 0.0)
    sum(losses.values()).backward()
    assert set(losses) == {"logits", "stages"}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in method.parameters())
    assert all(stage.grad.abs().sum() > 0 for stage in stages)
    assert teacher.logits.grad is None


def test_forward_adds_the_chosen_stages():
    torch.manual_seed(0)
    student_spec, teacher_spec = pair("cnn", 64, False)
    params = OFA.Params(stages="24", eps=1.2, temperature=2.0, weight=0.5, stage_weight=0.1, form="paper")
    method = OFA(params, student_spec, teacher_spec).eval()
    stages = tuple(
        torch.randn(2, stage.channels, student_spec.side(i), student_spec.side(i))
        for i, stage in enumerate(student_spec.stages, 1)
    )
    student, teacher, labels = torch.randn(2, 5), torch.randn(2, 5), torch.tensor([0, 3])
    batch = Batch(torch.empty(2, 3, 1, 1), labels, torch.arange(2))
    losses = method(Outputs(student, stages=stages), Outputs(teacher), batch, 0.0)
    torch.testing.assert_close(losses["logits"], 0.5 * ofa_paper_loss(student, teacher, labels, 1.2, 2.0))
    exits = [method.branches["2"](stages[1]), method.branches["4"](stages[3])]
    expected = 0.1 * sum(ofa_paper_loss(logits, teacher, labels, 1.2, 2.0) for logits in exits)
    torch.testing.assert_close(losses["stages"], expected)


def test_stages_may_be_written_as_a_number():
    assert OFA.Params(stages=34).stages == "34"
    with pytest.raises(ValueError, match="stages"):
        OFA.Params(stages="43")


@pytest.mark.parametrize(("side", "first", "between"), [(7, 0, 0), (14, 1, 0), (28, 1, 1), (56, 2, 2)])
def test_token_branches_have_a_gelu_after_the_first_merge(side, first, between):
    """Merges from a grid to 7 x 7: none, one, two, three; the last of several has none."""
    stage = StageSpec(8, 224 // side, "attention")
    spec = OutputSpec(5, 8, (stage, stage, stage, stage), 224)
    for where, count in (("first", first), ("between", between)):
        merging = TokenProjector(spec, 1, 12, merge_activation=where).merging
        assert sum(isinstance(layer, torch.nn.GELU) for layer in merging) == count, where


def test_token_branches_are_those_of_the_authors_unless_an_older_recipe_says_otherwise():
    spec, teacher = pair("attention", 224, isotropic=True)
    new = OFA(None, spec, teacher).branches["1"][0]
    old = OFA(OFA.Params(merge_activation="between", qkv_bias=True), spec, teacher).branches["1"][0]
    assert [[type(layer).__name__ for layer in branch.merging] for branch in (new, old)] == [
        ["PatchMerging", "GELU"],
        ["PatchMerging"],
    ]
    assert [branch.blocks[0].attention.qkv.bias is None for branch in (new, old)] == [True, False]
