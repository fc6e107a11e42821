"""Teachers with given weights: read from any file, put into the data's order of classes, and diagnosed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fabricated
import mlflow
import numpy as np
import pytest
import torch
from command_line import Run
from golden_files import unpack
from tiny_datasets import write_classes
from torch import Tensor
from torch.nn.functional import one_hot

from heterokd.config.reading import load_experiment, load_study_experiment
from heterokd.datasets.io.class_order import natural_order
from heterokd.errors import CheckpointError, ConfigError, StudyError, TrackingError
from heterokd.networks.network import build_network
from heterokd.networks.weights import find_weights, save_weights, weights_hash
from heterokd.storage.workspace import Workspace
from heterokd.students.given_weights import with_given_weights
from heterokd.study.known_scratch import known_scratch, weak_teachers
from heterokd.teachers.diagnosis import fitting_order
from heterokd.teachers.given import local_file
from heterokd.teachers.prepare import open_prepared, prepare_teacher, ready_teacher, teacher_recipe
from heterokd.tracking.store import existing_store
from heterokd.training.data import open_splits
from heterokd.training.teacher import teacher_hash

Write = Callable[..., Path]
OPTIONS = {"img_size": 32, "patch_size": 8}


def state(classes: int = 10) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(build_network("test_vit", classes, OPTIONS, image_size=32).body.state_dict())


def test_a_foreign_checkpoint_is_converted_once(
    tiny_file: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, root = tmp_path / "model_best.pth.tar", Workspace(tmp_path / "runs")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state().items()}}, file)
    experiment = load_experiment(tiny_file(teacher={"checkpoint": str(file)}))
    prepared = prepare_teacher(experiment, root)
    assert not prepared.fitted
    assert prepared.card.source == str(file)
    assert "prefix 'module.' removed from the names" in prepared.card.notes
    assert f"{file}: read from 'state_dict' of the file; prefix 'module.'" in caplog.text
    assert prepared.weights is not None
    assert prepared.weights.is_relative_to(root.teachers), "nodes read safetensors of the workspace"
    written = prepared.weights.stat().st_mtime_ns
    assert ready_teacher(experiment, root) == (True, prepared.weights)
    assert prepare_teacher(experiment, root).weights == prepared.weights
    assert prepared.weights.stat().st_mtime_ns == written
    assert (prepared.card.chance or 0) > 0.09
    assert prepared.card.train_confidence is not None


def test_classes_are_put_into_the_datas_order(tiny_file: Write, tmp_path: Path) -> None:
    """The digits' classes are named 0 to 9; in the file they are in the opposite order."""
    straight, weights = tmp_path / "straight.safetensors", state()
    network = build_network("test_vit", 10, OPTIONS, image_size=32)
    network.body.load_state_dict(weights)
    save_weights(network, straight)
    experiment = load_experiment(tiny_file(teacher={"checkpoint": str(straight)}))
    names = [str(name) for name in open_splits(experiment.data).class_names]
    turned = {name: tensor.flip(0) if name.startswith("head.") else tensor for name, tensor in weights.items()}
    file = tmp_path / "turned.pt"
    torch.save({"model": turned, "class_names": names[::-1]}, file)
    root = Workspace(tmp_path / "runs")
    first = prepare_teacher(experiment, root)
    second = prepare_teacher(load_experiment(tiny_file(teacher={"checkpoint": str(file)})), root)
    assert second.card.weights == first.card.weights == weights_hash(network)
    assert any("the classifier is reordered" in note for note in second.card.notes)
    assert first.weights == straight, "a file that needs nothing is used where it is"

    torch.save({"model": weights, "class_names": [*names[:9], "kiwi"]}, file)
    third = prepare_teacher(load_experiment(tiny_file(teacher={"checkpoint": str(file)})), root)
    assert any("its class 'kiwi', by 'class_names' of the file, is no class of the data" in n for n in third.card.notes)


def test_weights_of_other_classes_start_a_fit(
    tiny_file: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, cli: Run
) -> None:
    file, root = tmp_path / "imagenet.pth", Workspace(tmp_path / "runs")
    torch.save({"model": state(1000)}, file)
    changes = {
        "training": {"epochs": 1, "warmup_epochs": 0, "batch_size": 64, "learning_rate": 1e-9, "precision": "fp32"}
    }
    experiment = load_experiment(tiny_file(teacher={"checkpoint": str(file), **changes}))
    assert ready_teacher(experiment, root) == (False, None)
    prepared = prepare_teacher(experiment, root)
    assert prepared.fitted
    assert "has 1000 classes, the data set has 10: the teacher is fitted from these weights" in caplog.text
    assert "(teacher.start_from says the same); read from 'model' of the file" in caplog.text
    assert str(file) in prepared.card.source
    found = open_prepared(teacher_recipe(experiment), prepared.weights, 10).network.body.state_dict()
    assert torch.allclose(found["patch_embed.proj.weight"], state(1000)["patch_embed.proj.weight"], atol=1e-4)
    asked = load_experiment(tiny_file(teacher={"start_from": str(file), **changes}))
    again = prepare_teacher(asked, root)
    assert not again.fitted, "the same fit"
    assert again.weights == prepared.weights
    recipe = teacher_recipe(asked)
    before = teacher_hash(recipe.teacher, recipe, "data")
    torch.save({**state(1000), "cls_token": torch.zeros(1, 1, 64)}, file)
    assert teacher_hash(recipe.teacher, recipe, "data") != before, "of the file's content"
    assert cli("teacher", tiny_file(teacher={"start_from": "no.pt"})).err.startswith(
        "error: teacher.start_from: there is no file no.pt"
    )


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        ("teacher", {"start_from": "a.pt", "pretrained": True}, "give either start_from or pretrained, not both"),
        ("teacher", {"start_from": "a.pt", "checkpoint": "b.pt"}, "teacher.checkpoint or teacher.start_from, not both"),
        ("student", {"network": ["test_vit", "test_resnet"], "start_from": "a.pt"}, "one file cannot hold 2 networks"),
        ("student", {"start_from": {"test_vitt": "a.pt"}}, "'test_vitt' is not in the list"),
    ],
)
def test_settings_that_make_no_sense(section: str, values: Mapping[str, Any], sentence: str, tiny_file: Write) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_experiment(tiny_file(**{section: values}))


def test_a_student_starts_from_given_weights(tiny_file: Write, tmp_path: Path) -> None:
    from heterokd.training.student import build_student

    network = build_network("test_resnet", 3, image_size=32)
    save_weights(network, tmp_path / "s.safetensors")
    given = {"network": "test_resnet", "options": {}, "start_from": str(tmp_path / "s.safetensors")}
    experiment = load_experiment(tiny_file(student=given))
    recipe = experiment.recipe({"method": "kd"})
    assert recipe.student.start_from == tmp_path / "s.safetensors"
    assert (
        recipe.hash != load_experiment(tiny_file(student={**given, "start_from": None})).recipe({"method": "kd"}).hash
    )
    student = build_student(recipe, 10).body.state_dict()
    assert torch.equal(student["conv1.0.weight"], network.body.state_dict()["conv1.0.weight"])


# --- other sources


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("finished", tmp_path_factory.mktemp("golden"))


STUDENT = {"network": "test_resnet", "options": {"channels": [8, 8, 8, 16], "stem_width": 8}}
DIGITS = {"data": {"dataset": "digits", "image_size": 32}}


def test_folders_of_studies_and_trials(root: Path, tiny_file: Write, tmp_path: Path) -> None:
    def file_of(place: Path | str) -> Path | None:
        experiment = load_experiment(tiny_file(teacher={**STUDENT, "checkpoint": str(place)}, **DIGITS))
        return with_given_weights(experiment, Workspace(root)).teacher.checkpoint_of("test_resnet")

    winner = file_of(root / "studies" / "finished")
    assert winner is not None
    assert winner.name == "student.safetensors"
    assert file_of("studies/finished") == winner, "relative to the workspace"
    assert file_of(winner.parent) == file_of(winner) == winner
    several = tmp_path / "several"
    several.mkdir()
    for name in ("a.pt", "b.pt"):
        (several / name).touch()
    with pytest.raises(CheckpointError, match=r"teacher.checkpoint: .*several holds 2 files of weights \(a.pt, b.pt\)"):
        file_of(several)
    (several / "experiment.yaml").touch()
    with pytest.raises(StudyError, match="has no winner"):
        file_of(several)


@pytest.mark.thorough
def test_a_registered_student_teaches_the_next(root: Path, tiny_file: Write, tmp_path: Path) -> None:
    state = Workspace(root)
    teacher = {**STUDENT, "checkpoint": "models:/digits-student@challenger"}
    experiment = with_given_weights(load_experiment(tiny_file(teacher=teacher, **DIGITS)), state)
    version = str(experiment.teacher.checkpoint)
    assert re.fullmatch(r"models:/digits-student/\d", version), "an alias may move"
    prepared = prepare_teacher(experiment, state)
    assert prepared.card.source == version
    assert prepared.weights is not None
    assert prepared.weights.is_relative_to(state.teachers)
    described = json.loads((prepared.weights.parent / "student.json").read_text())
    assert described["weights"] == prepared.card.weights

    client = mlflow.MlflowClient(existing_store(state, None))
    run = client.create_run(client.search_experiments(filter_string="name = 'finished'")[0].experiment_id).info.run_id
    network = build_network("test_resnet", 10, STUDENT["options"], image_size=32)
    torch.save({"model": network.body.state_dict()}, tmp_path / "best.pt")
    client.log_artifact(run, str(tmp_path / "best.pt"), "weights")
    client.create_registered_model("foreign")
    version = client.create_model_version("foreign", f"runs:/{run}/weights", run).version
    for uri in (f"runs:/{run}/weights/best.pt", f"runs:/{run}/weights", f"models:/foreign/{version}"):
        given = with_given_weights(load_experiment(tiny_file(teacher={**STUDENT, "checkpoint": uri}, **DIGITS)), state)
        assert given.teacher.checkpoint == Path(uri)
        local = local_file(Path(uri), state)
        assert local.name == "best.pt"
        assert find_weights(network, local).classes == 10
    with pytest.raises(TrackingError, match="no model of this name"):
        with_given_weights(load_experiment(tiny_file(teacher={"checkpoint": "models:/nobody/1"})), state)
    with pytest.raises(CheckpointError, match=r"runs:/0/x: its files cannot be downloaded"):
        with_given_weights(load_experiment(tiny_file(teacher={"checkpoint": "runs:/0/x"})), state)
    with pytest.raises(ConfigError, match=r"student\.start_from: models:/a/1 is for teachers"):
        with_given_weights(load_experiment(tiny_file(student={"start_from": "models:/a/1"})), state)


# --- diagnosis


def test_a_fitting_order_is_found_and_named() -> None:
    rng = np.random.default_rng(0)
    names = sorted(str(number) for number in range(1, 13))
    labels = rng.integers(0, 12, 600)
    natural = natural_order(names)
    right = np.array([natural.index(names[label]) for label in labels])  # of a reader in natural order
    predicted = np.where(rng.random(600) < 0.85, right, rng.integers(0, 12, 600))
    order, score = fitting_order(predicted, labels, names)
    assert order == "natural"
    assert score == pytest.approx(0.86, abs=0.03)

    shuffled = rng.permutation(12)  # of the teacher's number for each class
    order, score = fitting_order(shuffled[labels], labels, names)
    assert isinstance(order, tuple)
    assert score == 1.0
    assert [order.index(name) for name in names] == list(shuffled)

    assert fitting_order(labels, labels, names) == (None, None)
    assert fitting_order(rng.integers(0, 12, 600), labels, names) == (None, None), "chance fits no order"
    assert fitting_order(labels[:1], labels[:1], names) == (None, None)


def test_what_is_wrong_with_a_teacher_is_said() -> None:
    good = fabricated.card(images=500, chance=0.1, val_score=0.9, train_score=0.98, train_confidence=0.97)
    assert good.problems() == good.remarks() == []
    assert fabricated.card().problems() == [], "an older card"
    (chance,) = fabricated.card(images=500, chance=0.1, val_score=0.12, never_predicted=("a",)).problems()
    assert chance.startswith("it is near chance: top-1 0.1200 on val, and 0.1000 by predicting the most frequent class")
    order = {"class_order": "natural", "class_order_score": 0.847, "val_score": 0.097, "images": 500, "chance": 0.1}
    (named,) = fabricated.card(**order).problems()
    assert named == (
        "its classes are in another order than the data's: top-1 0.0970 on val, but 0.8470 in natural order; set "
        "data.class_order: natural"
    )
    (listed,) = fabricated.card(**{**order, "class_order": ("b", "a")}).problems()
    assert listed.endswith('set data.class_order: ["b", "a"]')
    (sure,) = fabricated.card(val_score=0.7, train_score=1.0, train_confidence=0.999).problems()
    assert sure.startswith("it has memorised its training images: accuracy 1.0000 and mean confidence 0.9990 on train")
    (never,) = fabricated.card(never_predicted=("a", "b"), num_classes=10).problems()
    assert never == "it never predicts 2 of 10 classes on val: a, b"


def test_a_teacher_that_is_worse_than_a_known_student_is_named_before_the_search(root: Path) -> None:
    state = Workspace(root)
    folder = state.study("finished")
    experiment = load_study_experiment(folder.experiment_file)
    known = known_scratch(experiment, state)
    assert known is not None
    name, mean = known
    assert name == "finished"
    weak, good = fabricated.card(val_score=mean - 0.1), fabricated.card(val_score=mean + 0.01)
    sentence = weak_teachers([weak], experiment, state)
    assert sentence is not None
    assert f"less than the student without a teacher in study 'finished' ({mean:.4f})" in sentence
    assert weak_teachers([weak, good], experiment, state) is None
    assert weak_teachers([fabricated.card(val_score=0.1, metric="val/miou")], experiment, state) is None
    longer = experiment.model_copy(update={"data": experiment.data.model_copy(update={"seed": 1})})
    assert known_scratch(longer, state) is None


def test_folders_in_natural_order(
    tmp_path: Path, tiny_file: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders 1 to 12 of timm's reader: the teacher is right in natural order, and heterokd sorts 1, 10, 11, 12, 2."""
    import heterokd.teachers.diagnosis as diagnosis

    write_classes(tmp_path / "images", {str(number): 30 for number in range(1, 13)})
    file = tmp_path / "w.safetensors"
    save_weights(build_network("test_vit", 12, OPTIONS, image_size=32), file)
    data = {"dataset": "image_folder", "root": str(tmp_path / "images"), "image_size": 32, "labels_per_class": None}
    experiment = load_experiment(tiny_file(data=data, teacher={"checkpoint": str(file)}))

    def natural(network: object, split: Any, *more: object) -> tuple[Tensor, Tensor]:
        names, labels = sorted(str(number) for number in range(1, 13)), torch.tensor(split.labels)
        return one_hot(torch.tensor([int(names[label]) - 1 for label in labels]), 12).float(), labels

    monkeypatch.setattr(diagnosis, "_predictions", natural)
    with caplog.at_level(logging.WARNING):
        card = prepare_teacher(experiment, Workspace(tmp_path / "runs")).card
    assert card.class_order == "natural"
    assert "set data.class_order: natural" in caplog.text
