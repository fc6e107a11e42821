"""HeteroAKD against its equations written out in loops, its properties, and what it keeps in memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from heterokd.errors import PairError
from heterokd.methods import heteroakd
from heterokd.methods.heteroakd import HeteroAKD
from heterokd.outputs import IGNORE, Batch, Outputs, OutputSpec, StageSpec, labels_at

RELIABILITIES = ("bce_sigmoid", "bce_softmax", "ce_pixel")
FORMS = ("bernoulli", "softmax", "literal")
AXES = ("space", "class")


# --- the equations, one number at a time -----------------------------------------------------------------------------


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def log_sum(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def log_softmax(scores: list[float]) -> list[float]:
    return [score - log_sum(scores) for score in scores]


def slow_entropy(scores: list[float], label: int, reliability: str) -> list[float]:
    """H of one pixel, for every class."""
    if reliability == "ce_pixel":
        return [-log_softmax(scores)[label]] * len(scores)
    if reliability == "bce_sigmoid":
        return [-log_sigmoid(z if c == label else -z) for c, z in enumerate(scores)]
    absent = [log_sum([z for k, z in enumerate(scores) if k != c]) - log_sum(scores) for c in range(len(scores))]
    return [-(log_softmax(scores)[c] if c == label else absent[c]) for c in range(len(scores))]


def slow_maps(
    student_z: Tensor, teacher_z: Tensor, labels: Tensor, reliability: str, axis: str
) -> dict[str, np.ndarray]:
    """H of both, S, Zhat, dH and W by Eq. 5-9 in float64; NaN where the label is IGNORE, W there 0."""
    s, t = student_z.double().numpy(), teacher_z.double().numpy()
    B, K, H, W = s.shape
    found = {name: np.full(s.shape, np.nan) for name in ("H_s", "H_t", "S", "Zhat", "dH")} | {"W": np.zeros(s.shape)}
    valid = [(b, h, w) for b, h, w in np.ndindex(B, H, W) if labels[b, h, w] != IGNORE]
    for b, h, w in valid:
        label = int(labels[b, h, w])
        H_s = slow_entropy(list(s[b, :, h, w]), label, reliability)
        H_t = slow_entropy(list(t[b, :, h, w]), label, reliability)
        share = [x / (x + y) for x, y in zip(H_s, H_t, strict=True)]
        hybrid = [share[c] * t[b, c, h, w] + (1 - share[c]) * s[b, c, h, w] for c in range(K)]
        H_hat = slow_entropy(hybrid, label, reliability)
        gain = [x - y if x - y > 0 else 0.0 for x, y in zip(H_s, H_hat, strict=True)]
        for name, value in {"H_s": H_s, "H_t": H_t, "S": share, "Zhat": hybrid, "dH": gain}.items():
            found[name][b, :, h, w] = value
    groups = {}  # what sums to 1 together: a class of an image, or a pixel
    for b, h, w in valid:
        for c in range(K):
            group = (b, c) if axis == "space" else (b, h, w)
            urgency = math.exp(found["H_s"][b, c, h, w] + found["dH"][b, c, h, w])
            groups.setdefault(group, []).append(urgency)
            found["W"][b, c, h, w] = urgency
    totals = {group: sum(each) for group, each in groups.items()}
    for b, h, w in valid:
        for c in range(K):
            found["W"][b, c, h, w] /= totals[(b, c) if axis == "space" else (b, h, w)]
    return found


def slow_transfer(
    student_z: Tensor, maps: dict[str, np.ndarray], labels: Tensor, tau: float, form: str, axis: str
) -> float:
    """Eq. 10."""
    s = student_z.double().numpy()
    B, K, H, W = s.shape
    total = 0.0
    for b, h, w in np.ndindex(B, H, W):
        if labels[b, h, w] == IGNORE:
            continue
        mine = [float(z) / tau for z in s[b, :, h, w]]
        hybrid = [float(z) / tau for z in maps["Zhat"][b, :, h, w]]
        for c in range(K):
            p = math.exp(log_softmax(hybrid)[c] if form == "softmax" else log_sigmoid(hybrid[c]))
            log_q = log_softmax(mine)[c] if form == "softmax" else log_sigmoid(mine[c])
            both_sides = (1 - p) * log_sigmoid(-mine[c]) if form == "bernoulli" else 0.0
            total -= maps["W"][b, c, h, w] * (p * log_q + both_sides)
    return total / (B * K if axis == "space" else max(1, int((labels != IGNORE).sum())))


def slow_kd(student: Tensor, teacher: Tensor, labels: Tensor, tau: float, direction: str) -> float:
    """Eq. 1."""
    s, t = student.double().numpy(), teacher.double().numpy()
    found = []
    for b, h, w in np.ndindex(s.shape[0], *s.shape[2:]):
        if labels[b, h, w] != IGNORE:
            log_s, log_t = (log_softmax([float(z) / tau for z in each[b, :, h, w]]) for each in (s, t))
            log_p, log_q = (log_t, log_s) if direction == "teacher_student" else (log_s, log_t)
            found.append(tau**2 * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    return sum(found) / max(1, len(found))


def scores_and_labels(classes: int = 4, seed: int = 0, size: tuple[int, int] = (3, 4), scale: float = 2.0):
    """Scores of both and labels of which a fifth is IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    student_z, teacher_z = scale * torch.randn(2, 2, classes, *size, generator=generator)
    labels = torch.randint(classes, (2, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    labels[:, 0, 0] = classes - 1
    return student_z, teacher_z, labels


@pytest.mark.parametrize("reliability", RELIABILITIES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("classes", [2, 5])
def test_reliability_mixing_and_evaluation(reliability, axis, classes):
    student_z, teacher_z, labels = scores_and_labels(classes)
    expected = slow_maps(student_z, teacher_z, labels, reliability, axis)
    share, hybrid_z = heteroakd.knowledge_mixing(student_z, teacher_z, labels, reliability)
    gain, weights = heteroakd.knowledge_evaluation(student_z, hybrid_z, labels, reliability, axis)
    found = {
        "H_s": heteroakd.per_class_entropy(student_z, labels, reliability),
        "H_t": heteroakd.per_class_entropy(teacher_z, labels, reliability),
        "S": share,
        "Zhat": hybrid_z,
        "dH": gain,
    }
    valid = (labels != IGNORE).unsqueeze(1).expand_as(student_z).numpy()
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        np.testing.assert_allclose(value.numpy()[valid], expected[name][valid], rtol=2e-5, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(weights.numpy(), expected["W"], rtol=2e-5, atol=1e-7)
    assert (found["H_s"].numpy()[~valid] == 0).all()


@pytest.mark.parametrize(
    ("reliability", "axis", "form", "temperature"), list(itertools.product(RELIABILITIES, AXES, FORMS, (0.7, 1.0)))
)
def test_transfer(reliability, axis, form, temperature):
    student_z, teacher_z, labels = scores_and_labels()
    params = HeteroAKD.Params(reliability=reliability, kem_axis=axis, form=form, temperature=temperature)
    maps = slow_maps(student_z, teacher_z, labels, reliability, axis)
    expected = slow_transfer(student_z, maps, labels, temperature, form, axis)
    assert heteroakd.heteroakd_loss(student_z, teacher_z, labels, params).item() == pytest.approx(expected, rel=2e-5)


# --- the method ------------------------------------------------------------------------------------------------------


def spec(width: int, stride: int, kind: str = "cnn", classes: int = 4, image_size: int = 32) -> OutputSpec:
    strides = (4, 8, 16, 32) if kind != "mlp" else (8, 8, 8, 8)
    stages = tuple(StageSpec(width + 2 * i, s, kind) for i, s in enumerate(strides))
    return OutputSpec(classes, width, stages, image_size, logits_stride=stride)


def outputs(of: OutputSpec, seed: int, batch: int = 2, scale: float = 1.0, owner: str = "network") -> Outputs:
    """Random outputs; every tensor is a leaf that would keep a gradient, the teacher's too."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(channels: int, stride: int) -> Tensor:
        side = of.image_size // stride
        return (scale * torch.randn(batch, channels, side, side, generator=generator)).requires_grad_()

    stride = of.logits_stride or 1
    return Outputs(
        leaf(of.num_classes, stride),
        leaf(of.embedding_dim, stride),
        tuple(leaf(stage.channels, stage.stride) for stage in of.stages),
        owner=owner,
    )


def label_batch(of: OutputSpec, batch: int = 2, seed: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(of.num_classes, (batch, of.image_size // 4, of.image_size // 4), generator=generator)
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, :5] = IGNORE
    return Batch(torch.zeros(batch, 3, of.image_size, of.image_size), labels, torch.arange(batch))


STUDENT, TEACHER = spec(6, 8), spec(10, 4, "attention")


def method(seed: int = 0, student: OutputSpec = STUDENT, teacher: OutputSpec = TEACHER, **params) -> HeteroAKD:
    torch.manual_seed(seed)
    return HeteroAKD(HeteroAKD.Params(**params), student, teacher)


@pytest.mark.parametrize("teacher", [TEACHER, spec(10, 16), spec(6, 8)], ids=["finer", "coarser", "equal"])
@pytest.mark.parametrize("resolution", ["map", "label"])
@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_terms_follow_from_the_projected_scores(teacher, resolution, direction):
    module = method(teacher=teacher, resolution=resolution, direction=direction, weight=3.0, temperature=0.8)
    given_s, given_t, batch = outputs(STUDENT, 0), outputs(teacher, 1), label_batch(STUDENT)
    terms = module(given_s, given_t, batch, 0.5)
    with torch.no_grad():
        student_z = module.student_projector(given_s.embedding)
        grid = (4, 4) if resolution == "map" else (32, 32)
        teacher_z = heteroakd.resize_map(module.teacher_projector(given_t.embedding), grid)
        student_z = heteroakd.resize_map(student_z, grid)
        labels = labels_at(batch.labels, grid)
        coarse_labels = labels_at(batch.labels, (4, 4))
        teacher_logits = heteroakd.resize_map(given_t.logits, (4, 4)).detach()
    maps = slow_maps(student_z, teacher_z, labels, "bce_sigmoid", "space")
    valid = (labels != IGNORE).numpy()
    assert 0 < valid.sum() < valid.size
    own = sum(np.nansum(maps[name]) / valid.sum() for name in ("H_s", "H_t"))
    kd = slow_kd(given_s.logits.detach(), teacher_logits, coarse_labels, 0.8, direction)
    transferred = slow_transfer(student_z, maps, labels, 0.8, "bernoulli", "space")
    expected = {"kd": 0.1 * kd, "hakd": 3.0 * transferred, "projectors": 0.05 * own}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("resolution", ["map", "label"])
def test_before_schema_5_the_teachers_scores_went_through_the_students_grid(resolution):
    given_s, given_t, batch = outputs(STUDENT, 0), outputs(TEACHER, 1), label_batch(STUDENT)
    now, before = method(resolution=resolution), method(resolution=resolution, teacher_grid="student")
    if resolution == "map":
        assert now(given_s, given_t, batch, 0.5) == before(given_s, given_t, batch, 0.5)
        return
    with torch.no_grad():
        student_z = heteroakd.resize_map(before.student_projector(given_s.embedding), (32, 32))
        coarse = heteroakd.resize_map(before.teacher_projector(given_t.embedding), (4, 4))
        expected = heteroakd.heteroakd_loss(student_z, heteroakd.resize_map(coarse, (32, 32)), batch.labels)
    terms = before(given_s, given_t, batch, 0.5)
    assert terms["hakd"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert now(given_s, given_t, batch, 0.5)["hakd"].item() != pytest.approx(expected.item(), rel=1e-3)


def test_warm_up_trains_projectors_by_labels_alone():
    module = method(warmup=0.25, projector_weight=0.4, projector_weight_after=0.2)
    given, batch = (outputs(STUDENT, 0), outputs(TEACHER, 1)), label_batch(STUDENT)
    before, after = module(*given, batch, 0.2499), module(*given, batch, 0.25)
    assert before["kd"].item() == before["hakd"].item() == 0
    assert after["kd"].item() > 0
    assert after["hakd"].item() > 0
    assert before["projectors"].item() == pytest.approx(2 * after["projectors"].item())
    sum(before.values()).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in module.parameters())
    assert method(warmup=0.0)(*given, batch, 0.0)["hakd"].item() > 0


def test_projectors_learn_to_name_the_classes_of_both_networks():
    module = method(projector_weight=0.4)
    batch = label_batch(STUDENT, batch=4)
    truth = torch.nn.functional.one_hot(batch.labels.where(batch.labels != IGNORE, 0), 4).permute(0, 3, 1, 2).float()

    def telling(of: OutputSpec, seed: int) -> Outputs:
        mixing = torch.randn(of.embedding_dim, 4, generator=torch.Generator().manual_seed(seed))
        seen = labels_at(truth.flatten(0, 1), (32 // of.logits_stride,) * 2).unflatten(0, (4, 4))
        return Outputs(outputs(of, seed, batch=4).logits, torch.einsum("dk,bkhw->bdhw", mixing, seen))

    student, teacher = telling(STUDENT, 0), telling(TEACHER, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    first = module(student, teacher, batch, 0.0)["projectors"].item()
    for _ in range(60):
        optimizer.zero_grad()
        module(student, teacher, batch, 0.0)["projectors"].backward()
        optimizer.step()
    assert module(student, teacher, batch, 0.0)["projectors"].item() < 0.5 * first


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("resolution", ["map", "label"])
@pytest.mark.parametrize("tap", ["embedding", "stage3"])
@pytest.mark.parametrize("projector", ["conv-bn", "conv-bn-relu-conv1x1", "conv-bn-relu"])
def test_gradient_reaches_student_and_projectors_and_nothing_of_the_teacher(detach, resolution, tap, projector):
    module = method(detach=detach, resolution=resolution, tap=tap, projector=projector)
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    sum(module(student, teacher, label_batch(STUDENT), 1.0).values()).backward()
    tapped = student.embedding if tap == "embedding" else student.stages[2]
    for tensor in (student.logits, tapped, *module.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in (teacher.logits, teacher.embedding, *teacher.stages))


def test_detaching_decides_who_learns_from_the_transfer():
    for detach in (True, False):
        module = method(detach=detach)
        module(outputs(STUDENT, 0), outputs(TEACHER, 1), label_batch(STUDENT), 1.0)["hakd"].backward()
        assert module.student_projector[0].weight.grad.abs().sum() > 0
        assert (module.teacher_projector[0].weight.grad is None) is detach


@pytest.mark.parametrize("student", ["cnn", "attention", "mlp"])
@pytest.mark.parametrize("teacher", ["cnn", "attention", "mlp"])
@pytest.mark.parametrize("strides", [(4, 8), (8, 4), (32, 8), (8, 32), (16, 16)], ids=str)
def test_builds_from_specs_of_unlike_pairs(student, teacher, strides):
    specs = spec(6, strides[0], student, image_size=64), spec(10, strides[1], teacher, image_size=64)
    for tap in ("embedding", "stage1", "stage4"):
        module = method(0, *specs, tap=tap)
        given = [outputs(of, seed) for seed, of in enumerate(specs)]
        declared = [
            each.only(needs) for each, needs in zip(given, (module.student_needs, module.teacher_needs), strict=True)
        ]
        assert all(term.isfinite() for term in module(*declared, label_batch(specs[0]), 1.0).values())


def test_says_what_cannot_be():
    with pytest.raises(PairError, match="same classes, they have 4 and 5"):
        method(teacher=spec(10, 4, classes=5))
    with pytest.raises(PairError, match="tap stage4: the teacher has 0 stages"):
        method(teacher=OutputSpec(4, 10, ()), tap="stage4")
    with pytest.raises(ValidationError, match="nothing else trains the teacher's projector"):
        HeteroAKD.Params(projector_weight_after=0.0)
    HeteroAKD.Params(projector_weight=0.0, projector_weight_after=0.0, detach=False)


def test_reliability_maps_are_those_of_the_evaluated_projectors():
    module = method().train()
    student, teacher, batch = outputs(STUDENT, 0), outputs(TEACHER, 1), label_batch(STUDENT)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    share, weights = module.reliability_maps(student, teacher, batch.labels)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert share.shape == weights.shape == (2, 4, 4, 4)
    assert not share.requires_grad
    module.eval()
    with torch.no_grad():
        student_z = module.student_projector(student.embedding)
        teacher_z = heteroakd.resize_map(module.teacher_projector(teacher.embedding), (4, 4))
    labels = labels_at(batch.labels, (4, 4))
    maps = slow_maps(student_z, teacher_z, labels, "bce_sigmoid", "space")
    np.testing.assert_allclose(weights.numpy(), maps["W"], rtol=1e-4, atol=1e-7)
    assert method(resolution="label").reliability_maps(student, teacher, batch.labels)[0].shape == (2, 4, 32, 32)


# --- properties ------------------------------------------------------------------------------------------------------

cases = st.builds(
    scores_and_labels,
    classes=st.integers(2, 6),
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    scale=st.sampled_from([0.1, 1.0, 4.0, 20.0]),
)
properties = settings(max_examples=40, deadline=None)


@properties
@given(cases, st.sampled_from(RELIABILITIES), st.sampled_from(AXES))
def test_equal_networks_share_evenly_and_gain_nothing(case, reliability, axis):
    z, _, labels = case
    share, hybrid_z = heteroakd.knowledge_mixing(z, z.clone(), labels, reliability)
    gain, _ = heteroakd.knowledge_evaluation(z, hybrid_z, labels, reliability, axis)
    assert (share == 0.5).all()
    assert torch.equal(hybrid_z, z)
    assert (gain == 0).all()


@properties
@given(cases, st.sampled_from(["bce_sigmoid", "bce_softmax", "ce_pixel"]))
def test_a_teacher_that_is_right_gets_the_whole_share(case, reliability):
    student_z, _, labels = case
    valid = (labels != IGNORE).unsqueeze(1)
    one_hot = torch.nn.functional.one_hot(labels.where(labels != IGNORE, 0), student_z.shape[1]).permute(0, 3, 1, 2)
    student_z = student_z.clamp(-4, 4)  # a student that errs at least a little
    share, _ = heteroakd.knowledge_mixing(student_z, 80.0 * (2 * one_hot - 1), labels, reliability)
    assert (share.masked_select(valid) > 0.999).all()


@properties
@given(cases)
def test_mixing_is_never_worse_than_the_harmonic_mean(case):
    student_z, teacher_z, labels = case
    H_s, H_t = (heteroakd.per_class_entropy(z, labels) for z in (student_z, teacher_z))
    _, hybrid_z = heteroakd.knowledge_mixing(student_z, teacher_z, labels)
    H_hat = heteroakd.per_class_entropy(hybrid_z, labels)
    bound = 2 * H_t.double() * H_s / (H_t.double() + H_s).clamp_min(1e-300)
    assert (H_hat <= bound * (1 + 1e-4) + 1e-6).all()
    gain, _ = heteroakd.knowledge_evaluation(student_z, hybrid_z, labels)
    assert (gain[H_s > 1.001 * H_t + 1e-5] > 0).all()


@properties
@given(cases, st.sampled_from(RELIABILITIES), st.sampled_from(AXES), st.booleans())
def test_weights_sum_to_one_where_labels_are(case, reliability, axis, nothing_in_the_first):
    student_z, teacher_z, labels = case
    if nothing_in_the_first:
        labels[0] = IGNORE
    valid = (labels != IGNORE).unsqueeze(1)
    _, weights = heteroakd.knowledge_evaluation(student_z, teacher_z, labels, reliability, axis)
    assert (weights.masked_select(~valid) == 0).all()
    sums = weights.sum(dim=(2, 3)) if axis == "space" else weights.sum(dim=1)
    counted = valid.any(dim=3).any(dim=2).expand_as(sums) if axis == "space" else valid.squeeze(1)
    torch.testing.assert_close(sums, counted.float(), rtol=1e-4, atol=1e-5)


@properties
@given(cases, st.sampled_from(RELIABILITIES), st.sampled_from(AXES), st.sampled_from(FORMS))
def test_no_gradient_reaches_targets_and_ignored_pixels_weigh_nothing(case, reliability, axis, form):
    student_z, teacher_z, labels = case
    student_z, teacher_z = student_z.clone().requires_grad_(), teacher_z.clone().requires_grad_()
    params = HeteroAKD.Params(reliability=reliability, kem_axis=axis, form=form)
    loss = heteroakd.heteroakd_loss(student_z, teacher_z, labels, params)
    loss.backward()
    assert teacher_z.grad is None
    ignored = (labels == IGNORE).unsqueeze(1)
    assert (student_z.grad.masked_select(ignored) == 0).all()
    elsewhere = student_z.detach().masked_fill(ignored, 1e4), teacher_z.detach().masked_fill(ignored, -1e4)
    assert heteroakd.heteroakd_loss(*elsewhere, labels, params).item() == pytest.approx(loss.item(), rel=1e-6)


# --- the edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("classes", [2, 19])
def test_few_classes_and_single_images(batch_size, classes):
    specs = spec(6, 8, classes=classes), spec(10, 4, classes=classes)
    module = method(0, *specs)
    given = [outputs(of, seed, batch_size) for seed, of in enumerate(specs)]
    terms = module(*given, label_batch(specs[0], batch_size), 1.0)
    assert all(value.shape == () and value.isfinite() for value in terms.values())


@pytest.mark.parametrize("resolution", ["map", "label"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("reliability", RELIABILITIES)
def test_images_without_a_label_give_zero_and_finite_gradients(resolution, axis, detach, reliability):
    module = method(resolution=resolution, kem_axis=axis, detach=detach, reliability=reliability)
    given, batch = (outputs(STUDENT, 0), outputs(TEACHER, 1)), label_batch(STUDENT)
    batch.labels[:] = IGNORE
    terms = module(*given, batch, 1.0)
    assert all(value.item() == 0 for value in terms.values())
    sum(terms.values()).backward()
    assert given[0].embedding.grad.abs().sum() == 0
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in module.parameters())


@pytest.mark.parametrize("reliability", RELIABILITIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("size", [12.0, 90.0, 100.0, 200.0])
def test_large_scores_stay_finite(reliability, form, detach, size):
    signs_s, signs_t, labels = scores_and_labels(3)
    student_z, teacher_z = (size * each.sign() for each in (signs_s, signs_t))
    student_z.requires_grad_(), teacher_z.requires_grad_()
    weights = {} if detach else {"projector_weight": 0.0}
    params = HeteroAKD.Params(reliability=reliability, form=form, detach=detach, **weights)
    loss = heteroakd.heteroakd_loss(student_z, teacher_z, labels, params)
    loss.backward()
    assert loss.isfinite()
    assert student_z.grad.isfinite().all()
    assert detach or teacher_z.grad.isfinite().all()
    _, hybrid_z = heteroakd.knowledge_mixing(student_z, teacher_z, labels, reliability)
    _, found = heteroakd.knowledge_evaluation(student_z, hybrid_z, labels, reliability)
    torch.testing.assert_close(found.sum(dim=(2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_computed_in_float32(dtype):
    module = method()
    student, teacher, batch = outputs(STUDENT, 0), outputs(TEACHER, 1), label_batch(STUDENT)
    halves = [each.map(lambda tensor: tensor.detach().to(dtype)) for each in (student, teacher)]
    with torch.autocast("cpu", dtype=dtype):
        terms = module(*halves, batch, 1.0)
    exact = module(*(each.map(Tensor.float) for each in halves), batch, 1.0)
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert all(torch.equal(terms[name], exact[name]) for name in exact)


@pytest.mark.parametrize("resolution", ["map", "label"])
def test_keeps_a_few_maps_of_the_students_logits_between_forward_and_backward(resolution):
    classes = 20
    specs = spec(32, 8, classes=classes, image_size=128), spec(48, 4, classes=classes, image_size=128)
    module = method(0, *specs, resolution=resolution)
    given, batch = [outputs(of, seed) for seed, of in enumerate(specs)], label_batch(specs[0])
    terms, kept = [], {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    already = {value.untyped_storage().data_ptr() for each in given for value in (each.logits, each.embedding)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms.append(module(*given, batch, 1.0))
    sum(terms[0].values()).backward()
    at_student_stride = given[0].logits.numel() * 4
    at_teacher_stride = 4 * at_student_stride  # one map: what the teacher projector's batch norm reads
    new = sum(size for pointer, size in kept.items() if pointer not in already)
    # At the labels' size the teacher's scores stay on its grid until they are resized in the backward pass.
    assert new <= 12 * at_student_stride + (1 if resolution == "map" else 2) * at_teacher_stride
    assert new < 2 * 128 * 128 * classes * 4  # less than a single K-class map of the images' size


# --- classes without a pixel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
def test_absent_classes_are_counted_or_skipped(axis):
    student_z, teacher_z, labels = scores_and_labels(classes=4, seed=3, size=(4, 5), scale=1.0)
    labels = labels.where(labels != 2, 1)  # no image has class 2
    labels[0] = labels[0].where(labels[0] != 3, 0)
    maps = slow_maps(student_z, teacher_z, labels, "bce_sigmoid", axis)
    target = torch.from_numpy(np.nan_to_num(maps["Zhat"])).double().sigmoid()
    cost = torch.nn.functional.binary_cross_entropy_with_logits(student_z.double(), target, reduction="none")
    each = torch.from_numpy(np.nan_to_num(maps["W"])) * cost.nan_to_num()
    present = torch.tensor([[bool((image == label).any()) for label in range(4)] for image in labels])
    assert not present[:, 2].any()
    assert not present[0, 3]
    valid = (labels != IGNORE).sum()
    skipped = each.sum(dim=(2, 3))[present].mean() if axis == "space" else each.sum(dim=(2, 3))[present].sum() / valid
    for choice, expected in (
        ("count", slow_transfer(student_z, maps, labels, 1.0, "bernoulli", axis)),
        ("skip", skipped),
    ):
        params = HeteroAKD.Params(absent_classes=choice, kem_axis=axis)
        found = heteroakd.heteroakd_loss(student_z, teacher_z, labels, params)
        assert found.item() == pytest.approx(float(expected), rel=1e-4)


def test_the_picture_of_w_shows_what_the_loss_sums():
    for choice in ("count", "skip"):
        module, batch = method(absent_classes=choice).eval(), label_batch(STUDENT)
        student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
        _, weights = module.reliability_maps(student, teacher, batch.labels)
        labels = labels_at(batch.labels, (4, 4))
        shown = module.figure(student, teacher, batch.labels).panels[1].values
        for image, classes in enumerate(labels):
            counted = [label for label in range(4) if choice == "count" or (classes == label).any()]
            known = classes != IGNORE
            total = sum(weights[image, label] for label in counted) * known.sum() / max(1, len(counted))
            torch.testing.assert_close(shown[image][known], total[known].double(), rtol=1e-5, atol=1e-6)
            assert shown[image][~known].isnan().all()
            if known.any():
                assert shown[image][known].mean() == pytest.approx(1)
