"""The experiments of the papers' tables: written by their generator, valid, and each of its kind can be trained."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_datasets
import torch

from heterokd.config.experiment import Experiment
from heterokd.config.methods import methods_of
from heterokd.config.reading import load_experiment
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import make_loaders
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import ViewSpec
from heterokd.errors import PairError
from heterokd.execution.reproduce import chosen_methods
from heterokd.methods import METHODS
from heterokd.networks.network import predict_spec
from heterokd.study.published import published_pairs, published_results, published_samples
from heterokd.training.teacher import open_teacher
from heterokd.training.train import train

FOLDER = Path(__file__).parents[1] / "experiments" / "papers"
FILES = sorted(FOLDER.glob("*.yaml"))
TEACHERS = sorted(FOLDER.glob("teachers/*.yaml"))
DENSE = [file for file in FILES if file.name.startswith(("cirkd", "heteroakd"))]
CLASSES = {"cifar100": 100, "imagenet": 1000, "cub200": 200, "fgvc_aircraft": 100}
CLASSES |= {"cityscapes": 19, "voc2012": 21, "ade20k": 150}
# HeteroAKD's pair on PASCAL VOC 2012, of which no number is quoted.
UNPRINTED = "heteroakd_voc2012_resnet101_segformer_mit_b0"


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("generate")


def test_the_files_are_those_of_the_generator(generator: ModuleType) -> None:
    written = {path.relative_to(FOLDER).as_posix(): path.read_text() for path in (*FILES, *TEACHERS)}
    stale = sorted(name for name, text in generator.files().items() if written.get(name) != text)
    assert not stale, "run: python experiments/papers/generate.py"
    assert set(written) == set(generator.files())


def test_there_is_one_for_each_pair() -> None:
    pairs = set()
    for file in FILES:
        experiment = load_experiment(file)
        assert experiment.name == file.stem
        pairs.add((experiment.data.dataset, experiment.teacher.network, experiment.student.networks[0]))
        found = published_results(experiment.data.dataset, experiment.teacher.network, experiment.student.networks[0])
        if experiment.name == UNPRINTED:
            assert found is None
            continue
        assert found is not None
        known = {method for method in found.methods if method in METHODS} | {"scratch"}
        if experiment.data.task == "classification":
            assert set(experiment.methods) == known
        else:
            assert set(experiment.methods) == set(methods_of("segmentation"))
            assert set(chosen_methods(experiment, None)) == known, "what is reproduced is what is published"
        assert all(f"{result.value:.2f}" in file.read_text() for result in found.results)
    assert len(pairs) == len(FILES) == len(published_pairs()) + 1
    assert len(published_pairs()) == (12 + 14 + 2 + 2 * 16) + (5 + 4 - 1), "CIRKD and HeteroAKD share one"


@pytest.mark.parametrize("file", DENSE, ids=lambda file: file.stem)
def test_segmentation_follows_cirkds_scripts(file: Path) -> None:
    """As many updates as theirs, within a share of an epoch; the first of their two sets of views."""
    experiment = load_experiment(file)
    is_transformer_pair = experiment.teacher.network.startswith("segformer")
    images = {"cityscapes": 2975, "voc2012": 10582, "ade20k": 20210}[experiment.data.dataset]
    share = {"cityscapes": 0.1, "voc2012": 0.1, "ade20k": 0.05}[experiment.data.dataset]
    for training in (experiment.training, experiment.teacher.training):
        steps = round(images * (1 - share)) // training.batch_size
        updates = 160_000 if is_transformer_pair else 40_000
        assert abs(training.epochs * steps - updates) <= steps / 2
        assert training.schedule == "poly"
        assert not training.warmup_epochs
        assert not training.label_smoothing
    assert experiment.data.view_size == (
        (1024, 1024) if is_transformer_pair else (512, 1024 if experiment.data.dataset == "cityscapes" else 512)
    )
    assert experiment.metric == "val/miou"
    assert experiment.student.pretrained


@pytest.mark.parametrize("file", TEACHERS, ids=lambda file: file.stem)
def test_a_teacher_is_fitted_from_published_weights(file: Path) -> None:
    experiment = load_experiment(file)
    assert experiment.teacher.pretrained
    if experiment.data.task == "segmentation":
        return  # the encoder's weights, for which smp knows one source, under a new decoder
    assert "." in experiment.teacher.network, "the tag says which weights"
    fitted = experiment.teacher.training
    assert fitted.trainable == "head" or fitted.learning_rate < 1e-4, "the weights would be lost"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_method_of_a_file_exists_for_its_pair(file: Path) -> None:
    experiment = load_experiment(file)
    size, classes = experiment.data.image_size, CLASSES[experiment.data.dataset]
    teacher = predict_spec(experiment.teacher.network, classes, experiment.teacher.options, size)
    student = predict_spec(experiment.student.networks[0], classes, experiment.student.options, size)
    pair = published_results(experiment.data.dataset, experiment.teacher.network, experiment.student.networks[0])
    if file.stem != UNPRINTED:
        assert pair is not None
        assert (teacher.kind, student.kind) == (pair.teacher_kind, pair.student_kind)
    refused = {}
    for method in experiment.methods:
        for sample in published_samples(experiment, method):
            try:
                with torch.device("meta"):
                    METHODS[method](experiment.recipe(sample).method_params, student, teacher)
            except PairError as error:
                refused[method] = str(error)
    assert not refused


def representatives() -> list[Any]:
    """One file for each data set of classification and kind of student."""
    found: dict[tuple[str, str], Path] = {}
    for pair in published_pairs():
        if pair.metric == "miou":
            continue  # views of 512x1024 pixels are not for a CPU
        file = next(path for path in FILES if _is_of(path, pair.dataset, pair.teacher, pair.student))
        found.setdefault((pair.dataset, pair.student_kind), file)
    return [pytest.param(file, id="-".join(key)) for key, file in found.items()]


def _is_of(path: Path, dataset: str, teacher: str, student: str) -> bool:
    text = path.read_text()
    return f"dataset: {dataset}," in text and f"network: {teacher}." in text and f"{{network: {student}}}" in text


@pytest.mark.slow
@pytest.mark.parametrize("file", representatives())
def test_one_of_each_kind_trains(file: Path, tmp_path: Path) -> None:
    """Two steps at the real size, on a tiny copy of the data set in its real format; the teacher is not fitted."""
    steps, batch = 2, 4
    experiment = _shrunk(file, tmp_path, batch)
    data = experiment.data
    tiny_datasets.TINY[data.dataset].write(tmp_path)
    splits = load_dataset(data.dataset, data.root, data.image_size)
    splits = _cut(splits, steps * batch)
    loaders = make_loaders(splits, ViewSpec(data.policy), batch)
    teacher = open_teacher(experiment.teacher.settings_of(), splits.num_classes, data.image_size, None)
    method = "hcd" if "hcd" in experiment.methods else "fbt"
    recipe = experiment.recipe(published_samples(experiment, method)[0])
    trained = train(recipe, teacher, loaders, lambda metrics: True)
    assert trained.epochs == 1
    assert 0 <= trained.metrics["val/top1"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "file"), list(enumerate(FILES)), ids=[file.stem for file in FILES])
def test_every_file_trains(number: int, file: Path, tmp_path: Path) -> None:
    """Two steps of each file on tiny images, with its own networks (the largest encoders cut to four blocks).

    The methods take turns, so that all of them meet networks of the tables.
    """
    steps, batch = 2, 4
    experiment = _shrunk(file, tmp_path, batch)
    # DINOv2's patches are 14 pixels wide, the others' windows and patches divide 64.
    size = 56 if "dinov2" in experiment.teacher.network else 64
    options = {"img_size": size, "depth": 4} if "vit_" in experiment.teacher.network else {}
    crop = None if experiment.data.crop is None else (size, size)
    experiment = experiment.model_copy(
        update={
            "data": experiment.data.model_copy(update={"image_size": size, "crop": crop}),
            "teacher": experiment.teacher.model_copy(update={"options": options}),
        }
    )
    data = experiment.data
    tiny_datasets.TINY[data.dataset].write(tmp_path)
    splits = _cut(load_dataset(data.dataset, data.root, size), steps * batch)
    loaders = make_loaders(splits, ViewSpec(data.policy, crop=data.crop), batch)
    teacher = open_teacher(experiment.teacher.settings_of(), splits.num_classes, size, None)
    # Not CIRKD: its queues of 150 classes are gigabytes.
    methods = [method for method in experiment.methods if method != "cirkd"]
    method = "heteroakd" if "heteroakd" in file.stem else methods[number % len(methods)]
    trained = train(experiment.recipe({"method": method}), teacher, loaders, lambda metrics: True)
    assert trained.epochs == 1
    assert math.isfinite(trained.metrics["train/loss"])


def _shrunk(file: Path, root: Path, batch: int) -> Experiment:
    changes = (
        f"data.root={root}",
        "teacher.pretrained=false",
        "student.pretrained=false",
        "training.epochs=1",
        "training.warmup_epochs=0",
    )
    return load_experiment(file, [*changes, f"training.batch_size={batch}"])


def _cut(splits: Splits, images: int) -> Splits:
    val = splits.val.chosen(np.arange(min(2, len(splits.val))))
    return replace(splits, train=splits.train.chosen(np.arange(images)), val=val, fingerprint="tiny")
