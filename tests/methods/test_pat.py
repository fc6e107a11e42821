"""PAT against its equations in loops, a gate that is nothing at zero, and where the gradient must and must not go."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from heterokd.methods.kd import kd_loss
from heterokd.methods.pat import (
    PAT,
    Align,
    Prompt,
    RegionAttention,
    RegionEmbedding,
    SqueezeExcitation,
    pat_loss,
    sinusoids,
)
from heterokd.networks.classifier import Network
from heterokd.networks.network import build_network
from heterokd.outputs import Batch, OutputSpec, Signal, StageSpec

K = 5
NARROW = PAT.Params(width=16)


def slow_hcl(a: Tensor, b: Tensor) -> float:
    """Squared differences of window means, window by window, for side lengths that 4, 2 and 1 divide."""
    side, weight, total, weights = a.shape[2], 1.0, 0.0, 0.0
    for level in (side, *(level for level in (4, 2, 1) if level < side)):
        cell = side // level
        differences = []
        for row, column in itertools.product(range(level), repeat=2):
            window = (..., slice(row * cell, (row + 1) * cell), slice(column * cell, (column + 1) * cell))
            differences.append((a[window].double().mean(dim=(2, 3)) - b[window].double().mean(dim=(2, 3))) ** 2)
        total, weights = total + weight * torch.stack(differences).mean().item(), weights + weight
        weight /= 2
    return total / weights


def test_pat_loss():
    torch.manual_seed(0)
    student, teacher, prompted = torch.randn(3, 4, K)
    ours, theirs = ([torch.randn(4, width, side, side) for width, side in ((2, 8), (3, 4), (4, 2))] for _ in range(2))
    params = PAT.Params(temperature=3, kl_weight=0.2, feature_weight=0.3, prompt_weight=0.4)
    expected = 0.2 * kd_loss(student, teacher, 3) + 0.4 * kd_loss(prompted, teacher)
    expected += 0.3 * sum(slow_hcl(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(pat_loss(student, teacher, prompted, ours, theirs, params), expected)


def test_pat_loss_moves_both_sides_of_the_features_and_never_the_plain_teacher():
    student, teacher, prompted, ours, theirs = (
        torch.randn(*shape, requires_grad=True) for shape in [(3, K)] * 3 + [(3, 2, 8, 8)] * 2
    )
    pat_loss(student, teacher, prompted, [ours], [theirs]).backward()
    torch.testing.assert_close(ours.grad, -theirs.grad)
    assert student.grad.abs().sum() > 0
    assert prompted.grad.abs().sum() > 0
    assert teacher.grad is None


def test_sinusoids():
    table = sinusoids(64, 10)
    for position, column in itertools.product((0, 1, 17, 63), range(10)):
        angle = position / 10000 ** (2 * (column // 2) / 10)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[position, column].item() == pytest.approx(expected, abs=1e-5)
    assert sinusoids(3, 5).shape == (3, 5)


@pytest.mark.parametrize("side", [1, 2, 4, 7, 8, 14])
def test_region_embedding_gives_sixteen_tokens_row_by_row(side):
    embedding = RegionEmbedding(3, side, 6)
    x = torch.randn(2, 3, side, side)
    tokens = embedding(x)
    assert tokens.shape == (2, 16, 6)
    patch = math.ceil(side / 4)
    wide = nn.functional.interpolate(x, size=(4 * patch, 4 * patch), mode="nearest")
    for token, (row, column) in enumerate(itertools.product(range(4), repeat=2)):
        window = wide[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        expected = (embedding.embed.weight * window.unsqueeze(1)).sum(dim=(2, 3, 4)) + embedding.embed.bias
        torch.testing.assert_close(tokens[:, token], expected, rtol=1e-4, atol=1e-5)


def test_region_attention_head_by_head():
    torch.manual_seed(0)
    stages = tuple(StageSpec(width, stride) for width, stride in ((3, 4), (4, 8), (5, 16), (6, 32)))
    attention = RegionAttention(OutputSpec(K, 6, stages, 64), 16)
    maps = [torch.randn(2, stage.channels, 64 // stage.stride, 64 // stage.stride) for stage in stages]
    tokens = torch.cat([embed(each) for embed, each in zip(attention.embeddings, maps, strict=True)], dim=1)
    query, key, value = attention.qkv(attention.norm(tokens)).split(16, dim=2)
    query, key = query + sinusoids(64, 16), key + sinusoids(64, 16)
    heads = []
    for h in range(8):
        part = slice(2 * h, 2 * h + 2)
        scores = query[..., part] @ key[..., part].mT / math.sqrt(2)
        heads.append(scores.softmax(dim=-1) @ value[..., part])
    expected = torch.cat(heads, dim=2)
    for stage, regions in enumerate(attention(maps)):
        assert regions.shape == (2, 16, 4, 4)
        for row, column in itertools.product(range(4), repeat=2):
            torch.testing.assert_close(regions[:, :, row, column], expected[:, 16 * stage + 4 * row + column])


def test_an_image_s_regions_do_not_depend_on_its_place_in_the_batch():
    stages = (StageSpec(3, 16),) * 4
    attention = RegionAttention(OutputSpec(K, 3, stages, 64), 16)
    maps = [torch.randn(3, 3, 4, 4) for _ in range(4)]
    turned = attention([each.flip(0) for each in maps])
    for regions, other in zip(attention(maps), turned, strict=True):
        torch.testing.assert_close(regions, other.flip(0))


@pytest.mark.parametrize("kind", ["cnn", "attention", "mlp"])
@pytest.mark.parametrize(("side", "target_side"), [(4, 1), (4, 4), (4, 14), (7, 3)])
def test_align_meets_every_shape(kind, side, target_side):
    for norm_grid in ("target", "source"):
        align = Align(6, side, 10, target_side, kind, norm_grid)
        assert align(torch.randn(2, 6, side, side)).shape == (2, 10, target_side, target_side)


@pytest.mark.parametrize("target_side", [1, 2, 4, 6, 8])
def test_align_takes_statistics_over_the_target_grid(target_side):
    """A grid of whole repetitions has the statistics of the small one; every other has not."""
    align, before = (Align(6, 4, 10, target_side, "cnn", norm_grid) for norm_grid in ("target", "source"))
    before.load_state_dict(align.state_dict())
    x = torch.randn(5, 6, 4, 4)
    wide = nn.functional.interpolate(x, size=(target_side, target_side), mode="nearest")
    unit = (wide - wide.mean((0, 2, 3), keepdim=True)) / (wide.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    expected = torch.einsum("bchw,dc->bdhw", unit, align.channel_mixer.weight[:, :, 0, 0])
    torch.testing.assert_close(align(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(before(x), expected, rtol=1e-4, atol=1e-4) == (target_side % 4 == 0)


def test_squeeze_excitation_weighs_the_map_it_is_given():
    layer, x = SqueezeExcitation(32), torch.randn(2, 32, 4, 4)
    weights = layer(x) / x
    torch.testing.assert_close(weights, weights[:, :, :1, :1].expand_as(x), rtol=1e-4, atol=1e-5)
    assert ((weights > 0) & (weights < 1)).all()


@pytest.mark.parametrize("kind", ["cnn", "attention"])
@pytest.mark.parametrize(("channels", "side"), [(6, 8), (8, 4)])
def test_a_prompt_whose_gate_is_zero_changes_nothing_but_learns(kind, channels, side):
    prompt = Prompt(StageSpec(channels, 4, kind), side, StageSpec(8, 8, kind), 4, 0.0, "target")
    x, feedback = torch.randn(2, channels, side, side), torch.randn(2, 8, 4, 4)
    assert torch.equal(prompt(x, feedback), x)
    prompt(x, feedback).square().sum().backward()
    assert prompt.gate.grad.abs() > 0
    with torch.no_grad():
        prompt.gate.fill_(0.5)
    assert not torch.equal(prompt(x, feedback), prompt(x, -feedback)), "feedback reaches the prompt"


def network(name: str) -> Network:
    options = {
        "test_vit": {"img_size": 32, "patch_size": 8},
        "mixer_s16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 4},
    }
    return build_network(name, K, options.get(name), image_size=None if name in options else 64)


def setting(student_name: str, teacher_name: str, params: PAT.Params):
    torch.manual_seed(0)
    student, teacher = network(student_name), network(teacher_name).eval().requires_grad_(False)
    method = PAT(params, student.spec, teacher.spec)
    images = torch.rand(4, 3, 64, 64)
    batch = Batch(images, torch.tensor([1, 2, 0, 4]), torch.arange(4))
    with torch.no_grad():
        taught = teacher(images, method.teacher_needs)
    return student, teacher, method, taught, batch


PAIRS = [
    ("test_resnet", "test_vit"),
    ("test_vit", "test_resnet"),
    ("mixer_s16_224", "test_efficientnet"),
    ("test_efficientnet", "mixer_s16_224"),
]


@pytest.mark.parametrize(("student_name", "teacher_name"), PAIRS)
@pytest.mark.parametrize("prompted_stages", ["1234", "3"])
def test_real_networks(student_name, teacher_name, prompted_stages):
    params = NARROW.model_copy(update={"prompted_stages": prompted_stages})
    student, teacher, method, taught, batch = setting(student_name, teacher_name, params)
    losses = method(student(batch.images, method.student_needs), taught, batch, 0.5)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(parameter.grad is not None for parameter in (*method.parameters(), *student.parameters()))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(method.prompts[j].gate.grad.abs() > 0 for j in prompted_stages)


@pytest.mark.parametrize(("student_name", "teacher_name"), PAIRS)
def test_with_gates_at_zero_the_prompted_teacher_is_the_plain_one(student_name, teacher_name):
    """Class tokens, too, have come through four stages run one by one."""
    params = NARROW.model_copy(update={"initial_gate": 0.0})
    student, _, method, taught, batch = setting(student_name, teacher_name, params)
    losses = method(student(batch.images, method.student_needs), taught, batch, 0.5)
    assert losses["prompts"].item() == pytest.approx(0, abs=1e-6)
    losses["features"].backward()
    assert all(prompt.gate.grad.abs() > 0 for prompt in method.prompts.values())


def test_the_terms_train_what_they_should():
    student, _, method, taught, batch = setting("test_resnet", "test_vit", NARROW)
    losses = method(student(batch.images, method.student_needs), taught, batch, 0.5)
    losses["prompts"].backward(retain_graph=True)
    assert all(weight.grad is not None for weight in method.prompts.parameters())
    assert all(weight.grad is None for weight in (*method.aligns.parameters(), *student.parameters()))
    losses["features"].backward()
    assert all(weight.grad is not None for weight in (*method.aligns.parameters(), *method.attention.parameters()))
    assert any(weight.grad is not None for weight in student.parameters())


def test_feedback_comes_from_the_same_batch_and_nothing_is_kept():
    student, _, method, taught, batch = setting("test_vit", "test_resnet", NARROW)
    method.eval()  # batch norms keep running statistics; nothing else may be remembered
    outputs = student(batch.images, method.student_needs)
    first, second = (method(outputs, taught, batch, 0.5) for _ in range(2))
    assert first == second
    assert not method._buffers
    assert Signal.STEM in method.teacher_needs
