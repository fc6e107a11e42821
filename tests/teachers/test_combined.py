"""Several teachers that answer together: `teacher.cross_fit` and `teacher.ensemble`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment, load_recipe
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import TrainLoader
from heterokd.datasets.io.split import Splits
from heterokd.datasets.views.policy import ViewSpec
from heterokd.errors import ConfigError, DataError
from heterokd.execution.check import check_experiment, check_files
from heterokd.execution.run import RunContext, run_recipe
from heterokd.networks.combined import CombinedNetwork, mean_logits
from heterokd.networks.network import build_network, predict_spec
from heterokd.networks.weights import load_weights, save_weights
from heterokd.outputs import Outputs, Signal
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache.compute import view_outputs
from heterokd.teachers.cache_policy import cached_views, open_cache
from heterokd.teachers.folders import missing_folds
from heterokd.teachers.prepare import open_prepared, prepare_teachers, ready_teacher
from heterokd.tracking.labels import trial_params
from heterokd.training.data import open_splits
from heterokd.training.folds import folds_of
from heterokd.training.teacher import LiveTeacher

Write = Callable[..., Path]
VIT, CNN = "test_vit", "test_resnet"
SMALL = {"img_size": 32, "patch_size": 8}
FIT = {"epochs": 1, "warmup_epochs": 0, "batch_size": 64, "precision": "fp32", "channels_last": False}
FOLDS: dict[str, Any] = {"network": VIT, "options": SMALL, "cross_fit": 3, "training": FIT}
BOTH: dict[str, Any] = {"ensemble": [VIT, CNN], "options": {VIT: SMALL}, "training": FIT}


def asked(write: Write, teacher: dict[str, Any], **sections: Any) -> Experiment:
    """The tiny experiment with this teacher alone: the file's other keys of the section are replaced."""
    file = write(**sections)
    content = yaml.safe_load(file.read_text())
    content["teacher"] = teacher
    file.write_text(yaml.safe_dump(content))
    return load_experiment(file)


def random_teacher(recipe: Recipe, seed: int = 0) -> LiveTeacher:
    """The recipe's teacher, with random weights."""
    torch.manual_seed(seed)
    network = build_network(recipe.teacher.network, 10, recipe.teacher.options, image_size=32)
    return LiveTeacher(network, folds=folds_of(recipe))


def members(live: LiveTeacher) -> list[torch.nn.Module]:
    assert isinstance(live.network, CombinedNetwork)
    return list(live.network.members)


# --- what an experiment says


def test_an_ensemble_takes_what_it_needs_from_the_section(tiny_file: Write, tmp_path: Path) -> None:
    file = tmp_path / "cnn.safetensors"
    teacher = {
        "ensemble": [VIT, {"network": CNN, "checkpoint": str(file)}, {"network": VIT, "training": {"seed": 1}}],
        "options": {VIT: SMALL},
        "training": FIT,
        "image_size": 64,
    }
    experiment = asked(tiny_file, teacher)
    vit, cnn, other = experiment.teacher.settings_of().members
    assert experiment.teacher.networks == (f"ensemble({VIT}, {CNN}, {VIT})",)
    assert (vit.network, vit.options, vit.training.epochs, vit.image_size) == (VIT, SMALL, 1, 64)
    assert (cnn.network, cnn.options, cnn.checkpoint) == (CNN, {}, file)
    assert (other.training.seed, other.training.epochs) == (1, 60)
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    recipe = experiment.recipe({"method": "kd"})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml").hash == recipe.hash


def test_members_are_the_teachers_that_they_would_be_alone(tiny_file: Write) -> None:
    alone = asked(tiny_file, {"network": VIT, "options": SMALL, "training": FIT})
    folds, both = asked(tiny_file, FOLDS), asked(tiny_file, BOTH)
    assert folds.member_experiments == (alone,)
    assert both.member_experiments[0] == alone
    assert trial_params(folds.recipe({"method": "kd"}), {})["teacher.cross_fit"] == "3"
    assert "teacher.cross_fit" not in trial_params(alone.recipe({"method": "kd"}), {})
    hashes = {each.recipe({"method": "kd"}).hash for each in (alone, folds, both)}
    assert len(hashes) == 3
    for each in (folds, both):  # as a node of a cluster reads it
        recipe = each.recipe({"method": "kd"})
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    plain = alone.recipe({"method": "kd"}).teacher.model_dump(exclude_defaults=True)
    assert not {"cross_fit", "ensemble", "average"} & set(plain)


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        ({"ensemble": [VIT]}, "ensemble: name at least two networks"),
        ({**BOTH, "network": VIT}, r"ensemble: its list names the networks; remove teacher\.network"),
        ({**BOTH, "cross_fit": 3}, "give either ensemble or cross_fit"),
        ({**BOTH, "checkpoint": "a"}, f"checkpoint: one file cannot hold 2 networks; .*{VIT}: FILE, {CNN}: FILE"),
        ({"ensemble": [VIT, {"netwrk": CNN}]}, r"teacher\.ensemble\[1\]\.netwrk.*'network'"),
        ({"ensemble": [VIT, {"network": CNN, "fit": "head"}]}, r"fit: head solves the classifier on pretrained"),
        ({**FOLDS, "cross_fit": 1}, r"teacher\.cross_fit: must be at least 2"),
        ({**FOLDS, "checkpoint": "a"}, "checkpoint is fitted already"),
        ({**FOLDS, "average": "logits"}, r"average: is for teacher\.ensemble"),
        ({"network": VIT, "options": {"cross_fit": 3}}, "cross_fit is no option but a key"),
    ],
)
def test_contradictions_are_refused(teacher: dict[str, Any], sentence: str, tiny_file: Write) -> None:
    with pytest.raises(ConfigError, match=sentence):
        asked(tiny_file, teacher)


def test_mixed_views_and_segmentation_are_refused(tiny_file: Write) -> None:
    with pytest.raises(ConfigError, match="cross_fit: mixup and cutmix show an image to the teachers"):
        asked(tiny_file, FOLDS, data={"augment": {"mixup": 0.2}})
    scenes = {"dataset": "digit_scenes", "image_size": 64, "labels_per_class": None}
    with pytest.raises(ConfigError, match=r"teacher\.ensemble: is for whole images; in segmentation"):
        asked(
            tiny_file,
            {"ensemble": ["fpn-resnet18", "unet-resnet18"]},
            data=scenes,
            student={"network": "fpn-resnet18"},
            search={"space": {"methods": ["scratch"]}},
        )


def test_a_members_file_is_checked_before_work(tiny_file: Write, tmp_path: Path) -> None:
    experiment = asked(tiny_file, {**BOTH, "checkpoint": {CNN: str(tmp_path / "none.safetensors")}})
    with pytest.raises(Exception, match=r"teacher\.ensemble\[1\]\.checkpoint: there is no file"):
        check_experiment(experiment)
    (tmp_path / "none.safetensors").write_bytes(b"damaged")
    with pytest.raises(Exception, match=r"teacher\.ensemble\[1\]\.checkpoint: .*none\.safetensors"):
        check_files(experiment, Workspace(tmp_path / "runs"))


# --- what they give


@pytest.mark.parametrize(
    ("teacher", "serves"),
    [
        (BOTH, Signal.LOGITS | Signal.EMBEDDING),
        (FOLDS, Signal.LOGITS),
        (
            {"network": CNN, "cross_fit": 3, "pretrained": True, "fit": "head"},
            Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.STEM,
        ),
    ],
)
def test_methods_that_read_more_are_left_out_with_the_reason(
    teacher: dict[str, Any], serves: Signal, tiny_file: Write
) -> None:
    experiment = asked(tiny_file, teacher, search={"space": {"methods": "all"}})
    settings = experiment.teacher.settings_of()
    spec = predict_spec(settings.network, 10, settings.options, 32)
    assert spec.serves == serves
    assert spec.embedding_dim == sum(
        predict_spec(each.network, 10, each.options, 32).embedding_dim for each in settings.members
    )
    excluded = check_experiment(experiment)
    assert excluded, "methods that read the tail"
    for method in experiment.methods:
        needs = experiment.method_class(method).teacher_needs
        assert needs & ~serves == Signal.NONE or "teacher" in excluded[method], method
        assert settings.network in excluded.get(method, settings.network)
    assert {"kd", "dkd", "dist"} & set(excluded) == set()
    with pytest.raises(ConfigError, match=r"fbt does not exist for .*teacher"):
        check_experiment(experiment.with_methods(["kd", "fbt"]))


def test_the_mean_is_that_of_the_probabilities_or_of_the_logits() -> None:
    logits = [torch.randn(5, 10), 4 * torch.randn(5, 10)]
    mean = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
    torch.testing.assert_close(mean_logits(logits).softmax(1), mean)
    torch.testing.assert_close(mean_logits(logits).exp(), mean)
    torch.testing.assert_close(mean_logits(logits, "logits"), (logits[0] + logits[1]) / 2)
    torch.testing.assert_close(mean_logits(logits[:1]).softmax(1), logits[0].softmax(1))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_a_cached_ensemble_answers_with_the_direct_mean(average: str, tiny_file: Write, tmp_path: Path) -> None:
    recipe = asked(tiny_file, {**BOTH, "average": average}).recipe({"method": "hcd"})
    splits, live = open_splits(recipe.data), random_teacher(recipe)
    cache = open_cache(recipe, splits, live, Workspace(tmp_path), "cpu", build=True)
    for batch in TrainLoader(splits.train, replace(cached_views(recipe), seed=0), 16, num_classes=10).epoch(1):
        stored = cache.outputs(batch, Signal.LOGITS | Signal.EMBEDDING)
        found: list[Outputs] = [member(batch.images, Signal.LOGITS | Signal.EMBEDDING) for member in members(live)]
        logits = torch.stack([each.logits for each in found])
        if average == "probabilities":
            torch.testing.assert_close(stored.logits.softmax(1), logits.softmax(2).mean(0), atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(stored.logits, logits.mean(0), atol=1e-5, rtol=1e-4)
        embeddings = torch.cat([each.embedding for each in found], dim=1)
        torch.testing.assert_close(stored.embedding, embeddings, atol=1e-5, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 7), seed=st.integers(0, 2**31), per_class=st.one_of(st.none(), st.integers(1, 9)))
def test_no_image_is_answered_by_a_teacher_that_has_seen_it(count: int, seed: int, per_class: int | None) -> None:
    """Of all images, and of those that a student keeps; the folds of each class differ by at most an image."""
    teacher = {**FOLDS, "cross_fit": count, "training": {**FIT, "seed": seed}}
    data = {"dataset": "digits", "image_size": 8}
    experiment = Experiment.model_validate(
        {
            "name": "folds",
            "data": data | ({} if per_class is None else {"labels_per_class": per_class}),
            "teacher": teacher,
            "student": {"network": CNN},
            "search": {"space": {"methods": ["kd"]}},
        }
    )
    recipe = experiment.recipe({"method": "kd"})
    whole = open_splits(recipe.data.model_copy(update={"labels_per_class": None}))
    splits, folds = open_splits(recipe.data), folds_of(recipe)
    assert folds is not None
    for fold in range(count):
        seen = whole.without_fold(fold, count, seed)
        assert seen.train.kept is not None
        kept = np.arange(len(whole.train)) if splits.train.kept is None else splits.train.kept
        answered = kept[folds.of_image == fold]
        assert not set(answered.tolist()) & set(seen.train.kept.tolist())
        assert seen.fingerprint != whole.fingerprint
        np.testing.assert_array_equal(seen.train.labels, whole.train.labels[seen.train.kept])
    assert len(folds.of_image) == len(splits.train)
    for number in range(10):
        sizes = np.bincount(whole.folds(count, seed)[whole.train.labels == number], minlength=count)
        assert sizes.max() - sizes.min() <= 1
    sizes = np.bincount(whole.folds(count, seed), minlength=count)
    assert sizes.max() - sizes.min() <= 1


def test_images_of_a_group_are_in_the_same_fold() -> None:
    splits = open_splits(Experiment.model_validate(dict(QUICK)).data)
    groups = tuple(f"group {number % 97}" for number in range(len(splits.train)))
    grouped = replace(splits, train=replace(splits.train, groups=groups))
    folds = grouped.folds(4)
    assert all(len(set(folds[np.array(groups) == group].tolist())) == 1 for group in set(groups))
    assert set(folds.tolist()) == {0, 1, 2, 3}
    part = grouped.without_fold(0, 4)
    assert part.train.groups == tuple(np.array(groups)[folds != 0].tolist())


QUICK: dict[str, Any] = {
    "name": "quick",
    "data": {"dataset": "digits", "image_size": 8},
    "teacher": FOLDS,
    "student": {"network": CNN},
    "search": {"space": {"methods": ["kd"]}},
}


def test_too_few_images_are_refused() -> None:
    splits: Splits = open_splits(Experiment.model_validate(dict(QUICK)).data)
    with pytest.raises(DataError, match=r"teacher\.cross_fit: 10 training images cannot be divided into 11 folds"):
        splits.with_labels_per_class(1).folds(11)


def test_an_image_is_answered_by_its_fold_cached_or_not(tiny_file: Write, tmp_path: Path) -> None:
    """In fp32 on a CPU the cache is bit-equal to what each member gives; plain images get the mean."""
    recipe = asked(tiny_file, FOLDS).recipe({"method": "kd"})
    splits, live = open_splits(recipe.data), random_teacher(recipe)
    assert live.folds is not None
    assert len(splits.train) == 40
    cache = open_cache(recipe, splits, live, Workspace(tmp_path), "cpu", build=True)
    assert cache.serves == Signal.LOGITS
    views = cached_views(recipe)
    of_member = [
        view_outputs(splits.train, views, LiveTeacher(member), signals=Signal.LOGITS)  # type: ignore[arg-type]
        for member in members(live)
    ]
    for batch in TrainLoader(splits.train, views, 20, num_classes=10).epoch(2):
        stored = cache.outputs(batch, Signal.LOGITS).logits
        assert batch.shown is not None
        index, view = batch.shown.numpy().T
        direct = torch.stack([compute(index, view)["logits"] for compute in of_member])
        expected = direct[torch.from_numpy(live.folds.of_image[index]), torch.arange(len(index))]
        torch.testing.assert_close(stored, expected, rtol=0, atol=0)
        torch.testing.assert_close(live.outputs(batch, Signal.LOGITS).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(stored, direct.mean(0), atol=1e-3)
        plain = live.outputs(replace(batch, shown=None), Signal.LOGITS).logits
        probabilities = torch.stack([member(batch.images).logits.softmax(1) for member in members(live)])
        torch.testing.assert_close(plain.softmax(1), probabilities.mean(0), rtol=1e-4, atol=1e-5)


def test_folds_with_the_same_features_give_stages(tiny_file: Write) -> None:
    """With `fit: head`, only the classifiers differ: methods read stages and embedding, of a whole batch in order."""
    teacher = {"network": CNN, "cross_fit": 3, "pretrained": True, "fit": "head", "training": FIT}
    recipe = asked(tiny_file, teacher).recipe({"method": "kd"})
    live = random_teacher(recipe)
    first, *others = members(live)
    for number, other in enumerate(others, start=1):
        other.load_state_dict(first.state_dict())
        other.head.weight.data += number  # type: ignore[union-attr, operator]
    needs = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES | Signal.STEM
    splits = open_splits(recipe.data)
    batch = next(iter(TrainLoader(splits.train, ViewSpec(recipe.data.policy, 0), 40, num_classes=10).epoch(0)))
    found, expected = live.outputs(batch, needs), first(batch.images, needs)
    torch.testing.assert_close(found.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
    for stage, other_stage in zip(found.stages, expected.stages, strict=True):
        torch.testing.assert_close(stage, other_stage, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.stem, expected.stem, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.logits, expected.logits, atol=1e-3)


# --- fitted, stored, resumed


def test_an_interrupted_fit_goes_on_with_its_fold(tiny_file: Write, tmp_path: Path) -> None:
    experiment, root = asked(tiny_file, FOLDS), Workspace(tmp_path / "runs")
    seen: list[str] = []

    def report(metrics: dict[str, float], network: str) -> bool:
        seen.append(network)
        if network.endswith("fold 2 of 3") and seen.count(network) == 1:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        prepare_teachers(experiment, root, report)
    assert missing_folds(experiment, root) == 2
    assert ready_teacher(experiment, root) == (False, None)
    (prepared,) = prepare_teachers(experiment, root, report).values()
    names = [f"{VIT}, fold {fold} of 3" for fold in (1, 2, 2, 3)]
    assert seen == names or seen == [*names[:2], names[3]]  # the second fold's epoch was trained, or was kept
    assert prepared.fitted
    assert (missing_folds(experiment, root), ready_teacher(experiment, root)) == (0, (True, prepared.weights))
    (again,) = prepare_teachers(experiment, root, report).values()
    assert (again.fitted, again.card) == (False, prepared.card)
    card = prepared.card
    assert [member.split()[0] for member in card.members] == [VIT] * 3
    assert card.train_score is not None
    assert card.source == f"cross-fitted {VIT}"


def test_members_of_an_ensemble_are_fitted_or_read(tiny_file: Write, tmp_path: Path) -> None:
    """A member with a checkpoint keeps its weights; the ensemble's file holds both."""
    given_file = tmp_path / "cnn.safetensors"
    torch.manual_seed(5)
    cnn = build_network(CNN, 10, {}, image_size=32)
    save_weights(cnn, given_file)
    experiment, root = asked(tiny_file, {**BOTH, "checkpoint": {CNN: str(given_file)}}), Workspace(tmp_path / "runs")
    (prepared,) = prepare_teachers(experiment, root).values()
    recipe = experiment.recipe({"method": "kd"})
    live = open_prepared(recipe, prepared.weights, 10, root)
    assert prepared.weights is not None
    for name, tensor in cnn.body.state_dict().items():
        assert torch.equal(members(live)[1].body.state_dict()[name], tensor)  # type: ignore[union-attr, operator]
    alone = asked(tiny_file, {"network": VIT, "options": SMALL, "training": FIT})
    (vit,) = prepare_teachers(alone, root).values()
    assert not vit.fitted, "a member is stored as the teacher that it is alone"
    network = build_network(VIT, 10, SMALL, image_size=32)
    assert vit.weights is not None
    load_weights(network, vit.weights)
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(members(live)[0](images).logits, network.eval()(images).logits)
    assert json.loads((prepared.weights.parent / "teacher.json").read_text())["members"] == list(prepared.card.members)


@pytest.mark.parametrize(
    ("teacher", "method"), [(FOLDS, "dkd"), (BOTH, "crd"), pytest.param(BOTH, "rkd", marks=pytest.mark.thorough)]
)
def test_students_are_trained(teacher: dict[str, Any], method: str, tiny_file: Write, tmp_path: Path) -> None:
    """A training with the cache equals one with the running teacher where views and batches are the same."""
    experiment, root = asked(tiny_file, teacher, training={"epochs": 2, "batch_size": 16}), Workspace(tmp_path / "runs")
    (prepared,) = prepare_teachers(experiment, root).values()
    recipe = experiment.recipe({"method": method})
    losses = []
    for use in ("built", "found"):
        folder = TrialFolder(tmp_path / use)
        folder.path.mkdir()
        trained = run_recipe(
            recipe,
            folder,
            RunContext(root, prepared.weights, cache_use=use),
            lambda metrics: True,  # type: ignore[arg-type]
        )
        losses.append(trained.metrics["train/loss"])
    assert np.isfinite(losses).all()
    assert losses[0] == losses[1]
