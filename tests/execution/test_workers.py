"""Trainings that several workers share: the same losses and weights as one process, and nothing left behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from processes import start_group

from heterokd import distributed as group
from heterokd.config.experiment import Experiment
from heterokd.config.methods import methods_of
from heterokd.config.networks import NetworkSettings
from heterokd.config.recipe import Recipe
from heterokd.datasets import load_dataset
from heterokd.datasets.io.loaders import Worker, make_loaders
from heterokd.datasets.views.policy import POLICIES, ViewSpec
from heterokd.errors import PairError, TrainingDiverged
from heterokd.networks.network import build_network
from heterokd.training.teacher import LiveTeacher
from heterokd.training.train import Metrics, TrainOptions, build_distiller, train

Write = Callable[..., Path]
VIT = {"img_size": 32, "patch_size": 8}
WITHOUT_BATCH_NORM = {"network": "test_vit", "options": VIT}
# 40 images: three full batches of 12, two of 14 (which three workers share as 4, 5 and 5), one of all 40.
BATCH = 12

Case = tuple[str, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "kd": ("kd", {}, WITHOUT_BATCH_NORM),
    "uneven": ("dkd", {"batch_size": 14}, WITHOUT_BATCH_NORM),
    "fewer images than a batch": ("kd", {"batch_size": 64}, WITHOUT_BATCH_NORM),
    "in parts": ("nkd", {"accumulate": 2, "clip_grad": 1.0, "ema": 0.9}, WITHOUT_BATCH_NORM),
    "compared": ("rkd", {"gather": True}, WITHOUT_BATCH_NORM),
    "compared, uneven": ("dist", {"gather": True, "batch_size": 14}, WITHOUT_BATCH_NORM),
    "remembered": ("crd", {"gather": True}, WITHOUT_BATCH_NORM),
    "batch norms": ("kd", {"sync_batch_norm": True, "batch_size": 14}, {"network": "test_efficientnet"}),
    "batch norms apart": ("kd", {}, {"network": "test_efficientnet"}),
    "compared apart": ("rkd", {}, WITHOUT_BATCH_NORM),
}
APART = ("batch norms apart", "compared apart")


def experiment_of(training: dict[str, Any], student: dict[str, Any]) -> Experiment:
    settings = {**TINY["training"], "batch_size": BATCH, "epochs": 2, "learning_rate": 0.005, **training}
    space = {"methods": "all"}
    return Experiment.model_validate({**TINY, "training": settings, "student": student, "search": {"space": space}})


def recipe_of(case: str) -> Recipe:
    method, training, student = CASES[case]
    return experiment_of(training, student).recipe({"method": method})


# Batch norms and class maps that some methods read, and the tiny pair has not.
RESNET = NetworkSettings(network="test_resnet", options={"output_stride": 8})


@functools.cache
def resnet_teacher() -> LiveTeacher:
    torch.manual_seed(0)
    return LiveTeacher(build_network(RESNET.network, 10, RESNET.options))


@functools.cache
def vit_teacher() -> LiveTeacher:
    torch.manual_seed(0)
    return LiveTeacher(build_network("test_vit", 10, VIT))


def trained(recipe: Recipe, teacher: LiveTeacher, report: Callable[[Metrics], bool] | None = None, **more: Any) -> Any:
    """What this worker (or the one process) reports, and its student's weights."""
    reports: list[Metrics] = []

    def keep(metrics: Metrics) -> bool:
        reports.append(dict(metrics))
        return report is None or report(metrics)

    whole = load_dataset("digits", image_size=32, labels_per_class=4)
    splits, settings = replace(whole, val=whole.val.chosen(np.arange(30))), recipe.training
    views, worker = ViewSpec(POLICIES["digits"], settings.seed), Worker(group.rank(), group.size())
    loaders = make_loaders(splits, views, settings.batch_size, worker=worker)
    done = train(recipe, teacher, loaders, keep, TrainOptions(**more))
    weights = {key: value.clone() for key, value in done.student.state_dict().items()}
    return {"reports": reports, "weights": weights, "epochs": done.epochs, "stopped": done.stopped}


def diverged() -> str:
    recipe = experiment_of({"learning_rate": 1e30}, WITHOUT_BATCH_NORM).recipe({"method": "kd"})
    try:
        trained(recipe, vit_teacher())
    except TrainingDiverged as error:
        return str(error)
    return "went on"


def every_method(rank: int, folder: str) -> None:
    """What two workers report of a training by each method of classification, and one process."""
    join(rank, 2, folder)
    found = {}
    for method in methods_of("classification"):
        shared = {"sync_batch_norm": True, "gather": True, "epochs": 1}
        recipe, teacher = (
            experiment_of(shared, {"network": "test_efficientnet"}).recipe({"method": method}),
            vit_teacher(),
        )
        try:
            build_distiller(recipe, teacher, 10)
        except PairError:
            recipe, teacher = recipe.model_copy(update={"student": RESNET}), resnet_teacher()
        with group.alone():
            alone = trained(recipe, teacher)["reports"]
        found[method] = trained(recipe, teacher)["reports"], alone
    if rank == 0:
        torch.save(found, f"{folder}/methods.pt")
    dist.destroy_process_group()


def join(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet{world_size}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)


def every_case(rank: int, world_size: int, folder: str) -> None:
    """What a worker of a group finds in every case."""
    join(rank, world_size, folder)
    found: dict[str, Any] = {case: trained(recipe_of(case), vit_teacher()) for case in CASES}
    found["diverged"] = diverged()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def interrupted(rank: int, folder: str) -> None:
    """Two workers stop after an epoch; three go on from their checkpoint."""
    for world_size in (2, 3):
        if rank < world_size:
            join(rank, world_size, folder)
            checkpoint, go_on = Path(folder) / "checkpoint.pt", world_size == 3
            found = trained(recipe_of("kd"), vit_teacher(), lambda _, go=go_on: go, checkpoint=checkpoint)
            torch.save(found, f"{folder}/{rank}of{world_size}.pt")
            dist.destroy_process_group()


@functools.cache
def alone(case: str) -> Any:
    return trained(recipe_of(case), vit_teacher())


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.thorough)], ids="{0} workers".format)
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each worker of a group found."""
    folder: Path = tmp_path_factory.mktemp("workers")
    start_group(every_case, request.param, request.param, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def losses(reports: Sequence[Metrics]) -> list[dict[str, float]]:
    return [{key: value for key, value in one.items() if key.startswith("train/")} for one in reports]


def check_equal(found: Sequence[Any], expected: Any, tolerance: float = 1e-4) -> None:
    """The first worker reports what one process does, and all have its weights."""
    assert not any(one["reports"] for one in found[1:])
    for ours, theirs in zip(losses(found[0]["reports"]), losses(expected["reports"]), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-6)
    for one in found:
        for key, value in expected["weights"].items():
            torch.testing.assert_close(one["weights"][key], value, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("case", [case for case in CASES if case not in APART])
def test_workers_equal_one_process(case: str, workers: list[dict[str, Any]]) -> None:
    check_equal([one[case] for one in workers], alone(case), 5e-4 if case == "batch norms" else 1e-4)


@pytest.mark.parametrize("case", APART)
def test_what_is_not_shared_makes_a_difference(case: str, workers: list[dict[str, Any]]) -> None:
    found, expected = workers[0][case]["reports"][0]["train/loss"], alone(case)["reports"][0]["train/loss"]
    assert found != pytest.approx(expected, rel=1e-3)


@pytest.mark.thorough
def test_any_number_of_workers_stops_together_and_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    start_group(interrupted, 3, str(tmp_path))
    stopped, resumed = ([torch.load(tmp_path / f"{r}of{size}.pt") for r in range(size)] for size in (2, 3))
    assert [(one["stopped"], one["epochs"]) for one in stopped] == [(True, 1)] * 2
    expected = alone("kd")
    expected = {**expected, "reports": expected["reports"][1:]}
    check_equal(resumed, expected)


@pytest.mark.slow
def test_two_workers_equal_one_process_for_every_method(tmp_path: Path) -> None:
    start_group(every_method, 2, str(tmp_path))
    for method, (shared, alone) in torch.load(tmp_path / "methods.pt").items():
        for ours, theirs in zip(losses(shared), losses(alone), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), method


def test_a_loss_that_is_not_finite_ends_every_worker(workers: list[dict[str, Any]]) -> None:
    assert len({one["diverged"] for one in workers}) == 1
    assert "is not finite in epoch" in workers[0]["diverged"]
