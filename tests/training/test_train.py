"""The training loop: seeded, resumable bit for bit, finite or a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from heterokd.config.experiment import Experiment
from heterokd.config.methods import methods_of
from heterokd.config.networks import NetworkSettings
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import Loaders, make_loaders
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.errors import PairError, TrainingDiverged
from heterokd.networks.network import build_network
from heterokd.networks.weights import weights_hash
from heterokd.training.evaluation import is_cheap
from heterokd.training.precision import Precision
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import Metrics, TrainOptions, TrainResult, build_distiller, train

Write = Callable[..., Path]


@pytest.fixture
def experiment(tiny_file: Write) -> Experiment:
    return load_experiment(tiny_file(search={"space": {"methods": "all"}}))


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    torch.manual_seed(0)
    return LiveTeacher(build_network("test_vit", 10, {"img_size": 32, "patch_size": 8}))


# BatchNorm and ReLU at the end of every stage, a linear classifier after the average, last maps of 4 x 4 positions at
# 32 pixels: what the methods read that do not exist for the tiny pair.
RESNET = NetworkSettings(network="test_resnet", options={"output_stride": 8})


@pytest.fixture(scope="module")
def resnet_teacher() -> LiveTeacher:
    torch.manual_seed(0)
    return LiveTeacher(build_network(RESNET.network, 10, RESNET.options))


def loaders_of(recipe: Recipe) -> Loaders:
    splits = load_dataset("digits", image_size=32, labels_per_class=recipe.data.labels_per_class)
    return make_loaders(splits, ViewSpec(POLICIES["digits"], recipe.training.seed), recipe.training.batch_size)


def run(
    recipe: Recipe, teacher: LiveTeacher, report: Callable[[Metrics], bool] | None = None, **more: Any
) -> TrainResult:
    return train(recipe, teacher, loaders_of(recipe), report or (lambda metrics: True), TrainOptions(**more))


@pytest.mark.parametrize("method", methods_of("classification"))
def test_every_method_trains_and_reports_what_it_sums(
    method: str, experiment: Experiment, teacher: LiveTeacher, resnet_teacher: LiveTeacher
) -> None:
    recipe = experiment.recipe({"method": method})
    try:
        build_distiller(recipe, teacher, 10)
    except PairError:
        recipe, teacher = recipe.model_copy(update={"student": RESNET}), resnet_teacher
    before = weights_hash(teacher.network)
    reports: list[Metrics] = []

    def report(metrics: Metrics) -> bool:
        reports.append(dict(metrics))
        return True

    trained = run(recipe, teacher, report)
    assert [metrics["epoch"] for metrics in reports] == [1, 2, 3]
    assert not trained.stopped
    assert not trained.student.training
    for metrics in reports:
        terms = [
            value
            for key, value in metrics.items()
            if key.startswith("train/") and key not in ("train/loss", "train/learning_rate")
        ]
        assert sum(terms) == pytest.approx(metrics["train/loss"], rel=1e-4)
        assert {"val/top1", "val/top5", "val/loss", "val/agreement", "time/images_per_second"} <= set(metrics)
    assert weights_hash(teacher.network) == before
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


@pytest.mark.parametrize("method", ["kd", "hcd", "fbt"])
def test_the_same_recipe_gives_the_same_weights_and_another_seed_gives_others(
    method: str, experiment: Experiment, teacher: LiveTeacher
) -> None:
    recipe = experiment.recipe({"method": method})
    first, second = (weights_hash(run(recipe, teacher).student) for _ in range(2))
    assert first == second
    other = experiment.recipe({"method": method}, seed=1)
    assert weights_hash(run(other, teacher).student) != first


def test_epochs_without_evaluation_change_no_other_value(experiment: Experiment, teacher: LiveTeacher) -> None:
    recipe = experiment.recipe({"method": "kd"})

    def trained(evaluated: frozenset[int] | None) -> tuple[str, list[Metrics]]:
        reports: list[Metrics] = []

        def report(metrics: Metrics) -> bool:
            reports.append({key: value for key, value in metrics.items() if not key.startswith("time/")})
            return True

        return weights_hash(run(recipe, teacher, report, evaluated_epochs=evaluated).student), reports

    weights, every = trained(None)
    for evaluated in (frozenset({2}), frozenset[int]()):
        kept = [
            {key: value for key, value in metrics.items() if metrics["epoch"] in {*evaluated, 3} or "val/" not in key}
            for metrics in every
        ]
        assert trained(evaluated) == (weights, kept), "the last epoch is evaluated in any case"


@pytest.mark.parametrize(("images", "cheap"), [(100, False), (None, True)])
def test_an_evaluation_is_cheap_by_the_numbers_of_images(
    images: int | None, cheap: bool, experiment: Experiment
) -> None:
    splits = load_dataset("digits", image_size=32, labels_per_class=None if images is None else images // 10)
    loaders = make_loaders(splits, ViewSpec(POLICIES["digits"], 0), 32)
    val, train = len(splits.val), 32 * (len(splits.train) // 32)
    assert is_cheap(loaders) is cheap
    assert (val / (val + 3 * train) <= 0.15) is cheap


@pytest.mark.parametrize("method", ["kd", "hcd", "fbt", "crd"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_resuming_from_a_checkpoint_equals_never_having_stopped(
    method: str, ema: float | None, experiment: Experiment, teacher: LiveTeacher, tmp_path: Path
) -> None:
    recipe = experiment.recipe({"method": method})
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"ema": ema})})
    whole = run(recipe, teacher)
    file = tmp_path / "checkpoint.pt"
    stopped = run(recipe, teacher, lambda metrics: metrics["epoch"] < 2, checkpoint=file)
    assert stopped.stopped
    assert stopped.epochs == 2
    epochs: list[float] = []

    def report(metrics: Metrics) -> bool:
        epochs.append(metrics["epoch"])
        return True

    resumed = run(recipe, teacher, report, checkpoint=file)
    assert epochs == [3]
    assert weights_hash(resumed.student) == weights_hash(whole.student)
    assert resumed.metrics["val/loss"] == whole.metrics["val/loss"]


def test_a_finished_training_is_not_trained_again(experiment: Experiment, teacher: LiveTeacher, tmp_path: Path) -> None:
    recipe, file = experiment.recipe({"method": "kd"}), tmp_path / "checkpoint.pt"
    whole = run(recipe, teacher, checkpoint=file, checkpoint_epochs=(3,))
    again = run(recipe, teacher, lambda metrics: pytest.fail("trained again"), checkpoint=file)
    assert weights_hash(again.student) == weights_hash(whole.student)
    assert again.metrics["val/top1"] == whole.metrics["val/top1"]
    assert again.epochs == 3


def _other_bytes(content: bytes) -> bytes:
    """Of the same length, with a few bytes of the largest tensor changed: only a checksum notices."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(1000)),
    "other bytes": lambda file: file.write_bytes(_other_bytes(file.read_bytes())),
    "other content": lambda file: torch.save({"epoch": 2}, file),
    "other shapes": lambda file: torch.save({**torch.load(file), "distiller": {}, "optimizer": {}}, file),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, teacher: LiveTeacher) -> tuple[Recipe, Path, str]:
    """A recipe, its checkpoints after epochs 1 and 2, and the hash of the student after epoch 3."""
    recipe = Experiment.model_validate(TINY).recipe({"method": "kd"})
    file = tmp_path_factory.mktemp("stopped") / "checkpoint.pt"
    run(recipe, teacher, lambda metrics: metrics["epoch"] < 2, checkpoint=file, checkpoint_epochs=(1,))
    return recipe, file, weights_hash(run(recipe, teacher).student)


def _resumed(stopped: tuple[Recipe, Path, str], folder: Path, teacher: LiveTeacher, **more: Any) -> list[float]:
    """The epochs that are trained from the checkpoints in a folder; the student is that of an uninterrupted run."""
    epochs: list[float] = []
    recipe, _, expected = stopped
    trained = run(
        recipe,
        teacher,
        lambda metrics: epochs.append(metrics["epoch"]) or True,
        checkpoint=folder / "checkpoint.pt",
        checkpoint_epochs=(1, 2, 3),
        **more,
    )
    assert weights_hash(trained.student) == expected
    return epochs


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_costs_the_epochs_since_the_one_before(
    damage: str, stopped: tuple[Recipe, Path, str], teacher: LiveTeacher, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped[1].parent, tmp_path / "trial")
    DAMAGE[damage](folder / "checkpoint.pt")
    assert _resumed(stopped, folder, teacher) == [2, 3]
    # What was damaged has not replaced the checkpoint before it.
    for name, epoch in (("checkpoint.pt", 3), ("checkpoint.previous.pt", 2)):
        assert torch.load(folder / name)["epoch"] == epoch


def test_without_a_checkpoint_that_can_be_used_the_training_starts_again(
    stopped: tuple[Recipe, Path, str], teacher: LiveTeacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(stopped[1].parent, tmp_path / "trial")
    torch.save({**torch.load(folder / "checkpoint.pt"), "recipe": "of another"}, folder / "checkpoint.pt")
    DAMAGE["half"](folder / "checkpoint.previous.pt")
    assert _resumed(stopped, folder, teacher) == [1, 2, 3]
    first, second = (record.getMessage() for record in caplog.records)
    assert "belongs to recipe of another" in first
    assert "checkpoint.previous.pt: is damaged" in second
    (folder / "checkpoint.pt").unlink()  # killed between the two renames of a checkpoint
    assert _resumed(stopped, folder, teacher) == [3]


def test_epochs_without_a_report_are_trained_again(
    stopped: tuple[Recipe, Path, str], teacher: LiveTeacher, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped[1].parent, tmp_path / "trial")
    assert _resumed(stopped, folder, teacher, newest_epoch=1) == [2, 3]


def test_a_loss_that_is_not_finite_ends_the_training_with_a_sentence(
    experiment: Experiment, teacher: LiveTeacher
) -> None:
    recipe = experiment.recipe({"method": "kd", "training.learning_rate": 1e30})
    with pytest.raises(TrainingDiverged, match=r"train/loss.*method 'kd'.*epoch \d.*learning_rate"):
        run(recipe, teacher)


def test_the_learning_rate_rises_and_falls(experiment: Experiment, teacher: LiveTeacher) -> None:
    training = experiment.training.model_copy(update={"epochs": 6, "warmup_epochs": 2.0})
    recipe = experiment.model_copy(update={"training": training}).recipe({"method": "scratch"})
    rates: list[float] = []

    def report(metrics: Metrics) -> bool:
        rates.append(metrics["train/learning_rate"])
        return True

    run(recipe, teacher, report)
    assert rates[0] < rates[1] == max(rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.thorough
def test_the_student_learns_real_digits(experiment: Experiment, teacher: LiveTeacher) -> None:
    training = experiment.training.model_copy(update={"epochs": 30})
    data = experiment.data.model_copy(update={"labels_per_class": 20})
    recipe = experiment.model_copy(update={"training": training, "data": data}).recipe({"method": "scratch"})
    assert run(recipe, teacher).metrics["val/top1"] > 0.8


def test_a_linear_head_leaves_the_encoder_as_it_was(experiment: Experiment, teacher: LiveTeacher) -> None:
    training = experiment.training.model_copy(update={"trainable": "head"})
    recipe = experiment.model_copy(update={"training": training}).recipe({"method": "scratch"})
    before = build_distiller(recipe, teacher, 10).student.state_dict()
    after = run(recipe, teacher).student
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    head = {id(parameter) for parameter in after.head.parameters()}
    assert changed == {name for name, parameter in after.named_parameters() if id(parameter) in head}


def test_the_distiller_holds_no_teacher(experiment: Experiment, teacher: LiveTeacher) -> None:
    distiller = build_distiller(experiment.recipe({"method": "fbt"}), teacher, 10)
    mine = {id(parameter) for parameter in distiller.parameters()}
    assert not mine & {id(parameter) for parameter in teacher.network.parameters()}


def test_bf16_trains(experiment: Experiment, teacher: LiveTeacher) -> None:
    training = experiment.training.model_copy(update={"clip_grad": 1.0})
    recipe = experiment.model_copy(update={"training": training}).recipe({"method": "hcd"})
    trained = run(recipe, teacher, precision=Precision("bf16", channels_last=True))
    in_fp32 = run(recipe, teacher)
    assert trained.metrics["train/loss"] == pytest.approx(in_fp32.metrics["train/loss"], rel=0.2)
    assert weights_hash(trained.student) != weights_hash(in_fp32.student)
