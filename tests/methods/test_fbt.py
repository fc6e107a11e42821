"""FBT against its equations written out in loops, every layout and role, and where the gradient must not go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from heterokd.errors import PairError
from heterokd.methods._projectors import Bridge, WindowBlock
from heterokd.methods.fbt import FBT, fbt_loss, info_nce
from heterokd.methods.ofa import ofa_loss, ofa_paper_loss
from heterokd.networks.network import build_network
from heterokd.outputs import Batch, Outputs, OutputSpec, Signal, StageSpec
from heterokd.training.distiller import Distiller
from heterokd.training.task_modules import ClassificationTask

K, B = 5, 3
LOGITS_AND_EMBEDDING = Signal.LOGITS | Signal.EMBEDDING


def slow_info_nce(queries: Tensor, candidates: Tensor, scale: float, normalise: bool) -> float:
    total = 0.0
    for b in range(len(queries)):
        products = []
        for other in range(len(candidates)):
            q, c = queries[b].double(), candidates[other].double()
            product = float((q * c).sum())
            products.append(scale * product / (float(q.norm()) * float(c.norm())) if normalise else scale * product)
        total -= products[b] - math.log(sum(math.exp(product) for product in products))
    return total / len(queries)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_info_nce(normalise, batch_size):
    torch.manual_seed(batch_size)
    student, teacher = torch.randn(batch_size, 6), torch.randn(batch_size, 6)
    expected = slow_info_nce(student, teacher, 3.0, normalise)
    assert info_nce(student, teacher, 3.0, normalise).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_info_nce_is_zero_for_a_batch_of_one_and_small_for_equal_embeddings():
    assert info_nce(torch.randn(1, 4), torch.randn(1, 4), 10.0).item() == 0
    embedding = torch.eye(4)
    assert info_nce(embedding, embedding, 20.0) < info_nce(embedding, embedding.roll(1, 0), 20.0)


def test_info_nce_keeps_its_precision_under_bf16_autocast():
    student, teacher = torch.randn(8, 16), torch.randn(8, 16)
    exact = info_nce(student, teacher, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(student, teacher, 100.0), exact)


@pytest.mark.parametrize(("form", "ofa"), [("paper", ofa_paper_loss), ("code", ofa_loss)])
@pytest.mark.parametrize("classes", [2, 9])
def test_pair_loss_adds_ofa_and_info_nce(form, ofa, classes):
    student, teacher, labels = torch.randn(4, classes), torch.randn(4, classes), torch.randint(classes, (4,))
    embeddings = torch.randn(2, 4, 6)
    params = FBT.Params(ofa_form=form, gamma=1.3, ofa_weight=0.4, infonce_weight=0.7)
    expected = 0.4 * ofa(student, teacher, labels, 1.3) + 0.7 * info_nce(*embeddings, 5.0)
    for given in (labels, 0.6 * nn.functional.one_hot(labels, classes) + 0.4 / classes):
        torch.testing.assert_close(fbt_loss(student, teacher, *embeddings, given, 5.0, params), expected)


class TinyTail(nn.Module):
    """A network's last stages as one convolution per entry; refuses any map but that of stage j - 1."""

    def __init__(self, spec: OutputSpec) -> None:
        super().__init__()
        self.spec = spec
        self.entries = nn.ModuleList(nn.Conv2d(stage.channels, spec.embedding_dim, 1) for stage in spec.stages)
        self.head = nn.Linear(spec.embedding_dim, spec.num_classes)

    def outputs(self, x: Tensor, j: int) -> Outputs:
        side = self.spec.side(j - 1)
        assert x.shape[1:] == (self.spec.stages[j - 2].channels, side, side)
        embedding = self.entries[j - 2](x).tanh().mean(dim=(2, 3))
        return Outputs(self.head(embedding), embedding)

    def forward(self, x: Tensor, j: int) -> Tensor:
        return self.outputs(x, j).logits


def spec_of(kind: str, image_size: int, narrow: int, isotropic: bool = False) -> OutputSpec:
    widths = (3 * narrow,) * 4 if isotropic else (narrow, narrow + 3, 2 * narrow, 3 * narrow)
    strides = (16,) * 4 if isotropic else (4, 8, 16, 32)
    stages = tuple(StageSpec(width, stride, kind) for width, stride in zip(widths, strides, strict=True))
    return OutputSpec(K, widths[-1], stages, image_size)


def leaves(spec: OutputSpec, owner: str) -> Outputs:
    """Everything a network could give, with gradient, so that a gradient that must not flow would show."""
    maps = tuple(
        torch.randn(B, stage.channels, spec.side(i), spec.side(i), requires_grad=True)
        for i, stage in enumerate(spec.stages, 1)
    )
    logits, embedding = torch.randn(B, K, requires_grad=True), torch.randn(B, spec.embedding_dim, requires_grad=True)
    return Outputs(logits, embedding, maps, TinyTail(spec), owner=owner)


def run(student_spec: OutputSpec, teacher_spec: OutputSpec, params: FBT.Params | None = None):
    method = FBT(params, student_spec, teacher_spec)
    student, teacher = leaves(student_spec, "student"), leaves(teacher_spec, "teacher")
    teacher.tail.requires_grad_(False)
    batch = Batch(torch.empty(B, 3, 1, 1), torch.tensor([0, 3, 4]), torch.arange(B))
    losses = method(student.only(method.student_needs), teacher.only(method.teacher_needs), batch, 0.0)
    return method, student, teacher, losses


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("j", [2, 3, 4, 5])
@pytest.mark.parametrize("student_kind", ["cnn", "attention", "mlp"])
@pytest.mark.parametrize("teacher_kind", ["cnn", "attention", "mlp"])
def test_every_layout_of_every_pair(k, j, student_kind, teacher_kind):
    student_spec = spec_of(student_kind, 64, 4, isotropic=student_kind == "mlp")
    teacher_spec = spec_of(teacher_kind, 96, 8, isotropic=teacher_kind == "attention")
    method, _, teacher, losses = run(student_spec, teacher_spec, FBT.Params(front_stage=k, back_stage=j))
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in method.parameters())
    assert all(each.grad is None for each in (teacher.logits, teacher.embedding, *teacher.stages))
    front_is_teacher = teacher_kind == "cnn" and student_kind != "cnn"
    assert method.front_is_teacher is front_is_teacher
    assert method.student_needs == LOGITS_AND_EMBEDDING | (Signal.TAIL if front_is_teacher else Signal.STAGES)
    assert method.teacher_needs == LOGITS_AND_EMBEDDING | (Signal.STAGES if front_is_teacher else Signal.TAIL)


@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [(32, 32), (32, 224), (224, 32), (48, 112)], ids=lambda size: str(size)
)
@pytest.mark.parametrize("layout", [(1, 2), (1, 5), (3, 4), (4, 2), (4, 5)], ids=str)
def test_every_grid_meets_every_grid(student_size, teacher_size, layout):
    params = FBT.Params(front_stage=layout[0], back_stage=layout[1], window=4)
    *_, losses = run(spec_of("cnn", student_size, 4), spec_of("attention", teacher_size, 8), params)
    assert sum(losses.values()).isfinite()


def test_fused_path_trains_the_student_s_stages_through_the_frozen_teacher():
    student_spec, teacher_spec = spec_of("cnn", 64, 4), spec_of("attention", 64, 8)
    method, student, teacher, losses = run(student_spec, teacher_spec)
    losses["teacher_fused"].backward()
    assert student.stages[2].grad.abs().sum() > 0
    assert all(student.stages[i].grad is None for i in (0, 1, 3))
    assert student.logits.grad is None
    assert all(parameter.grad is None for parameter in teacher.tail.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.bridge.parameters())


def test_with_a_cnn_teacher_the_fused_path_trains_the_student_s_last_stages():
    student_spec, teacher_spec = spec_of("attention", 64, 4), spec_of("cnn", 64, 8)
    method, student, teacher, losses = run(student_spec, teacher_spec)
    losses["teacher_fused"].backward()
    assert all(each.grad is None for each in teacher.stages)
    assert student.tail.head.weight.grad.abs().sum() > 0
    assert student.tail.entries[2].weight.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.bridge.parameters())


@pytest.mark.parametrize("detach", [True, False])
def test_detach_fused(detach):
    params = FBT.Params(detach_fused=detach)
    method, student, _, losses = run(spec_of("cnn", 64, 4), spec_of("attention", 64, 8), params)
    losses["fused_student"].backward()
    assert student.logits.grad.abs().sum() > 0
    assert (student.stages[2].grad is None) is detach
    assert (method.bridge.embed.weight.grad is None) is detach


@pytest.mark.parametrize("form", ["paper", "code"])
def test_forward_is_equation_1(form):
    student_spec, teacher_spec = spec_of("cnn", 64, 4), spec_of("attention", 64, 8)
    params = FBT.Params(
        ofa_form=form,
        gamma=1.2,
        temperature=0.5,
        teacher_student_weight=0.2,
        teacher_fused_weight=0.3,
        fused_student_weight=0.4,
        fused_task_weight=0.6,
    )
    method, student, teacher, losses = run(student_spec, teacher_spec, params)
    labels, scale = torch.tensor([0, 3, 4]), 2.0
    fused = teacher.tail.outputs(method.bridge(student.stages[2]), 4)
    aligned = method.align(student.embedding)
    ofa = ofa_loss if form == "code" else ofa_paper_loss

    def pair(b_logits, b_embedding, a_logits, a_embedding) -> float:
        contrast = slow_info_nce(b_embedding.detach(), a_embedding.detach(), scale, True)
        return ofa(b_logits, a_logits, labels, 1.2).item() + contrast

    expected = {
        "teacher_student": 0.2 * pair(student.logits, aligned, teacher.logits, teacher.embedding),
        "teacher_fused": 0.3 * pair(fused.logits, fused.embedding, teacher.logits, teacher.embedding),
        "fused_student": 0.4 * pair(student.logits, aligned, fused.logits, fused.embedding),
    }
    if form == "code":
        expected["fused_task"] = 0.6 * nn.functional.cross_entropy(fused.logits, labels).item()
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("key", "value"), [("front_stage", 0), ("front_stage", 5), ("back_stage", 1), ("back_stage", 6)]
)
def test_layouts_that_do_not_exist(key, value):
    with pytest.raises(PairError, match=f"{key} must be .* got {value}"):
        FBT(FBT.Params(**{key: value}), spec_of("cnn", 64, 4), spec_of("attention", 64, 8))


def test_the_scale_is_bounded_but_can_come_back():
    method = FBT(None, spec_of("cnn", 64, 4), spec_of("attention", 64, 8))
    assert method.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        method.logit_scale.fill_(9.0)
    student, teacher = leaves(spec_of("cnn", 64, 4), "student"), leaves(spec_of("attention", 64, 8), "teacher")
    losses = method(student, teacher, Batch(torch.empty(B, 3, 1, 1), torch.tensor([0, 3, 4]), torch.arange(B)), 0.0)
    sum(losses.values()).backward()
    assert method.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)
    assert method.logit_scale.grad.abs() > 0


@pytest.mark.parametrize(("side", "window"), [(6, 3), (5, 3), (3, 7), (1, 7)])
def test_window_block_equals_attention_window_by_window(side, window):
    """Each window's tokens, gathered one by one, attend with a bias looked up by their offset."""
    torch.manual_seed(side)
    block = WindowBlock(64, side, window)
    x = torch.randn(2, side, side, 64)
    w, heads = block.window, block.attention.heads
    padded_side = -(-side // w) * w
    normed = torch.zeros(2, padded_side, padded_side, 64)
    normed[:, :side, :side] = block.norm1(x)
    expected = torch.zeros_like(normed)
    for top in range(0, padded_side, w):
        for left in range(0, padded_side, w):
            places = [(top + row, left + column) for row in range(w) for column in range(w)]
            tokens = torch.stack([normed[:, row, column] for row, column in places], dim=1)
            query, key, value = block.attention.qkv(tokens).chunk(3, dim=-1)
            out = []
            for h in range(heads):
                part = slice(h * 64 // heads, (h + 1) * 64 // heads)
                scores = query[..., part] @ key[..., part].mT / math.sqrt(64 / heads)
                for a, (row_a, column_a) in enumerate(places):
                    for b, (row_b, column_b) in enumerate(places):
                        offset = (row_a - row_b + w - 1) * (2 * w - 1) + column_a - column_b + w - 1
                        scores[:, a, b] += block.bias[offset, h]
                out.append(scores.softmax(dim=-1) @ value[..., part])
            mixed = block.attention.out(torch.cat(out, dim=-1))
            for position, (row, column) in enumerate(places):
                expected[:, row, column] = mixed[:, position]
    y = x + expected[:, :side, :side]
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)), rtol=1e-4, atol=1e-5)


def test_bridge_upsamples_to_the_nearest_pixel():
    bridge = Bridge(3, 2, 8, 4, blocks=0)
    x = torch.randn(1, 3, 2, 2)
    wide = bridge(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    torch.testing.assert_close(bridge(x), bridge(x)[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(bridge(x), wide)  # a wider map than announced is averaged back


@pytest.mark.parametrize(
    ("student_name", "teacher_name"),
    [("resnet18", "deit_tiny_patch16_224"), ("deit_tiny_patch16_224", "resnet18"), ("resmlp_12_224", "resnet18")],
)
@pytest.mark.parametrize("layout", [(3, 4), (1, 5)], ids=str)
def test_real_networks(student_name, teacher_name, layout):
    torch.manual_seed(0)
    student = build_network(student_name, K, image_size=64)
    teacher = build_network(teacher_name, K, image_size=64).eval().requires_grad_(False)
    params = FBT.Params(front_stage=layout[0], back_stage=layout[1])
    method = FBT(params, student.spec, teacher.spec)
    images = torch.rand(2, 3, 64, 64)
    batch = Batch(images, torch.tensor([1, 2]), torch.arange(2))
    with torch.no_grad():
        taught = teacher(images, method.teacher_needs)
    losses = method(student(images, method.student_needs), taught, batch, 0.0)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize(
    ("params", "weight"),
    [({}, 0.0), ({"task_loss": True}, 0.5), ({"ofa_form": "code"}, 0.5)],
)
def test_the_task_loss_is_added_where_the_loss_has_no_label_of_its_own(params, weight):
    student, teacher = build_network("test_resnet", K), build_network("resnet10t", K)
    method = FBT(FBT.Params(**params), student.spec, teacher.spec)
    assert Distiller(student, method, ClassificationTask(K), task_weight=0.5).task_weight == weight
