"""FCFD against its equation path by path, its draw of paths, and where the gradient must not go."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from heterokd.errors import PairError
from heterokd.methods._projectors import Bridge
from heterokd.methods.fcfd import CROSSINGS, FCFD, PATHS, BatchStatistics, ConvBridge, draw_paths, fcfd_loss, map_loss
from heterokd.methods.kd import kd_loss
from heterokd.networks.classifier import Network
from heterokd.networks.network import build_network
from heterokd.outputs import Batch, Outputs, OutputSpec, Signal, StageSpec

K, B = 5, 3
BATCH = Batch(torch.empty(B, 3, 1, 1), torch.tensor([0, 3, 4]), torch.arange(B))


def spec_of(kind: str, image_size: int, narrow: int) -> OutputSpec:
    isotropic = kind == "mlp"
    widths = (3 * narrow,) * 4 if isotropic else (narrow, narrow + 3, 2 * narrow, 3 * narrow)
    strides = (16,) * 4 if isotropic else (4, 8, 16, 32)
    stages = tuple(StageSpec(width, stride, kind) for width, stride in zip(widths, strides, strict=True))
    return OutputSpec(K, widths[-1], stages, image_size)


class TinyTail(nn.Module):
    """A network of one pointwise layer and a resize per stage, that refuses any map but that of stage j - 1."""

    def __init__(self, spec: OutputSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = [stage.channels for stage in spec.stages]
        self.layers = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in itertools.pairwise(channels))
        self.head = nn.Linear(channels[-1], spec.num_classes)

    def step(self, x: Tensor, j: int) -> Tensor:
        side = self.spec.side(j - 1)
        assert x.shape[1:] == (self.spec.stages[j - 2].channels, side, side)
        return nn.functional.adaptive_avg_pool2d(self.layers[j - 2](x).tanh(), self.spec.side(j))

    def forward(self, x: Tensor, j: int) -> Tensor:
        for stage in range(j, 5):
            x = self.step(x, stage)
        assert x.shape[1] == self.spec.stages[3].channels
        return self.head(x.mean(dim=(2, 3)))


def leaves(spec: OutputSpec, owner: str) -> Outputs:
    """Everything a network could give, with gradient, so that a gradient that must not flow would show."""
    maps = tuple(
        torch.randn(B, stage.channels, spec.side(i), spec.side(i), requires_grad=True)
        for i, stage in enumerate(spec.stages, 1)
    )
    return Outputs(torch.randn(B, K, requires_grad=True), stages=maps, tail=TinyTail(spec), owner=owner)


def run(student_spec: OutputSpec, teacher_spec: OutputSpec, params: FCFD.Params | None = None, progress: float = 1.0):
    method = FCFD(params, student_spec, teacher_spec)
    student, teacher = leaves(student_spec, "student"), leaves(teacher_spec, "teacher")
    teacher.tail.requires_grad_(False)
    return method, student, teacher, method(student, teacher, BATCH, progress)


def slow_mse(a: Tensor, b: Tensor) -> float:
    pairs = list(zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True))
    return sum((x - y) ** 2 for x, y in pairs) / len(pairs)


def slow_map_loss(a: Tensor, b: Tensor, is_last: bool) -> float:
    pooled = slow_mse(a.flatten(2).mean(dim=2), b.flatten(2).mean(dim=2)) if is_last else 0.0
    return slow_mse(a, b) + pooled


@pytest.mark.parametrize("is_last", [True, False])
def test_map_loss(is_last):
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert map_loss(a, b, is_last=is_last).item() == pytest.approx(slow_map_loss(a, b, is_last), rel=1e-5)


def test_fcfd_loss_adds_distillation_and_appearance():
    student, teacher, *paths = torch.randn(4, B, K)
    ours, theirs = ([torch.randn(B, width, 2, 2) for width in (2, 3, 4, 5)] for _ in range(2))
    params = FCFD.Params(temperature=4, kl_weight=0.3, path_kl_weight=0.7, feature_weight=2)
    expected = 0.3 * kd_loss(student, teacher, 4) + 0.7 * sum(kd_loss(path, teacher, 4) for path in paths)
    expected += 2 * sum(slow_map_loss(a, b, i == 3) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
    torch.testing.assert_close(fcfd_loss(student, teacher, paths, ours, theirs, params), expected)


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize(("student_kind", "teacher_kind"), [("cnn", "cnn"), ("mlp", "cnn"), ("cnn", "attention")])
def test_forward_is_the_equation(count, student_kind, teacher_kind):
    torch.manual_seed(count)
    params = FCFD.Params(temperature=2, kl_weight=0.2, path_kl_weight=0.3, feature_weight=0.4, paths=count)
    method, student, teacher, losses = run(spec_of(student_kind, 64, 4), spec_of(teacher_kind, 96, 8), params)
    path_kl = function = 0.0
    for student_first, k in draw_paths(count, BATCH.index, 1.0):
        if student_first:
            x = method.to_teacher[k - 1](student.stages[k - 1])
            logits = teacher.tail(x, k + 1)
            for i in range(k + 1, 5):
                x = teacher.tail.step(x, i)
                function += slow_map_loss(x, teacher.stages[i - 1], i == 4)
        else:
            logits = student.tail(method.to_student[k - 1](teacher.stages[k - 1]), k + 1)
        path_kl += kd_loss(logits, teacher.logits, 2).item()
    appearance = sum(
        slow_map_loss(method.to_teacher[i](student.stages[i]), teacher.stages[i], i == 3) for i in range(4)
    )
    bridge = sum(slow_mse(method.to_student[i](teacher.stages[i]), student.stages[i]) for i in range(3))
    expected = {
        "kl": 0.2 * kd_loss(student.logits, teacher.logits, 2).item(),
        "path_kl": 0.3 * path_kl,
        "appearance": 0.4 * appearance,
        "function": 0.4 * function,
        "bridge": 0.4 * bridge,
    }
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_same_images_at_the_same_progress_draw_the_same_paths():
    index = torch.tensor([5, 1, 9])
    assert draw_paths(2, index, 0.25) == draw_paths(2, index.clone(), 0.25)
    draws = [tuple(draw_paths(2, index, step / 500)) for step in range(500)]
    assert len({frozenset(draw) for draw in draws}) == 15, "every two of the six paths are drawn at some time"
    assert all(first != second for first, second in draws)
    assert len({tuple(draw_paths(2, index + shift, 0.25)) for shift in range(50)}) > 5
    assert sorted(draw_paths(6, index, 0.5)) == sorted(PATHS)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.05, 0.25), (0.2, 1.0), (1.0, 1.0)])
def test_warmup_holds_for_the_terms_of_maps_alone(progress, share):
    torch.manual_seed(0)
    method, student, teacher, losses = run(
        spec_of("cnn", 64, 4), spec_of("cnn", 96, 8), FCFD.Params(warmup=0.2, paths=6), progress
    )
    method.params = method.params.model_copy(update={"warmup": 0.0})
    full = method(student, teacher, BATCH, progress)
    for name, value in losses.items():
        torch.testing.assert_close(value, full[name] * (1.0 if name.endswith("kl") else share))


def test_function_term_trains_the_student_s_front_through_the_frozen_teacher():
    method, student, teacher, losses = run(spec_of("cnn", 64, 4), spec_of("attention", 64, 8), FCFD.Params(paths=6))
    losses["function"].backward()
    assert all(student.stages[k - 1].grad.abs().sum() > 0 for k in CROSSINGS)
    assert student.stages[3].grad is None
    assert all(weight.grad is None for weight in student.tail.parameters())
    assert all(weight.grad is None for weight in method.to_student.parameters())
    assert all(each.grad is None for each in (teacher.logits, *teacher.stages, *teacher.tail.parameters()))


def test_bridge_term_moves_the_bridges_to_the_student_and_nothing_else():
    method, student, teacher, losses = run(spec_of("attention", 64, 4), spec_of("cnn", 64, 8))
    losses["bridge"].backward()
    assert all(weight.grad.abs().sum() > 0 for weight in method.to_student.parameters())
    assert all(weight.grad is None for weight in method.to_teacher.parameters())
    assert all(each.grad is None for each in (*student.stages, *student.tail.parameters(), *teacher.stages))


@pytest.mark.parametrize("student_first", [True, False])
def test_path_term_trains_whatever_the_student_lends(student_first):
    drawn = (step / 100 for step in range(100) if draw_paths(1, BATCH.index, step / 100) == [(student_first, 2)])
    specs = spec_of("cnn", 64, 4), spec_of("cnn", 96, 8)
    method, student, teacher, losses = run(*specs, FCFD.Params(paths=1), progress=next(drawn))
    losses["path_kl"].backward()
    assert [each.grad is not None for each in student.stages] == [False, student_first, False, False]
    tail_grads = [weight.grad is not None for layer in student.tail.layers for weight in layer.parameters()]
    assert tail_grads == [False] * 2 + [not student_first] * 4  # stage 2 is not run, stages 3 and 4 are
    bridges = method.to_teacher if student_first else method.to_student
    assert bridges[1].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in (teacher.logits, *teacher.stages, *teacher.tail.parameters()))


def test_bridges_between_two_cnns_are_convolutions():
    both = FCFD(None, spec_of("cnn", 64, 4), spec_of("cnn", 96, 8))
    assert all(isinstance(bridge, ConvBridge) for bridge in (*both.to_teacher, *both.to_student))
    unlike = FCFD(None, spec_of("cnn", 64, 4), spec_of("mlp", 96, 8))
    assert all(isinstance(bridge, Bridge) for bridge in (*unlike.to_teacher, *unlike.to_student))


@pytest.mark.parametrize("side", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("target_side", [1, 3, 8])
def test_conv_bridge_meets_every_grid(side, target_side):
    bridge = ConvBridge(2, side, 3, target_side)
    assert bridge(torch.randn(2, 2, side, side)).shape == (2, 3, target_side, target_side)


def test_batch_statistics_give_the_same_maps_and_keep_the_running_ones():
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2) + 5
    with BatchStatistics():
        inside = norm(x)
    assert norm.running_mean.abs().sum() == 0
    torch.testing.assert_close(inside, norm(x))
    assert norm.running_mean.abs().sum() > 0
    norm.eval()
    with BatchStatistics():
        torch.testing.assert_close(norm(x), nn.functional.batch_norm(x, norm.running_mean, norm.running_var))


def network(name: str) -> Network:
    options = {
        "test_vit": {"img_size": 32, "patch_size": 8},
        "mixer_s16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 4},
    }
    return build_network(name, K, options.get(name), image_size=None if name in options else 64)


@pytest.mark.parametrize(
    ("student_name", "teacher_name"),
    [
        ("test_resnet", "test_vit"),
        ("test_vit", "test_resnet"),
        ("mixer_s16_224", "test_efficientnet"),
        ("test_efficientnet", "mixer_s16_224"),
    ],
)
def test_real_networks(student_name, teacher_name):
    torch.manual_seed(0)
    student, teacher = network(student_name), network(teacher_name).eval().requires_grad_(False)
    method = FCFD(FCFD.Params(paths=6), student.spec, teacher.spec)
    images = torch.rand(4, 3, 64, 64)
    batch = Batch(images, torch.tensor([1, 2, 0, 4]), torch.arange(4))
    with torch.no_grad():
        taught = teacher(images, method.teacher_needs)
    outputs = student(images, method.student_needs)
    running = {key: value.clone() for key, value in student.state_dict().items() if "running" in key}
    losses = method(outputs, taught, batch, 1.0)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(parameter.grad is not None for parameter in (*method.parameters(), *student.parameters()))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(student.state_dict()[key], value) for key, value in running.items())


@pytest.mark.parametrize("name", ["test_resnet", "mixer_s16_224"])  # class tokens start afresh at a crossing
def test_a_teacher_that_teaches_itself_through_perfect_bridges_has_nothing_to_learn(name):
    """With identities for bridges, every path of a network with itself ends in its own maps and logits."""
    torch.manual_seed(0)
    teacher = network(name).eval().requires_grad_(False)
    method = FCFD(FCFD.Params(paths=6), teacher.spec, teacher.spec)
    method.to_teacher = nn.ModuleList(nn.Identity() for _ in range(4))
    method.to_student = nn.ModuleList(nn.Identity() for _ in range(3))
    images = torch.rand(2, 3, 64, 64)
    outputs = teacher(images, method.teacher_needs)
    batch = Batch(images, torch.tensor([1, 2]), torch.arange(2))
    assert sum(method(outputs, outputs, batch, 1.0).values()).item() == pytest.approx(0, abs=1e-6)


def test_norms_of_the_batch_are_the_teacher_in_training_mode():
    """As the authors' program: maps, logits and mixed paths are those of a teacher that trains."""
    torch.manual_seed(0)
    teacher, student = network("test_resnet").requires_grad_(False), network("test_efficientnet")
    images, labels = torch.rand(4, 3, 64, 64), torch.tensor([1, 2, 0, 4])
    with torch.no_grad():
        for _ in range(3):  # running statistics that are not those of this batch
            teacher.train()(torch.rand(4, 3, 64, 64), Signal.LOGITS)
    running = {key: value.clone() for key, value in teacher.state_dict().items()}
    batch = Batch(images, labels, torch.arange(4))

    method = FCFD(FCFD.Params(paths=6, teacher_norms="batch"), student.spec, teacher.spec)
    assert method.teacher_needs == Signal.TAIL | Signal.STEM
    outputs = student(images, method.student_needs)
    with torch.no_grad():
        taught = teacher.eval()(images, method.teacher_needs)
    logits, maps = method._targets(taught)
    terms = method(outputs, taught, batch, 1.0)
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in running.items())

    with torch.no_grad():
        training, expected = teacher.train(), []
        x = taught.stem
        for j in (1, 2, 3, 4):
            x = taught.tail.step(x, j)
            expected.append(x)
        torch.testing.assert_close(logits, taught.tail(x, 5))
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = FCFD(FCFD.Params(paths=6), student.spec, teacher.spec)
    plain.load_state_dict(method.state_dict())
    as_trained = Outputs(logits, stages=tuple(maps), tail=training(images, Signal.TAIL).tail)
    for name, value in plain(outputs, as_trained, batch, 1.0).items():
        torch.testing.assert_close(terms[name], value, msg=name)
    assert not torch.allclose(teacher.eval()(images, Signal.STAGES).stages[3], maps[3])


def test_norms_of_the_batch_need_the_input_of_stage_1():
    spec = spec_of("cnn", 32, 4)
    with pytest.raises(PairError, match="teacher_norms: running"):
        FCFD(FCFD.Params(teacher_norms="batch"), spec, spec)
