"""Training with images without labels: what learns from them, alone, in parts, and after a resumption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quick import cases
from torch import Tensor

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.datasets.views.policy import ViewSpec
from heterokd.errors import ConfigError, UserError
from heterokd.methods import METHODS
from heterokd.methods.conformance.random_pairs import STUDENTS, TEACHERS, both_outputs, random_batch
from heterokd.methods.fbt import FORMS
from heterokd.networks.network import build_network
from heterokd.networks.weights import weights_hash
from heterokd.outputs import UNLABELLED, Batch, Losses, Outputs
from heterokd.teachers.cache.cached_teacher import open_or_build
from heterokd.teachers.cache.key import CacheSettings, make_key
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.step import split_batch
from heterokd.training.task_modules import build_task
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import TrainOptions, train

Write = Callable[..., Path]
PAIR = ("cnn", "isotropic")
REST = {"data": {"dataset": "digits", "image_size": 32, "labels_per_class": 4, "unlabelled": "rest"}}


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    torch.manual_seed(0)
    return LiveTeacher(build_network("test_vit", 10, {"img_size": 32, "patch_size": 8}))


def asked(tiny_file: Write, **more: Any) -> Experiment:
    return load_experiment(tiny_file(search={"space": {"methods": "all"}}, **(REST | more)))


def half_labelled() -> Batch:
    """Images 0, 3, 5 and 6 have labels."""
    batch = random_batch(PAIR)
    labelled = torch.tensor([True, False, False, True, False, True, True, False])
    return replace(
        batch,
        labels=batch.labels.where(labelled, UNLABELLED),
        weights=2.0 * labelled,
        labelled=labelled,
        labelled_share=0.5,
    )


def rows(outputs: Outputs, chosen: Tensor) -> Outputs:
    return outputs.map(lambda values: values[chosen] if values.dim() > 1 else values)


def terms(name: str, student: Outputs, teacher: Outputs, batch: Batch, *, direct: bool = False) -> Losses:
    """The terms of a new method with the same weights, whose batch norms depend on no batch; `direct`: of `forward`."""
    torch.manual_seed(0)
    method = METHODS[name](None, STUDENTS[PAIR[0]], TEACHERS[PAIR[1]]).eval()
    given = student.only(method.student_needs), teacher.only(method.teacher_needs)
    return method(*given, batch, 0.9) if direct else method.terms(*given, batch, 0.9)


@pytest.mark.parametrize("name", ["dkd", "nkd", "rld", "ofa", "ipwd", "crd"])
def test_a_method_of_labels_learns_from_the_labelled_images_alone(name: str) -> None:
    batch, (student, teacher) = half_labelled(), both_outputs(PAIR)
    assert batch.labelled is not None
    chosen = batch.labelled.nonzero()[:, 0]
    part = Batch(batch.images[chosen], batch.labels[chosen], batch.index[chosen], batch.shown)
    expected = terms(name, rows(student, chosen), rows(teacher, chosen), part, direct=True)
    torch.testing.assert_close(terms(name, student, teacher, batch), expected, rtol=0, atol=0)


def test_terms_without_labels_are_those_of_the_whole_batch() -> None:
    batch, (student, teacher) = half_labelled(), both_outputs(PAIR)
    assert batch.labelled is not None
    chosen = batch.labelled.nonzero()[:, 0]
    labelled = Batch(batch.images[chosen], batch.labels[chosen], batch.index[chosen], batch.shown)
    whole = random_batch(PAIR)
    kd = terms("kd", student, teacher, batch)
    torch.testing.assert_close(kd, terms("kd", student, teacher, whole, direct=True), rtol=0, atol=0)
    found = terms("hcd", student, teacher, batch)
    every = terms("hcd", student, teacher, whole, direct=True)
    some = terms("hcd", rows(student, chosen), rows(teacher, chosen), labelled, direct=True)
    for name, value in found.items():
        torch.testing.assert_close(value, (every if name in ("kl", "sub_kl") else some)[name])
    both = terms("kd+dkd", student, teacher, batch)
    torch.testing.assert_close(both["kd"], kd["kd"])
    torch.testing.assert_close(both["target"], terms("dkd", student, teacher, batch)["target"])


def test_fbt_compares_embeddings_of_all_images_and_labels_of_some() -> None:
    batch, (student, teacher) = half_labelled(), both_outputs(PAIR)
    assert batch.labelled is not None
    torch.manual_seed(0)
    method = METHODS["fbt"](METHODS["fbt"].Params(infonce_weight=0), STUDENTS[PAIR[0]], TEACHERS[PAIR[1]])
    given = student.only(method.student_needs), teacher.only(method.teacher_needs)
    ofa = method(*given, batch, 0.9)["teacher_student"]
    chosen = batch.labelled.nonzero()[:, 0]
    expected = METHODS["fbt"].Params().ofa_weight * fbt_ofa(student, teacher, chosen)
    torch.testing.assert_close(ofa, method.params.teacher_student_weight * expected)  # type: ignore[attr-defined]
    whole = terms("fbt", student, teacher, batch)["teacher_student"]
    contrast = terms("fbt", student, teacher, random_batch(PAIR), direct=True)["teacher_student"] - ofa_of_all(
        student, teacher
    )
    torch.testing.assert_close(whole, expected + contrast)


def fbt_ofa(student: Outputs, teacher: Outputs, chosen: Tensor) -> Tensor:
    return FORMS["paper"](
        student.logits[chosen], teacher.logits[chosen].detach(), random_batch(PAIR).labels[chosen], 1.0
    )


def ofa_of_all(student: Outputs, teacher: Outputs) -> Tensor:
    return fbt_ofa(student, teacher, torch.arange(8))


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "hcd", "kd+dkd"])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_add_up_to_the_batch(name: str, parts: int) -> None:
    batch, (student, teacher) = half_labelled(), both_outputs(PAIR)
    task = build_task("classification", 10, label_smoothing=0.1)
    assert batch.labelled is not None
    loss = task(student.logits, batch.labels, batch.weights)
    labelled = batch.labelled
    torch.testing.assert_close(
        loss, F.cross_entropy(student.logits[labelled], batch.labels[labelled], label_smoothing=0.1)
    )
    whole = {"task": loss, **terms(name, student, teacher, batch)}
    sums = dict.fromkeys(whole, torch.zeros(()))
    start = 0
    for part in split_batch(replace(batch, shown=None), parts):
        chosen = torch.arange(start, start + len(part))
        start += len(part)
        share = len(part) / len(batch)
        found = terms(name, rows(student, chosen), rows(teacher, chosen), part)
        found["task"] = task(student.logits[chosen], part.labels, part.weights)
        sums = {key: sums[key] + share * found[key] for key in sums}
    torch.testing.assert_close(sums, whole)


def test_a_batch_of_mixed_labels_has_the_loss_of_its_labelled_images() -> None:
    batch, (student, _) = half_labelled(), both_outputs(PAIR)
    labelled = batch.labelled
    assert labelled is not None
    shares = random_batch(PAIR, soft=True).labels * labelled[:, None]
    found = build_task("classification", 10, label_smoothing=0.2)(student.logits, shares, batch.weights)
    torch.testing.assert_close(found, F.cross_entropy(student.logits[labelled], shares[labelled], label_smoothing=0.2))


@pytest.mark.parametrize("method", cases(["kd", "dkd", "hcd", "fbt", "scratch"], quick=["kd", "dkd"]))
def test_a_training_is_resumed_bit_for_bit(method: str, tiny_file: Write, teacher: LiveTeacher, tmp_path: Path) -> None:
    experiment = asked(tiny_file, training={"epochs": 2, "batch_size": 128, "clip_grad": 5.0})
    recipe, splits = experiment.recipe({"method": method}), open_splits(experiment.data)
    loaders = recipe_loaders(recipe, splits)
    assert len(loaders.train) == 1078 // 128
    mixed = {step.labelled is not None for step in loaders.train.epoch(0)}
    assert mixed == {method in ("kd", "hcd", "fbt")}  # the others get labelled images, in as many batches
    whole = train(recipe, teacher, loaders, lambda metrics: True)
    options = TrainOptions(checkpoint=tmp_path / "checkpoint.pt", checkpoint_epochs=(1,))
    train(recipe, teacher, loaders, lambda metrics: metrics["epoch"] < 1, options)
    resumed = train(recipe, teacher, recipe_loaders(recipe, splits), lambda metrics: True, options)
    assert weights_hash(resumed.student) == weights_hash(whole.student)


def test_a_cache_serves_images_without_labels_bit_for_bit(
    tiny_file: Write, teacher: LiveTeacher, tmp_path: Path
) -> None:
    experiment = asked(tiny_file, training={"epochs": 1, "batch_size": 64})
    recipe, splits = experiment.recipe({"method": "kd"}), open_splits(experiment.data)
    views = ViewSpec(recipe.data.policy, recipe.training.seed, recipe.views)
    key = make_key(splits, views, teacher.network)
    plain = load_experiment(tiny_file()).data.model_copy(update={"labels_per_class": 4, "unlabelled": None})
    assert key.images == 1078
    assert key.id != make_key(open_splits(plain), views, teacher.network).id
    cached = open_or_build(tmp_path / "caches", splits, views, teacher, CacheSettings(dtype="fp32"))
    for batch in recipe_loaders(recipe, splits).train.epoch(0):
        needs = METHODS["kd"].teacher_needs
        torch.testing.assert_close(
            cached.outputs(batch, needs).logits, teacher.outputs(batch, needs).logits, rtol=1e-5, atol=1e-5
        )


def test_too_few_labelled_images_of_a_part_are_refused(tiny_file: Write) -> None:
    experiment = asked(tiny_file, training={"epochs": 1, "batch_size": 32, "accumulate": 4, "unlabelled_share": 0.85})
    with pytest.raises(ConfigError, match=r"training.unlabelled_share: 8 images of a worker at a time have 1 with a"):
        recipe_loaders(experiment.recipe({"method": "kd"}), open_splits(experiment.data))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"data": {"labels_per_class": None, "unlabelled": "rest"}}, "unlabelled: rest is the training images that"),
        ({"data": {"unlabelled": None}, "training": {"unlabelled_share": 0.3}}, "needs data.unlabelled"),
        ({"training": {"unlabelled_share": 1.0}}, "training.unlabelled_share"),
        ({"data": {"unlabelled": "ftp://host/x"}}, "unlabelled.*expected a folder"),
        (
            {"data": {"dataset": "digit_scenes", "labels_per_class": None, "unlabelled": "photos"}},
            "unlabelled: is for images with one class, and data set 'digit_scenes' has label maps",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_refused(more: dict[str, Any], says: str, tiny_file: Write) -> None:
    with pytest.raises(UserError, match=says):
        load_experiment(tiny_file(**(REST | more | {"data": REST["data"] | more.get("data", {})})))


def test_the_share_is_searched_where_it_changes_something(tiny_file: Write) -> None:
    space = {
        "methods": ["scratch", "kd", "dkd", "hcd"],
        "shared": {"training.unlabelled_share": {"options": [0.3, 0.6]}},
    }
    experiment = load_experiment(tiny_file(**REST, search={"space": space}))
    searched = {method for method in experiment.methods if "training.unlabelled_share" in experiment.domains(method)}
    assert searched == {"kd", "hcd"}
    recipe = experiment.recipe({"method": "kd", "training.unlabelled_share": 0.6})
    assert recipe.training.unlabelled_share == 0.6
    assert recipe.hash != experiment.recipe({"method": "kd", "training.unlabelled_share": 0.3}).hash
    with pytest.raises(UserError, match=r"training.unlabelled_share.*set data.unlabelled, or remove it"):
        load_experiment(tiny_file(data={"unlabelled": None}, search={"space": space}))
