"""From a batch to new weights: equal to the plainest loop, and without a wait for the device."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import Loaders, make_loaders
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.errors import ConfigError
from heterokd.networks.network import build_network
from heterokd.networks.weights import weights_hash
from heterokd.outputs import Batch, Outputs, Signal
from heterokd.training.optim import build_optimizer, build_schedule, has_fused
from heterokd.training.precision import FP32
from heterokd.training.step import Updates, compile_student, split_batch
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import build_distiller, train

Write = Callable[..., Path]

RESIDENT_LIMIT = 1.2 * 2**30
"""Bytes that a process may hold at its peak in a training of tiny networks."""


@pytest.fixture
def experiment(tiny_file: Write) -> Experiment:
    return load_experiment(tiny_file(search={"space": {"methods": "all"}}))


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    torch.manual_seed(0)
    return LiveTeacher(build_network("test_vit", 10, {"img_size": 32, "patch_size": 8}))


def recipe_of(experiment: Experiment, method: str = "kd", student: str = "test_resnet", **training: Any) -> Recipe:
    recipe = experiment.recipe({"method": method})
    return recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=training),
            "student": recipe.student.model_copy(update={"network": student}),
        }
    )


def loaders_of(recipe: Recipe) -> Loaders:
    splits = load_dataset("digits", image_size=32, labels_per_class=4)
    return make_loaders(splits, ViewSpec(POLICIES["digits"]), recipe.training.batch_size)


def updates_of(recipe: Recipe, teacher: LiveTeacher) -> Updates:
    distiller = build_distiller(recipe, teacher, 10).train()
    return Updates(distiller, distiller, teacher, recipe.training, 2, FP32)


@pytest.mark.parametrize("method", ["scratch", "kd", "hcd", "fbt"])
def test_weights_are_bit_for_bit_those_of_the_plainest_loop(
    method: str, experiment: Experiment, teacher: LiveTeacher
) -> None:
    recipe = recipe_of(experiment, method, clip_grad=1.0, warmup_epochs=1.0)
    loaders, settings = loaders_of(recipe), recipe.training
    trained = train(recipe, teacher, loaders, lambda metrics: True)

    distiller = build_distiller(recipe, teacher, 10)
    # timm's default is torch's optimizer without the fused kernel.
    optimizer = timm.optim.create_optimizer_v2(  # type: ignore[attr-defined]
        distiller, opt="sgd", lr=settings.learning_rate, weight_decay=settings.weight_decay, momentum=settings.momentum
    )
    schedule = build_schedule(optimizer, settings, len(loaders.train))
    assert schedule is not None
    update = 0
    for epoch in range(3):
        torch.manual_seed(epoch)
        distiller.train()
        for batch in loaders.train.epoch(epoch):
            given = Outputs()
            if distiller.teacher_needs != Signal.NONE:
                given = teacher.outputs(batch, distiller.teacher_needs)
            loss, _ = distiller(batch, given, update / (3 * len(loaders.train)))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
            optimizer.step()
            update += 1
            schedule.step_update(update)
    assert weights_hash(trained.student) == weights_hash(distiller.student)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_a_fused_optimizer_gives_the_weights_of_the_plain_one(name: str) -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    other = copy.deepcopy(one)
    fused = build_optimizer(one, name, 0.01, 0.05, 0.9)
    plain = timm.optim.create_optimizer_v2(  # type: ignore[attr-defined]
        other, opt=name, lr=0.01, weight_decay=0.05, momentum=0.9
    )
    assert bool(fused.defaults.get("fused")) == has_fused(name) == (name != "lamb")
    images = torch.randn(5, 32, 8)
    for network, optimizer in ((one, fused), (other, plain)):
        for x in images:
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero"}
"""Operations whose result, or its shape, the processor must know: on a GPU each is a wait."""


# Not crd, which on a processor counts the rows of its memory that are in use, and on a GPU takes them all.
@pytest.mark.parametrize("method", ["scratch", "kd", "dkd", "dist", "hcd", "fbt", "ofa", "rkd", "nkd"])
def test_an_update_never_waits_for_the_device(
    method: str, experiment: Experiment, teacher: LiveTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a processor alone one_hot looks at the class numbers that it is given.
    monkeypatch.setattr(F, "one_hot", lambda labels, classes: (labels[:, None] == torch.arange(classes)).long())
    recipe = recipe_of(experiment, method, "test_efficientnet", clip_grad=1.0, ema=0.9, warmup_epochs=1.0)
    updates = updates_of(recipe, teacher)
    batches = list(loaders_of(recipe).train.epoch(0))
    updates.apply(batches[0], 0)
    with _Calls() as calls:
        losses = updates.apply(batches[1], 1)
    assert not {name: calls.names[name] for name in WAITS if name in calls.names}
    assert calls.names["convolution"] > 0
    assert not any(value.requires_grad for value in losses.values())


def test_parts_of_a_batch_add_up_to_the_batch(experiment: Experiment, teacher: LiveTeacher) -> None:
    # A ViT has no batch norm, and KD compares no images.
    whole, parts = (recipe_of(experiment, "kd", "test_vit", accumulate=number) for number in (1, 4))
    options = {"img_size": 32, "patch_size": 8}
    found = []
    for recipe in (whole, parts):
        recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"options": options})})
        updates = updates_of(recipe, teacher)
        losses = [updates.apply(batch, number) for number, batch in enumerate(loaders_of(recipe).train.epoch(0))]
        found.append((updates.parameters, losses))
    (big, big_losses), (small, small_losses) = found
    for one, other in zip(big, small, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for one_step, other_step in zip(big_losses, small_losses, strict=True):
        torch.testing.assert_close(one_step, other_step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("images", "parts", "sizes"), [(8, 4, [2] * 4), (7, 2, [3, 4]), (2, 4, [1, 1])])
def test_a_batch_is_split_in_order(images: int, parts: int, sizes: list[int]) -> None:
    numbers = torch.arange(images)
    batch = Batch(
        images=torch.zeros(images, 3, 1, 1), labels=numbers, index=numbers, shown=torch.stack((numbers, numbers), 1)
    )
    found = list(split_batch(batch, parts))
    assert [len(part) for part in found] == sizes
    for name in ("labels", "index", "view"):
        assert torch.equal(torch.cat([getattr(part, name) for part in found]), numbers)


def test_parts_must_be_even(tiny_file: Write) -> None:
    with pytest.raises(ConfigError, match=r"20 images \(batch_size\) cannot be split into 3 equal parts"):
        load_experiment(tiny_file(training={"accumulate": 3}))


def test_the_average_is_torchs(experiment: Experiment, teacher: LiveTeacher) -> None:
    recipe = recipe_of(experiment, ema=0.9)
    updates = updates_of(recipe, teacher)
    mean = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    theirs = AveragedModel(updates.distiller.student, multi_avg_fn=mean, use_buffers=True)
    for number, batch in enumerate([*loaders_of(recipe).train.epoch(0), *loaders_of(recipe).train.epoch(1)]):
        updates.apply(batch, number)
        theirs.update_parameters(updates.distiller.student)
    student, averaged = updates.distiller.student.state_dict(), updates.eval_network.state_dict()
    for name, value in theirs.module.state_dict().items():
        assert torch.equal(averaged[name], value if value.is_floating_point() else student[name]), name
    assert any(not torch.equal(averaged[name], student[name]) for name in averaged)


def test_without_a_compiler_training_goes_on(
    experiment: Experiment, teacher: LiveTeacher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*arguments: object, **more: object) -> object:
        raise RuntimeError("\nno C++ compiler was found\nmuch more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    student = build_network("test_resnet", 10)
    with caplog.at_level(logging.WARNING):
        assert not compile_student(student, torch.device("cpu"))
    assert caplog.messages == [
        "training.compile: torch.compile does not work here (no C++ compiler was found); training continues without it"
    ]
    recipe = recipe_of(experiment, compile=True)
    with_it = train(recipe, teacher, loaders_of(recipe), lambda metrics: True)
    without = train(recipe_of(experiment), teacher, loaders_of(recipe), lambda metrics: True)
    assert weights_hash(with_it.student) == weights_hash(without.student)


def test_a_full_gpu_is_one_sentence(experiment: Experiment) -> None:
    class Full(LiveTeacher):
        def outputs(self, batch: Batch, needs: Signal) -> Outputs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    teacher = Full(build_network("test_vit", 10, {"img_size": 32, "patch_size": 8}))
    recipe = recipe_of(experiment)
    with pytest.raises(ConfigError, match=r"20 images at a time does not fit .* raise training.accumulate") as caught:
        train(recipe, teacher, loaders_of(recipe), lambda metrics: True)
    assert "\n" not in str(caught.value)


def test_a_training_stays_small(tiny_file: Write) -> None:
    """A search runs one process a core: what each of them loads counts many times."""
    heavy = ["segmentation_models_pytorch", "torchmetrics", "matplotlib", "scipy", "sklearn", "pandas", "mlflow", "ray"]
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from heterokd.config.reading import load_experiment\n"
        "from heterokd.training.data import open_splits, recipe_loaders\n"
        "from heterokd.networks.network import build_network\n"
        "from heterokd.training.teacher import LiveTeacher\n"
        "from heterokd.training.train import train\n"
        f"recipe = load_experiment(Path({str(tiny_file())!r})).recipe({{'method': 'kd'}})\n"
        "teacher = LiveTeacher(build_network(recipe.teacher.network, 10, recipe.teacher.options))\n"
        "train(recipe, teacher, recipe_loaders(recipe, open_splits(recipe.data)), lambda metrics: True)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
        # Not getrusage: its peak is inherited from the process that started this one.
        "status = Path('/proc/self/status')\n"
        "lines = status.read_text().splitlines() if status.exists() else ['VmHWM: 0 kB']\n"
        "print(next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, peak = done.stdout.splitlines()
    assert loaded == "[]"
    if sys.platform == "linux":
        assert int(peak) < RESIDENT_LIMIT


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_weight_may_get_its_first_gradient_late(name: str) -> None:
    weights = nn.ParameterDict({"early": nn.Parameter(torch.ones(3)), "late": nn.Parameter(torch.ones(3))})
    optimizer = build_optimizer(weights, name, 0.1, 0.0, 0.9)
    for step in range(4):
        optimizer.zero_grad(set_to_none=True)
        loss = weights["early"].sum() if step < 2 else (weights["early"] * weights["late"]).sum()
        loss.backward()
        optimizer.step()
    assert not torch.equal(weights["late"], torch.ones(3))
