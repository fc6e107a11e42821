"""Fits of a teacher: which is chosen, which weights are kept, and that an interrupted fit goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment, load_recipe
from heterokd.config.schema import SCHEMA
from heterokd.errors import ConfigError
from heterokd.networks import network as networks
from heterokd.networks.body_types import TimmBody
from heterokd.networks.weights import save_weights
from heterokd.storage.workspace import Workspace
from heterokd.teachers.fit import FIT_FILES, fine_tuning, patience, planned_fit
from heterokd.teachers.prepare import prepare_teacher, teacher_recipe
from heterokd.training.best_epoch import BestEpoch
from heterokd.training.optim import build_optimizer, build_schedule, layer_groups
from heterokd.training.student import build_configured
from heterokd.training.teacher import teacher_hash
from heterokd.training.train import build_distiller

Write = Callable[..., Path]
FIT = {"epochs": 2, "warmup_epochs": 0, "batch_size": 64, "precision": "fp32", "channels_last": False}
SMALL = {"network": "test_resnet", "options": {}, "training": FIT}


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks whose published weights are those of a seed, since nothing is downloaded."""
    create = networks.create_body

    def published(name: str, num_classes: int, arguments: Any, pretrained: bool = False) -> TimmBody:
        if pretrained:
            torch.manual_seed(7)
        return create(name, num_classes, arguments)

    monkeypatch.setattr(networks, "create_body", published)


def asked(tiny_file: Write, **teacher: Any) -> Experiment:
    return load_experiment(tiny_file(teacher={**SMALL, **teacher}))


@pytest.fixture
def coloured(tiny_file: Write, tmp_path: Path) -> Callable[..., Experiment]:
    """An experiment on 60 noisy images, of which those of a class have the same colour."""
    generator = np.random.default_rng(0)
    for name, colour in {"red": (160, 90, 90), "green": (90, 160, 90), "blue": (90, 90, 160)}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(colour + 60 * generator.standard_normal((32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    data = {"dataset": "image_folder", "root": str(tmp_path / "images"), "labels_per_class": None, "augment": "none"}

    def write(**teacher: Any) -> Experiment:
        training = {**FIT, "batch_size": 12, **teacher.pop("training", {})}
        return load_experiment(tiny_file(data=data, teacher={**SMALL, **teacher, "training": training}))

    return write


@pytest.mark.parametrize(
    ("teacher", "planned"),
    [
        ({}, "all"),
        ({"fit": "all", "pretrained": True}, "all"),
        ({"pretrained": True}, "head_then_all"),
        ({"pretrained": True, "fit": "head"}, "head"),
        ({"pretrained": True, "training": {**FIT, "trainable": "head"}}, "head"),
    ],
    ids=["random weights", "all", "pretrained", "head", "trainable head"],
)
def test_auto_follows_from_the_weights(teacher: dict[str, Any], planned: str, tiny_file: Write) -> None:
    assert planned_fit(teacher_recipe(asked(tiny_file, **teacher))) == planned


@pytest.mark.parametrize("network", ["test_resnet", ["test_resnet", "test_vit"]], ids=["one", "list"])
@pytest.mark.parametrize("fit", ["head", "head_then_all"])
def test_a_classifier_on_random_features_is_refused(network: Any, fit: str, tiny_file: Write) -> None:
    with pytest.raises(
        ConfigError, match=rf"teacher: fit: {fit} solves the classifier on pretrained features; set pre"
    ):
        asked(tiny_file, network=network, fit=fit)


def test_files_of_an_older_schema_find_the_teacher_that_they_fitted(tiny_file: Write, tmp_path: Path) -> None:
    file = tiny_file(teacher=SMALL)
    now, older = load_experiment(file), load_experiment(file, ["schema=2"])
    assert (now.teacher.fit, older.teacher.fit) == ("auto", "all")
    hashes = {
        name: teacher_hash(each.teacher.settings_of(), teacher_recipe(each), "data")
        for name, each in (("auto", now), ("all", older), ("set", load_experiment(file, ["teacher.fit=all"])))
    }
    assert hashes["all"] == hashes["set"] != hashes["auto"]
    text = teacher_recipe(now).to_yaml().replace(f"schema: {SCHEMA.number}", "schema: 2").replace("  fit: auto\n", "")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").teacher.fit == "all"


def test_fine_tuning_is_short_and_careful(tiny_file: Write) -> None:
    training = teacher_recipe(asked(tiny_file, training={"epochs": 60, "warmup_epochs": 5})).training
    tuned = fine_tuning(training)
    assert (tuned.epochs, tuned.warmup_epochs, tuned.learning_rate) == (
        6,
        0.5,
        pytest.approx(training.learning_rate / 5),
    )
    assert tuned.layer_decay is not None
    assert fine_tuning(training.model_copy(update={"layer_decay": 1.0})).layer_decay == 1.0
    assert [patience(epochs) for epochs in (6, 60)] == [3, 10]


def test_lower_layers_learn_more_slowly(tiny_file: Write) -> None:
    recipe = teacher_recipe(asked(tiny_file))
    network = build_configured(recipe.student, 10, 32)
    settings = recipe.training.model_copy(update={"layer_decay": 0.5, "schedule": "constant"})
    assert layer_groups(network, network.body, recipe.training) is None
    groups = layer_groups(network, network.body, settings)
    optimizer = build_optimizer(network, settings.optimizer, settings.learning_rate, 0.05, 0.9, groups)
    build_schedule(optimizer, settings, 10)
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert set(rates) == {id(each) for each in network.parameters()}
    head, stem = network.body.get_classifier().weight, next(network.body.parameters())
    assert rates[id(head)] == pytest.approx(settings.learning_rate)
    assert 0 < rates[id(stem)] <= settings.learning_rate / 8
    undecayed = {id(each) for group in optimizer.param_groups for each in group["params"] if group["weight_decay"] == 0}
    assert undecayed == {id(each) for each in network.parameters() if each.ndim <= 1}


def test_the_lowest_layers_are_not_trained(tiny_file: Write) -> None:
    recipe = teacher_recipe(asked(tiny_file))
    for decay, frozen in ((None, False), (0.9, False), (0.2, True)):
        training = recipe.training.model_copy(update={"layer_decay": decay})
        distiller = build_distiller(recipe.model_copy(update={"training": training}), None, 10)
        stem, head = next(distiller.student.body.parameters()), distiller.student.body.get_classifier().weight
        assert (stem.requires_grad, head.requires_grad) == (not frozen, True)


def test_the_best_epoch_is_kept_and_a_plateau_ends_the_training(tiny_file: Write, tmp_path: Path) -> None:
    recipe = teacher_recipe(asked(tiny_file))
    network = build_configured(recipe.student, 10, 32)
    best = BestEpoch(tmp_path / "best.safetensors", "val/top1", patience=2)
    assert best.update({"epoch": 1, "val/top1": 0.5}, network)
    assert best.update({"epoch": 2, "val/top1": 0.5}, build_configured(recipe.student, 10, 32)), "not better"
    again = BestEpoch(best.file, "val/top1", patience=2)
    again.resume(2)
    assert (again.score, again.epoch) == (0.5, 1)
    assert not again.update({"epoch": 3, "val/top1": 0.4}, network)
    early = BestEpoch(best.file, "val/top1")
    early.resume(0)
    assert early.score == float("-inf"), "an epoch that is trained again"
    save_weights(build_configured(recipe.student, 10, 32), best.file)
    mixed = BestEpoch(best.file, "val/top1")
    mixed.resume(2)
    assert mixed.score == float("-inf"), "weights of another epoch"
    best.score_file.write_text("{")
    early.resume(2)
    assert early.score == float("-inf"), "damaged"

    maps = BestEpoch(best.file, "val/miou")
    maps.update({"epoch": 1, "val/miou": 0.5, "val/iou_classes": 11.0}, network)
    maps.update({"epoch": 2, "val/miou": 0.4, "val/iou_classes": 10.0}, network)
    resumed = BestEpoch(best.file, "val/miou")
    resumed.resume(2)
    assert resumed.metrics == maps.metrics == {"val/miou": 0.5, "val/iou_classes": 11.0}


@pytest.mark.usefixtures("pretrained")
@pytest.mark.parametrize("fit", ["head", "auto"])
def test_a_pretrained_teacher_is_at_least_its_solved_head(
    fit: str, coloured: Callable[..., Experiment], tmp_path: Path
) -> None:
    experiment, root = coloured(pretrained=True, fit=fit), Workspace(tmp_path / "runs")
    seen: list[dict[str, float]] = []
    found = prepare_teacher(experiment, root, lambda metrics: seen.append(metrics) is None)
    assert seen[0]["epoch"] == 0
    assert [int(metrics["epoch"]) for metrics in seen[1:]] == ([] if fit == "head" else [1, 2])
    card = found.card
    assert card.val_score == max(metrics["val/top1"] for metrics in seen) > 0.8
    assert "solved on frozen features" in str(card.reason)
    assert card.temperature is not None
    assert "calibrates" in card.calibration()
    assert found.weights is not None
    folder = found.weights.parent
    assert not [name for name in (*FIT_FILES, "checkpoint.pt") if (folder / name).exists()]
    assert json.loads((folder / "teacher.json").read_text())["reason"] == card.reason
    again = prepare_teacher(experiment, root)
    assert (again.fitted, again.card) == (False, card)


@pytest.mark.usefixtures("pretrained")
def test_an_interrupted_fit_does_not_solve_again(
    coloured: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = coloured(pretrained=True, fit="head")
    whole = prepare_teacher(experiment, Workspace(tmp_path / "whole")).card

    def interrupt(metrics: dict[str, float]) -> bool:
        raise KeyboardInterrupt

    root = Workspace(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        prepare_teacher(experiment, root, interrupt)
    monkeypatch.setattr("heterokd.teachers.fit.solve_head", None)
    assert prepare_teacher(experiment, root).card == whole


def test_a_teacher_from_random_weights_stops_at_a_plateau(coloured: Callable[..., Experiment], tmp_path: Path) -> None:
    """With a learning rate of nearly 0 the first epoch is the best, and three more are tried."""
    network = {"network": "test_vit", "options": {"img_size": 32, "patch_size": 16}}
    experiment = coloured(**network, training={"epochs": 5, "learning_rate": 1e-12})
    epochs: list[int] = []
    found = prepare_teacher(
        experiment, Workspace(tmp_path / "runs"), lambda metrics: epochs.append(int(metrics["epoch"])) is None
    )
    assert epochs == [1, 2, 3, 4]
    assert found.card.reason == (
        "the best of 4 epochs is number 1; stopped before epoch 5, because 3 epochs brought nothing better"
    )
    whole = experiment.model_copy(update={"teacher": experiment.teacher.model_copy(update={"fit": "all"})})
    assert prepare_teacher(whole, Workspace(tmp_path / "runs")).card.reason == "after 5 epochs"


@pytest.mark.usefixtures("pretrained")
def test_a_network_without_a_linear_classifier(coloured: Callable[..., Experiment], tmp_path: Path) -> None:
    network = {"network": "deit_tiny_distilled_patch16_224", "options": {"patch_size": 16, "depth": 4, "img_size": 32}}
    with pytest.raises(ConfigError, match=r"teacher\.fit: head: the classifier of deit_tiny_distilled_patch16_224 is"):
        prepare_teacher(coloured(**network, pretrained=True, fit="head"), Workspace(tmp_path / "runs"))
