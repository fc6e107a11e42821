"""A teacher with another image size sees the student's views, rendered at its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fabricated import random_student

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.loaders import open_split
from heterokd.datasets.views.policy import POLICIES
from heterokd.datasets.views.render import view_images
from heterokd.errors import ConfigError, DataError
from heterokd.networks.weights import save_weights
from heterokd.outputs import Batch, Signal
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache_policy import cache_key, open_cache
from heterokd.teachers.prepare import open_prepared, prepare_teacher, teacher_recipe
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.memory import estimate_memory
from heterokd.training.teacher import teacher_hash
from heterokd.training.teacher_views import teacher_views

Write = Callable[..., Path]
FIT = {"epochs": 1, "warmup_epochs": 0, "batch_size": 64, "precision": "fp32", "channels_last": False}


@pytest.fixture
def asked(tiny_file: Write) -> Experiment:
    return load_experiment(
        tiny_file(
            teacher={"network": "test_resnet", "options": {}, "image_size": 64, "training": FIT}, cache={"views": 2}
        )
    )


@pytest.fixture
def recipe(asked: Experiment) -> Recipe:
    return asked.recipe({"method": "kd"})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_weights(random_student(size=64), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "scenes"])
def test_a_view_is_the_same_at_every_size(name: str) -> None:
    """Every policy: rendered at 64 pixels and averaged, a view is close to that at 32 pixels, unlike another view."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(24, 3, 4, 4, generator=generator), size=64, mode="bicubic").clamp(0, 1)
    small = F.avg_pool2d(smooth, 2)
    policy = POLICIES[name].model_copy(update={"erasing": 0.0})  # whose noise is drawn for each pixel
    index = np.arange(24)
    views = [
        view_images(images.permute(0, 2, 3, 1).contiguous(), index, view, policy)
        for images, view in ((smooth, 3), (small, 3), (small, 4))
    ]
    large, same, other = F.avg_pool2d(views[0], 2), views[1], views[2]
    assert (large - same).abs().mean() < 0.02
    assert policy == POLICIES["none"] or (large - other).abs().mean() > 0.04


def test_without_a_size_nothing_changes(asked: Experiment, tiny_file: Write) -> None:
    plain = load_experiment(tiny_file(teacher={"network": "test_resnet", "options": {}, "training": FIT}))
    same = plain.model_copy(update={"teacher": plain.teacher.model_copy(update={"image_size": 32})})
    recipes = [each.recipe({"method": "kd"}) for each in (plain, same, asked)]
    assert [recipe.teacher_size for recipe in recipes] == [32, 32, 64]
    assert [teacher_views(recipe) is None for recipe in recipes] == [True, True, False]
    hashes = [
        teacher_hash(
            each.teacher.settings_of(), teacher_recipe(each), open_splits(teacher_recipe(each).data).fingerprint
        )
        for each in (plain, same, asked)
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert "image_size" not in recipes[0].teacher.model_dump(exclude_defaults=True)


def test_scenes_that_are_drawn_have_no_other_size(tiny_file: Write) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.image_size: data set 'digit_scenes' has no larger images"):
        load_experiment(
            tiny_file(
                data={"dataset": "digit_scenes", "image_size": 64, "labels_per_class": None},
                teacher={"network": "fpn-resnet18", "options": {}, "image_size": 128},
                student={"network": "fpn-resnet18"},
                search={"space": {"methods": ["scratch"]}},
            )
        )


def test_the_cache_holds_what_the_teacher_sees(recipe: Recipe, weights: Path, tmp_path: Path) -> None:
    splits, root = open_splits(recipe.data), Workspace(tmp_path / "runs")
    live = open_prepared(recipe, weights, splits.num_classes, root)
    assert live is open_prepared(recipe, weights, splits.num_classes, root)
    assert (live.spec.image_size, live.network.spec.image_size) == (64, 64)
    key = cache_key(recipe, splits, live, root)
    assert (key.size, key.teacher_size) == ((32, 32), 64)
    assert key.id != replace(key, teacher_size=None).id, "the same network on enlarged views of the student"
    assert "teacher_size" not in replace(key, teacher_size=None).to_json()
    assert "at 64 x 64" in key.describe()

    cached = open_cache(recipe, splits, live, root, "cpu", build=True)
    large = open_splits(recipe.data.model_copy(update={"image_size": 64}))
    assert large.train.labels.tolist() == splits.train.labels.tolist()
    batch = next(recipe_loaders(recipe, splits).train.epoch(1))
    assert batch.shown is not None
    index, view = batch.shown.numpy().T
    pixels = torch.from_numpy(large.train.images.read(index))
    with torch.inference_mode():
        expected = live.network(view_images(pixels, index, view, recipe.data.policy, recipe.training.seed)).logits
    for teacher in (cached, live):
        torch.testing.assert_close(teacher.outputs(batch, Signal.LOGITS).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match=r"needs the index and view of each image"):
        live.outputs(Batch(images=batch.images, labels=batch.labels, index=batch.index), Signal.LOGITS)

    val = open_split(splits.val, splits.num_classes)
    with torch.inference_mode():
        plain = torch.from_numpy(large.val.images.read(np.arange(len(large.val)))).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(live.classes(val, "cpu"), live.network(plain).logits.argmax(dim=1))


@pytest.mark.thorough
def test_the_teacher_is_fitted_at_its_size(asked: Experiment, tmp_path: Path) -> None:
    assert prepare_teacher(asked, Workspace(tmp_path / "runs")).card.image_size == 64


def test_memory_is_estimated_at_the_teachers_size(recipe: Recipe) -> None:
    small = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"image_size": None})})
    splits = open_splits(recipe.data)
    assert estimate_memory(recipe, splits, 2**34) > estimate_memory(small, splits, 2**34)
