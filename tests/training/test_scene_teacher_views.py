"""In segmentation, a teacher of another image size sees the student's crop: in training, caches and evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from heterokd.config.data_sizes import data_at
from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.datasets.io.images import placed_size
from heterokd.datasets.io.loaders import open_split
from heterokd.methods import METHODS
from heterokd.networks.network import build_network
from heterokd.outputs import IGNORE, Signal
from heterokd.storage.workspace import Workspace
from heterokd.teachers.cache_policy import cache_key, open_cache
from heterokd.teachers.folders import teacher_recipe
from heterokd.teachers.prepare import prepare_teacher
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.evaluation import evaluate
from heterokd.training.memory import estimate_memory
from heterokd.training.setup import build_distiller
from heterokd.training.task_modules import build_task
from heterokd.training.teacher import LiveTeacher
from heterokd.training.teacher_views import teacher_views

Write = Callable[..., Path]
SIZES = ((150, 200), (40, 64), (96, 50), (30, 30))
"""Heights and widths: shrunk onto the student's canvas, and smaller than it."""
METHODS_OF_MAPS = sorted(name for name, kind in METHODS.items() if "segmentation" in kind.tasks and name != "scratch")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images whose red and green are the position in the image, with label maps of four quarters."""
    folder = tmp_path / "ramps"
    for split in ("train", "val", "test"):
        for number, (height, width) in enumerate(SIZES):
            down, across = np.mgrid[0:height, 0:width]
            pixels = np.stack((255 * (across + 0.5) / width, 255 * (down + 0.5) / height, 0 * down), 2)
            labels = (2 * (down >= height / 2) + (across >= width / 2)).astype(np.uint8)
            for kind, array in (("images", pixels.astype(np.uint8)), ("masks", labels)):
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / split / kind / f"{number}.png")
    return folder


@pytest.fixture
def asked(tiny_file: Write, root: Path) -> Experiment:
    file = tiny_file(
        data={
            "dataset": "mask_folder", "root": str(root), "image_size": 64, "crop": [64, 48], "augment": "scenes",
            "labels_per_class": None, "masks": {"classes": ["a", "b", "c", "d"]},
        },
        teacher={
            "network": "fpn-test_resnet", "options": {"decoder_pyramid_channels": 32}, "image_size": 128,
            "training": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0},
        },
        student={"network": "segformer-test_resnet", "options": {"decoder_segmentation_channels": 16}},
        training={"epochs": 2, "batch_size": 4},
        search={"space": {"methods": METHODS_OF_MAPS}, "min_epochs": 1},
    )  # fmt: skip
    return load_experiment(file)


@pytest.fixture
def recipe(asked: Experiment) -> Recipe:
    return asked.recipe({"method": "pixel_kd"})


def live_teacher(recipe: Recipe) -> LiveTeacher:
    torch.manual_seed(0)
    network = build_network("fpn-test_resnet", 4, recipe.teacher.options, image_size=recipe.teacher_size)
    return LiveTeacher(network, teacher_views(recipe))


def test_images_keep_their_place_on_a_larger_canvas() -> None:
    assert placed_size(30, 60, (64, 64)) == (30, 60)
    assert placed_size(30, 60, (128, 128), 64) == (60, 120), "enlarged with the canvas"
    assert placed_size(300, 600, (128, 128), 64) == (64, 128)
    assert placed_size(300, 600, (128, 256), 64) == (128, 256), "a canvas that is twice as wide"


def test_the_teacher_sees_the_crop_at_its_size(recipe: Recipe) -> None:
    batch = next(recipe_loaders(recipe, open_splits(recipe.data)).train.epoch(0))
    views = teacher_views(recipe)
    assert views is not None
    seen = views.of(batch)
    assert (batch.images.shape, seen.shape) == ((4, 3, 64, 48), (4, 3, 128, 96))
    halved = F.avg_pool2d(seen, 2)  # NaN where one of four pixels is padding
    both = ~halved.isnan() & ~batch.images.isnan()
    assert both.float().mean() > 0.2
    assert (halved.isnan() ^ batch.images.isnan()).float().mean() < 0.05, "the same padding, but for its border"
    assert (halved - batch.images)[both].abs().mean() < 0.01


@pytest.mark.parametrize("method", METHODS_OF_MAPS)
def test_every_method_learns_from_it(method: str, asked: Experiment) -> None:
    recipe = asked.recipe({"method": method})
    live = live_teacher(recipe)
    distiller = build_distiller(recipe, live, 4)
    batch = next(recipe_loaders(recipe, open_splits(recipe.data)).train.epoch(0))
    loss, terms = distiller(batch, live.outputs(batch, distiller.teacher_needs), 0.5)
    loss.backward()
    assert loss.isfinite()
    assert len(terms) > 1
    assert all(p.grad.isfinite().all() for p in distiller.student.parameters() if p.grad is not None)


def test_a_cache_holds_maps_of_its_size(recipe: Recipe, tmp_path: Path) -> None:
    splits, live, runs = open_splits(recipe.data), live_teacher(recipe), Workspace(tmp_path / "runs")
    key = cache_key(recipe, splits, live, runs)
    stride = live.spec.logits_stride
    assert (key.size, key.teacher_size) == ((64, 48), 128)
    assert key.logits == (4, 128 // stride, 96 // stride)
    assert "at image size 128" in key.describe()
    cached = open_cache(recipe, splits, live, runs, "cpu", build=True)
    batch = next(recipe_loaders(recipe, splits).train.epoch(1))
    expected = live.outputs(batch, Signal.LOGITS).logits
    torch.testing.assert_close(cached.outputs(batch, Signal.LOGITS).logits, expected, atol=1e-5, rtol=1e-5)


def test_it_is_fitted_and_judged_at_its_size(asked: Experiment, recipe: Recipe, tmp_path: Path) -> None:
    fit = teacher_recipe(asked).data
    assert (fit.image_size, fit.crop, fit.drawn_at) == (128, (128, 96), 64)
    assert data_at(asked.data, 64) is asked.data
    small, large = open_splits(asked.data), open_splits(fit)
    assert small.fingerprint != large.fingerprint
    assert large.val.extents.read(np.arange(4)).tolist() == [[96, 128], [80, 128], [128, 66], [60, 60]]
    assert small.val.extents.read(np.arange(4)).tolist() == [[48, 64], [40, 64], [64, 33], [30, 30]]
    prepared = prepare_teacher(asked, Workspace(tmp_path / "runs"))
    assert prepared.card.image_size == 128

    live, val = live_teacher(recipe), open_split(small.val, 4)
    classes = live.classes(val, "cpu")
    assert classes.shape == (4, 64, 64), "on the student's canvas, for the agreement"
    own = open_split(large.val, 4)
    padding = next(iter(own)).images.isnan().any(1).numpy()
    assert np.array_equal(own.split.label_maps.read(np.arange(4)) == IGNORE, padding)
    task = build_task("segmentation", 4)
    seen = dict(evaluate(live.network, live.plain(val, "cpu"), task))
    assert seen["miou"] == pytest.approx(dict(evaluate(live.network, own, task))["miou"])
    assert estimate_memory(recipe, small, 2**34) > estimate_memory(
        recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"image_size": None})}), small, 2**34
    )


def test_older_views_have_no_other_size(asked: Experiment) -> None:
    content = asked.model_dump(mode="json") | {"data": {**asked.data.model_dump(mode="json"), "scene_views": 2}}
    with pytest.raises(ValueError, match=r"teacher\.image_size: in segmentation it needs data\.scene_views: 3"):
        Experiment.model_validate(content)
