"""What every method owes its callers, checked on every file of `heterokd/methods/`: a new file needs no edit here.

Each check runs once for every task that a method declares, on pairs of that task.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from heterokd.domains import Choice, domains
from heterokd.errors import MissingSignal, PairError
from heterokd.method import Method, summary
from heterokd.methods import METHODS
from heterokd.outputs import (
    EVERY_NETWORK,
    IGNORE,
    Batch,
    Losses,
    Outputs,
    OutputSpec,
    PreActivations,
    Signal,
    StageSpec,
)

BATCH_SIZE, NUM_CLASSES = 8, 10
CROP, SCENES = (64, 96), 4  # height and width of segmentation's images, and how many are in a batch: nothing is square
BASELINES = {"scratch"}  # distils nothing: no equation, no paper, nothing to search
SIGNALS = list(EVERY_NETWORK | Signal.CLASS_MAPS | Signal.PRE_ACTIVATIONS)


def spec(kind: str, widths: tuple[int, ...], image_size: int) -> OutputSpec:
    """Three structures: a pyramid of maps (cnn, hierarchical), or one token grid throughout (isotropic, mlp).

    The isotropic one reads its class token (no class maps); BatchNorm and ReLU end the stages of the cnn alone.
    """
    strides = (4, 8, 16, 32) if kind in ("cnn", "hierarchical") else (16, 16, 16, 16)
    made_of = {"hierarchical": "attention", "isotropic": "attention"}.get(kind, kind)
    serves = EVERY_NETWORK
    if kind != "isotropic":
        serves |= Signal.CLASS_MAPS
    if kind == "cnn":
        serves |= Signal.PRE_ACTIVATIONS
    return OutputSpec(
        num_classes=NUM_CLASSES,
        embedding_dim=widths[-1],
        stages=tuple(StageSpec(width, stride, made_of) for width, stride in zip(widths, strides, strict=True)),
        image_size=image_size,
        prefix_tokens=1 if kind == "isotropic" else 0,
        stem=StageSpec(widths[0], strides[0]),
        serves=serves,
    )


def map_spec(kind: str, widths: tuple[int, ...], embedding_dim: int, logits_stride: int) -> OutputSpec:
    """A segmentation network: a dilated CNN or a pyramid of attention stages, under a decoder of any stride."""
    strides = (4, 8, 8, 8) if kind == "cnn" else (4, 8, 16, 32)
    return OutputSpec(
        num_classes=NUM_CLASSES,
        embedding_dim=embedding_dim,
        stages=tuple(StageSpec(width, stride, kind) for width, stride in zip(widths, strides, strict=True)),
        image_size=CROP[0],
        serves=Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES,
        logits_stride=logits_stride,
    )


# Unlike widths and unlike image sizes: no method may count on equal shapes, not even between two of a kind.
STUDENTS = {
    "cnn": spec("cnn", (8, 16, 24, 40), 64),
    "hierarchical": spec("hierarchical", (16, 32, 64, 96), 64),
    "isotropic": spec("isotropic", (32, 32, 32, 32), 64),
    "mlp": spec("mlp", (48, 48, 48, 48), 64),
    "cnn/8": map_spec("cnn", (8, 16, 24, 40), 20, 8),
    "attention/4": map_spec("attention", (16, 32, 64, 96), 28, 4),
}
TEACHERS = {
    "cnn": spec("cnn", (16, 32, 64, 72), 96),
    "hierarchical": spec("hierarchical", (24, 48, 96, 192), 96),
    "isotropic": spec("isotropic", (64, 64, 64, 64), 96),
    "mlp": spec("mlp", (80, 80, 80, 80), 96),
    "cnn/4": map_spec("cnn", (16, 32, 64, 72), 36, 4),
    "attention/16": map_spec("attention", (24, 48, 96, 192), 44, 16),
}


def task_of(of: OutputSpec) -> str:
    return "classification" if of.logits_stride is None else "segmentation"


PAIRS = [
    pair for pair in itertools.product(STUDENTS, TEACHERS) if task_of(STUDENTS[pair[0]]) == task_of(TEACHERS[pair[1]])
]
UNLIKE_PAIRS = [
    ("cnn", "isotropic"),
    ("isotropic", "cnn"),
    ("mlp", "hierarchical"),
    ("cnn/8", "attention/16"),
    ("attention/4", "cnn/4"),
]


class FakeTail(nn.Module):
    """The Tail protocol with one linear layer per entry point; it refuses inputs that are not of stage j - 1.

    A step is one linear layer per position and a resize.
    """

    def __init__(self, of: OutputSpec) -> None:
        super().__init__()
        self.of = of
        self.entries = nn.ModuleList(nn.Linear(stage.channels, of.embedding_dim) for stage in of.stages)
        self.classifier = nn.Linear(of.embedding_dim, of.num_classes)
        self.steps = nn.ModuleList(nn.Linear(of.at(j - 1).channels, of.at(j).channels) for j in (1, 2, 3, 4))

    def tokens(self, x: Tensor, j: int) -> Tensor:
        tokens_BNC = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        grid = self.of.side(j - 1) ** 2
        assert tokens_BNC.shape[1] in (grid, grid + self.of.prefix_tokens), tuple(x.shape)
        assert tokens_BNC.shape[2] == self.of.at(j - 1).channels, tuple(x.shape)
        return tokens_BNC

    def step(self, x: Tensor, j: int, like: Tensor | None = None) -> Tensor:
        assert j in (1, 2, 3, 4), f"the tail was stepped to {j!r}"
        assert like is None or like.shape == x.shape, "class tokens of another map"
        before, side = self.of.side(j - 1), self.of.side(j)
        tokens_BNC = self.steps[j - 1](self.tokens(x, j)[:, -(before**2) :].float()).tanh()
        return nn.functional.adaptive_avg_pool2d(tokens_BNC.transpose(1, 2).unflatten(2, (before, before)), side)

    def outputs(self, x: Tensor, j: int) -> Outputs:
        assert j in (2, 3, 4, 5), f"the tail was entered at {j!r}"
        tokens_BNC = self.tokens(x, j)
        embedding = self.entries[j - 2](tokens_BNC.float()).tanh().mean(dim=1)
        return Outputs(logits=self.classifier(embedding), embedding=embedding)

    def forward(self, x: Tensor, j: int) -> Tensor:
        return self.outputs(x, j).logits


def random_outputs(of: OutputSpec, owner: str, seed: int, dtype: torch.dtype = torch.float32) -> Outputs:
    """What the spec serves; each tensor is a leaf that would keep a gradient, the teacher's too: none may come."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    if of.logits_stride is not None:

        def map_of(channels: int, stride: int) -> Tensor:
            return leaf(SCENES, channels, -(-CROP[0] // stride), -(-CROP[1] // stride))

        return Outputs(
            logits=map_of(of.num_classes, of.logits_stride),
            embedding=map_of(of.embedding_dim, of.logits_stride),
            stages=tuple(map_of(stage.channels, stage.stride) for stage in of.stages),
            owner=owner,
        )

    def maps() -> tuple[Tensor, ...]:
        return tuple(leaf(BATCH_SIZE, of.at(j).channels, of.side(j), of.side(j)) for j in (1, 2, 3, 4))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tail = FakeTail(of).requires_grad_(owner == "student")
    return Outputs(
        logits=leaf(BATCH_SIZE, of.num_classes),
        embedding=leaf(BATCH_SIZE, of.embedding_dim),
        stages=maps(),
        tail=tail,
        stem=leaf(BATCH_SIZE, of.at(0).channels, of.side(0), of.side(0)),
        class_maps=leaf(BATCH_SIZE, of.num_classes, of.side(4), of.side(4)) if Signal.CLASS_MAPS in of.serves else None,
        pre_activations=PreActivations(maps(), tuple(-leaf(s.channels).detach().abs() for s in of.stages))
        if Signal.PRE_ACTIVATIONS in of.serves
        else None,
        owner=owner,
    )


def random_batch(pair: tuple[str, str], seed: int = 2, soft: bool = False) -> Batch:
    """Labels of the pair's task: label maps have patches of one class, IGNORE in places and in all of one image."""
    generator = torch.Generator().manual_seed(seed)
    if task_of(STUDENTS[pair[0]]) == "segmentation":
        patches = torch.randint(0, NUM_CLASSES, (SCENES, CROP[0] // 16, CROP[1] // 16), generator=generator)
        labels = patches.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
        labels[-1] = IGNORE
        return Batch(torch.rand(SCENES, 3, *CROP, generator=generator), labels, torch.arange(SCENES))
    labels = torch.randint(0, NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    if soft:
        labels = torch.rand(BATCH_SIZE, NUM_CLASSES, generator=generator).softmax(dim=1)
    images = torch.rand(BATCH_SIZE, 3, 64, 64, generator=generator)
    return Batch(images, labels, torch.arange(BATCH_SIZE), torch.zeros(BATCH_SIZE, dtype=torch.long))


def build(name: str, pair: tuple[str, str], seed: int = 0, params: object = None) -> Method:
    """A method for a pair, or a skipped test where it says in a sentence that it cannot exist."""
    torch.manual_seed(seed)
    try:
        return METHODS[name](params, STUDENTS[pair[0]], TEACHERS[pair[1]])
    except PairError as error:
        pytest.skip(f"{name} refuses {pair[0]} <- {pair[1]}: {error}")


def both_outputs(pair: tuple[str, str], dtype: torch.dtype = torch.float32) -> tuple[Outputs, Outputs]:
    student = random_outputs(STUDENTS[pair[0]], "student", 0, dtype)
    return student, random_outputs(TEACHERS[pair[1]], "teacher", 1, dtype)


def run(
    method: Method,
    pair: tuple[str, str],
    progress: float = 1.0,
    soft: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Losses:
    """The method's terms on random outputs that hold nothing but what it declares."""
    student, teacher = both_outputs(pair, dtype)
    declared = student.only(method.student_needs), teacher.only(method.teacher_needs)
    return method(*declared, random_batch(pair, soft=soft), progress)


def check_terms(terms: Losses) -> None:
    for name, value in terms.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), f"term {name!r} is not short and lower-case"
        assert value.shape == (), f"term {name!r} has shape {tuple(value.shape)}, not a scalar"
        assert value.dtype == torch.float32, f"term {name!r} is {value.dtype}"
        assert torch.isfinite(value), f"term {name!r} is {value.item()}"


def has_gradient(tensor: Tensor) -> bool:
    return tensor.grad is not None and bool(torch.isfinite(tensor.grad).all()) and bool(tensor.grad.abs().sum() > 0)


def leaves(outputs: Outputs, signal: Signal) -> list[Tensor]:
    """Every tensor, or the tail's every weight, of one signal."""
    value = getattr(outputs, str(signal.name).lower())
    if isinstance(value, nn.Module):
        return list(value.parameters())
    held = value.maps if isinstance(value, PreActivations) else value
    return list(held) if isinstance(held, tuple) else [held]


@functools.cache
def quick_pairs(name: str) -> frozenset[tuple[str, str]]:
    """The pairs with which `make test` tries a method: the first of each of its tasks that it does not refuse."""
    found: dict[str, tuple[str, str]] = {}
    for pair in [*UNLIKE_PAIRS, *PAIRS]:
        task = task_of(STUDENTS[pair[0]])
        if task in METHODS[name].tasks - found.keys():
            with torch.device("meta"), contextlib.suppress(PairError):
                METHODS[name](None, STUDENTS[pair[0]], TEACHERS[pair[1]])
                found[task] = pair
    return frozenset(found.values())


def cases(pairs: list[tuple[str, str]], methods: list[str]) -> pytest.MarkDecorator:
    """Every method with every pair of a task that it declares."""
    found = [
        pytest.param(
            name,
            pair,
            id=f"{name}-{'<-'.join(pair)}",
            marks=[] if pair in quick_pairs(name) else pytest.mark.thorough,
        )
        for name in methods
        for pair in pairs
        if task_of(STUDENTS[pair[0]]) in METHODS[name].tasks
    ]
    return pytest.mark.parametrize(("name", "pair"), found)


DISTILLATIONS = [name for name in METHODS if name not in BASELINES]
every_method = pytest.mark.parametrize("name", METHODS)
every_distillation = pytest.mark.parametrize("name", DISTILLATIONS)
of_every_task = pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in DISTILLATIONS for task in sorted(METHODS[name].tasks)]
)
every_pair = cases(PAIRS, list(METHODS))
every_distilled_pair = cases(PAIRS, DISTILLATIONS)
unlike_pairs = cases(UNLIKE_PAIRS, list(METHODS))
unlike_distilled_pairs = cases(UNLIKE_PAIRS, DISTILLATIONS)


def pairs_of(task: str) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if task_of(STUDENTS[pair[0]]) == task]


# --- every method, every pair --------------------------------------------------------------------------------------


@every_pair
def test_terms_are_finite_scalars_and_declared_signals_suffice(name: str, pair: tuple[str, str]) -> None:
    method = build(name, pair)
    assert method.student_needs in METHODS[name].student_needs, "an instance may narrow the class's needs, not widen"
    assert method.teacher_needs in METHODS[name].teacher_needs, "an instance may narrow the class's needs, not widen"
    terms = run(method, pair)
    check_terms(terms)
    assert bool(terms) is (name not in BASELINES)


@every_distilled_pair
def test_gradient_reaches_student_and_projectors_and_nothing_of_the_teacher(name: str, pair: tuple[str, str]) -> None:
    method = build(name, pair)
    student, teacher = both_outputs(pair)
    terms = method(student.only(method.student_needs), teacher.only(method.teacher_needs), random_batch(pair), 0.9)
    torch.stack(list(terms.values())).sum().backward()

    def reached(signal: Signal) -> bool:
        return any(has_gradient(leaf) for leaf in leaves(student, signal))

    for signal in SIGNALS:
        if signal in method.student_needs:
            assert reached(signal), f"no gradient reaches the student's {signal}"

    without = [key for key, weight in method.named_parameters() if not has_gradient(weight)]
    assert not without, f"no gradient reaches {without}"

    assert all(leaf.grad is None for signal in teacher.serves for leaf in leaves(teacher, signal))


@every_pair
def test_builds_without_memory_for_weights(name: str, pair: tuple[str, str]) -> None:
    real = build(name, pair).state_dict()
    with torch.device("meta"):
        method = build(name, pair)
    assert all(weight.is_meta for weight in method.parameters())
    assert {key: value.shape for key, value in method.state_dict().items()} == {
        key: value.shape for key, value in real.items()
    }


# --- every method, a few unlike pairs ------------------------------------------------------------------------------


@of_every_task
def test_exists_for_an_unlike_pair(name: str, task: str) -> None:
    refused = 0
    for pair in pairs_of(task):
        try:
            METHODS[name](None, STUDENTS[pair[0]], TEACHERS[pair[1]])
        except PairError:
            refused += STUDENTS[pair[0]].kind != TEACHERS[pair[1]].kind
    unlike = sum(STUDENTS[student].kind != TEACHERS[teacher].kind for student, teacher in pairs_of(task))
    assert refused < unlike


@unlike_pairs
def test_every_declared_signal_is_read(name: str, pair: tuple[str, str]) -> None:
    method = build(name, pair)
    student, teacher = both_outputs(pair)
    for owner, needs in (("student", method.student_needs), ("teacher", method.teacher_needs)):
        for signal in SIGNALS:
            if signal not in needs:
                continue
            students = student.only(method.student_needs & ~signal if owner == "student" else method.student_needs)
            teachers = teacher.only(method.teacher_needs & ~signal if owner == "teacher" else method.teacher_needs)
            sentence = rf"{owner}\.\w+ was read .* add Signal\.{signal.name} to {owner}_needs"
            # Fails with "DID NOT RAISE" when the signal is declared and never read: then declare less.
            with pytest.raises(MissingSignal, match=sentence):
                method(students, teachers, random_batch(pair), 1.0)


@unlike_pairs
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_terms_are_finite_at_every_progress(name: str, pair: tuple[str, str], progress: float) -> None:
    terms = run(build(name, pair), pair, progress=progress)
    check_terms(terms)
    assert terms.keys() == run(build(name, pair), pair).keys(), "curves need the same terms from the first step on"


@cases([pair for pair in UNLIKE_PAIRS if pair in pairs_of("classification")], list(METHODS))
def test_takes_soft_labels(name: str, pair: tuple[str, str]) -> None:
    check_terms(run(build(name, pair), pair, soft=True))


@cases([pair for pair in UNLIKE_PAIRS if pair in pairs_of("segmentation")], DISTILLATIONS)
def test_images_without_any_label_stay_finite(name: str, pair: tuple[str, str]) -> None:
    method = build(name, pair)
    student, teacher = both_outputs(pair)
    batch = random_batch(pair)
    ignored = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    terms = method(student.only(method.student_needs), teacher.only(method.teacher_needs), ignored, 0.9)
    check_terms(terms)
    torch.stack(list(terms.values())).sum().backward()
    gradients = [leaf.grad for signal in student.serves for leaf in leaves(student, signal)]
    gradients += [weight.grad for weight in method.parameters()]
    assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


@unlike_pairs
def test_bfloat16_outputs_give_float_terms(name: str, pair: tuple[str, str]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in training: the only place where bf16 outputs come from
        check_terms(run(build(name, pair), pair, dtype=torch.bfloat16))


@unlike_distilled_pairs
def test_large_logits_stay_finite(name: str, pair: tuple[str, str]) -> None:
    method = build(name, pair)
    student, teacher = (outputs.map(lambda tensor: tensor.detach() * 1e3) for outputs in both_outputs(pair))
    check_terms(method(student, teacher, random_batch(pair), 1.0))


@unlike_pairs
def test_same_inputs_give_the_same_terms(name: str, pair: tuple[str, str]) -> None:
    method = build(name, pair)
    twin = copy.deepcopy(method)
    assert run(method, pair) == run(twin, pair)


@unlike_pairs
def test_state_dict_round_trip(name: str, pair: tuple[str, str]) -> None:
    method, other = build(name, pair, seed=0), build(name, pair, seed=1)
    other.load_state_dict(method.state_dict())
    assert run(method, pair) == run(other, pair)


# --- parameters ----------------------------------------------------------------------------------------------------


@every_method
def test_parameters_are_described_and_searchable(name: str) -> None:
    params = METHODS[name].Params
    found = domains(params)
    assert bool(found) is (name not in BASELINES), "a method without a searched parameter cannot be tuned"
    defaults = params()
    for field_name, field in params.model_fields.items():
        assert (field.description or "").strip(), f"{name}.{field_name} has no sentence"
        if field_name in found:
            default = getattr(defaults, field_name)
            assert default in found[field_name], f"{name}.{field_name} = {default!r} is outside {found[field_name]}"


@of_every_task
def test_ends_of_every_domain_work(name: str, task: str) -> None:
    for field_name, domain in domains(METHODS[name].Params).items():
        for value in domain.options if isinstance(domain, Choice) else (domain.low, domain.high):
            params = METHODS[name].Params.model_validate({field_name: value})
            for pair in [("cnn", "isotropic"), ("cnn", "cnn")] if task == "classification" else pairs_of(task):
                try:
                    method = METHODS[name](params, STUDENTS[pair[0]], TEACHERS[pair[1]])
                except PairError:
                    continue
                check_terms(run(method, pair))
                break


# --- the files -----------------------------------------------------------------------------------------------------


@every_method
def test_file_says_where_it_comes_from(name: str) -> None:
    module = importlib.import_module(f"heterokd.methods.{name}")
    assert module.__doc__
    assert summary(METHODS[name]).endswith(".")
    spelled = name.replace("_", "")
    assert METHODS[name].__name__.lower() == spelled, "the class is spelled as in the paper, the file in lower case"
    if name not in BASELINES:
        assert "https://" in module.__doc__, "a method cites its paper"


@every_distillation
def test_equation_is_a_public_function_of_tensors(name: str) -> None:
    module = importlib.import_module(f"heterokd.methods.{name}")
    function = getattr(module, f"{name}_loss")
    assert next(iter(inspect.signature(function).parameters)).startswith("student")
    assert inspect.getdoc(function)


def test_methods_import_no_heavy_library() -> None:
    code = (
        "import sys, heterokd.methods;"
        "print(sorted({'ray', 'optuna', 'mlflow', 'timm', 'pyarrow', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
