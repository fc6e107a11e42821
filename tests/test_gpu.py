"""The training core on a GPU: everything from a recipe to a student, with the teacher live and cached.

Skipped where there is none; the file needs neither Ray, Optuna nor MLflow: `pytest tests/test_gpu.py`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heterokd.config.experiment import Experiment
from heterokd.config.methods import methods_of
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.errors import ConfigError, PairError
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.trial_status import TrialSnapshot
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import open_prepared, prepare_teacher
from heterokd.training.data import open_splits, recipe_loaders
from heterokd.training.memory import estimate_memory
from heterokd.training.precision import forbid_tf32
from heterokd.training.train import TrainOptions, TrainResult, build_distiller, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

Write = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs")


def run(
    recipe: Recipe, root: Workspace, weights: Path | None, name: str, *, go_on: bool = True, cache: bool = True
) -> tuple[TrainResult, TrialFolder]:
    folder = TrialFolder(root.path / "trials" / name)
    folder.start(recipe, TrialSnapshot())
    context = RunContext(root, weights, device="cuda", cache_use="built" if cache else "found", checkpoint_epochs=(2,))
    trained = run_recipe(recipe, folder, context, lambda metrics: go_on or metrics["epoch"] < 2)
    return trained, folder


def largest_difference(first: TrainResult, second: TrainResult) -> float:
    pairs = zip(first.student.parameters(), second.student.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("method", methods_of("classification"))
def test_every_method_trains_from_files_to_files(method: str, tiny_file: Write, root: Workspace) -> None:
    experiment = load_experiment(tiny_file(search={"space": {"methods": [method]}}))
    prepared = prepare_teacher(experiment, root)
    recipe = experiment.recipe(experiment.published(method))
    try:
        build_distiller(recipe, open_prepared(recipe, prepared.weights, 10), 10)
    except PairError as reason:
        pytest.skip(str(reason))
    trained, folder = run(recipe, root, prepared.weights, method)
    assert [report["epoch"] for report in folder.metrics()] == [1, 2, 3]
    assert next(trained.student.parameters()).is_cuda
    assert folder.weights.exists()


@pytest.mark.parametrize("method", ["kd", "hcd", "fbt", "crd"])
def test_a_cached_teacher_gives_what_a_live_one_gives(method: str, tiny_file: Write, root: Workspace) -> None:
    experiment = load_experiment(tiny_file(search={"space": {"methods": [method]}}))
    prepared = prepare_teacher(experiment, root)
    recipe = experiment.recipe(experiment.published(method))
    live, _ = run(recipe, root, prepared.weights, "live", cache=False)
    again, _ = run(recipe, root, prepared.weights, "again", cache=False)
    cached, _ = run(recipe, root, prepared.weights, "cached")
    # A GPU adds in no fixed order: two live trainings say how far apart equal ones are.
    noise = largest_difference(live, again)
    assert largest_difference(live, cached) <= 10 * noise + 2e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_training_goes_on_where_it_was(precision: str, tiny_file: Write, root: Workspace) -> None:
    experiment = load_experiment(
        tiny_file(training={"precision": precision, "channels_last": True, "ema": 0.9, "epochs": 4})
    )
    prepared = prepare_teacher(experiment, root)
    recipe = experiment.recipe(experiment.published("dkd"))
    whole, _ = run(recipe, root, prepared.weights, "whole")
    again, _ = run(recipe, root, prepared.weights, "again")
    stopped, folder = run(recipe, root, prepared.weights, "stopped", go_on=False)
    assert stopped.stopped
    resumed, _ = run(recipe, root, prepared.weights, "stopped")
    assert [report["epoch"] for report in folder.metrics()] == [1, 2, 3, 4]
    assert largest_difference(whole, resumed) <= 10 * largest_difference(whole, again) + 5e-3


def test_a_compiled_student_learns_what_a_plain_one_learns(tiny_file: Write, root: Workspace) -> None:
    experiment = load_experiment(tiny_file())
    prepared = prepare_teacher(experiment, root)
    recipe = experiment.recipe(experiment.published("kd"))
    compiled = recipe.model_copy(update={"training": recipe.training.model_copy(update={"compile": True})})
    plain, _ = run(recipe, root, prepared.weights, "plain")
    faster, _ = run(compiled, root, prepared.weights, "compiled")
    assert faster.metrics["train/loss"] == pytest.approx(plain.metrics["train/loss"], rel=0.05)


def test_no_step_waits_for_the_device(tiny_file: Write, root: Workspace) -> None:
    experiment = load_experiment(tiny_file(training={"clip_grad": 5.0}))
    prepared = prepare_teacher(experiment, root)
    recipe = experiment.recipe(experiment.published("dkd"))
    splits = open_splits(recipe.data)
    loaders = recipe_loaders(recipe, splits, "cuda")
    teacher = open_prepared(recipe, prepared.weights, splits.num_classes)
    teacher.network.to("cuda")
    list(loaders.train.epoch(0))  # puts the images where they stay
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(recipe, teacher, loaders, lambda metrics: True, TrainOptions(device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = Counter(Path(one.filename).name for one in told if "synchronizing CUDA operation" in str(one.message))
    # Networks are moved to the GPU (module.py); the means of an epoch and the scores on val are read at its end.
    assert waits["training.py"] == recipe.training.epochs
    steps = recipe.training.epochs * len(loaders.train)
    assert steps > recipe.training.epochs
    assert not set(waits) & {"updates.py", "loaders.py", "pixels.py", "distiller.py", "dkd.py", "clip_grad.py"}, waits


def test_the_memory_estimate_is_above_what_a_training_takes(tiny_file: Write, root: Workspace) -> None:
    experiment = load_experiment(
        tiny_file(
            data={"image_size": 128, "labels_per_class": 20},
            student={"network": "resnet18"},
            training={"batch_size": 64, "epochs": 1},
            teacher={"options": {"img_size": 128, "patch_size": 8}},
        )
    )
    splits = open_splits(experiment.data)
    free, whole = torch.cuda.mem_get_info()
    for method in ("kd", "hcd", "fbt"):
        recipe = experiment.recipe({"method": method})
        estimate = estimate_memory(recipe, splits, whole)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        teacher = open_prepared(recipe, None, splits.num_classes)
        train(
            recipe, teacher, recipe_loaders(recipe, splits, "cuda"), lambda metrics: True, TrainOptions(device="cuda")
        )
        assert torch.cuda.max_memory_reserved() < estimate < free


def test_a_full_gpu_is_one_sentence(tiny_file: Write, root: Workspace) -> None:
    experiment = load_experiment(
        tiny_file(data={"image_size": 128}, student={"network": "resnet18"}, training={"batch_size": 40, "epochs": 1})
    )
    recipe = experiment.recipe({"method": "scratch"})
    splits = open_splits(recipe.data)
    forbid_tf32("cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(300 * 2**20 / total)
    try:
        with pytest.raises(ConfigError, match="does not fit into the free memory"):
            train(
                recipe, None, recipe_loaders(recipe, splits, "cuda"), lambda metrics: True, TrainOptions(device="cuda")
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_scenes_train_on_a_gpu_too(root: Workspace) -> None:
    experiment = Experiment.model_validate(
        {
            "name": "scenes",
            "data": {"dataset": "digit_scenes", "image_size": 72, "crop": [64, 48], "train_images": 16},
            "teacher": {"network": "segformer-mit_b0", "options": {"decoder_segmentation_channels": 32}},
            "student": {"network": "segformer-test_resnet", "options": {"decoder_segmentation_channels": 16}},
            "training": {"epochs": 2, "batch_size": 8},
        }
    )
    splits = open_splits(experiment.data)
    for method in ("pixel_kd", "heteroakd"):
        recipe = experiment.recipe({"method": method})
        teacher = open_prepared(recipe, None, splits.num_classes)
        trained = train(
            recipe, teacher, recipe_loaders(recipe, splits, "cuda"), lambda metrics: True, TrainOptions(device="cuda")
        )
        assert 0 <= trained.metrics["val/miou"] <= 1
