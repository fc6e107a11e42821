"""A teacher that several workers fit: the same weights as of one process, from each start and after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from processes import start_group
from safetensors.torch import load_file

from heterokd.config.experiment import Experiment
from heterokd.config.recipe import Recipe
from heterokd.networks.weights import save_weights
from heterokd.storage.workspace import Workspace
from heterokd.teachers.fit_into import fit_into
from heterokd.teachers.prepare import prepare_teacher, teacher_recipe
from heterokd.training.data import open_splits
from heterokd.training.student import build_configured
from heterokd.training.teacher import teacher_hash

VIT = {"network": "test_vit", "options": {"img_size": 32, "patch_size": 16}}
FIT = {**TINY["teacher"]["training"], "epochs": 3, "batch_size": 500, "learning_rate": 1e-3}
STARTS = ("random weights", "given weights")


class Interrupted(Exception):
    """Ends a fit, as a killed process does."""


def recipe_of(start: str, folder: Path, workers: int = 2) -> Recipe:
    """The recipe of a fit; the file of given weights is of 12 classes."""
    teacher: dict[str, Any] = {**VIT, "training": {**FIT, "workers": workers}}
    if start == "given weights":
        teacher["start_from"] = str(folder / "start.safetensors")
    experiment = Experiment.model_validate({**TINY, "teacher": teacher})
    return teacher_recipe(experiment)


def fitted(recipe: Recipe, folder: Path, interrupt: int | None = None) -> list[float]:
    """The epochs that a fit reports."""
    told: list[float] = []

    def report(metrics: dict[str, float]) -> bool:
        told.append(metrics["epoch"])
        if metrics["epoch"] == interrupt:
            raise Interrupted
        return True

    fit_into(recipe, folder, Workspace(folder.parent / "root"), report)
    return told


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for start in STARTS:
        place = Path(folder) / f"rank{rank}" / start
        told = fitted(recipe_of(start, Path(folder)), place)
        place.mkdir(parents=True, exist_ok=True)
        (place / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two workers, each with a folder of its own, have fitted teachers."""
    folder: Path = tmp_path_factory.mktemp("fits")
    torch.manual_seed(3)
    recipe = recipe_of(STARTS[0], folder)
    save_weights(build_configured(recipe.student, 12, 32), folder / "start.safetensors")
    start_group(worker, 2, str(folder))
    return folder


@pytest.mark.parametrize("start", STARTS)
def test_two_workers_equal_one_process(start: str, folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    told = fitted(recipe_of(start, folder, workers=1), alone)
    first, second = (folder / f"rank{rank}" / start for rank in (0, 1))
    assert json.loads((first / "told.json").read_text()) == told == ([1, 2, 3] if start == STARTS[0] else [0, 1, 2, 3])
    assert json.loads((second / "told.json").read_text()) == []
    assert not (second / "teacher.safetensors").exists()
    ours, theirs = (json.loads((place / "teacher.json").read_text()) for place in (first, alone))
    assert ours["val_score"] == pytest.approx(theirs["val_score"], abs=0.01)
    assert ours["reason"].partition(";")[0] == theirs["reason"].partition(";")[0]
    expected = load_file(alone / "teacher.safetensors")
    for key, value in load_file(first / "teacher.safetensors").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3, msg=key)


def test_the_number_of_workers_names_no_other_teacher(tmp_path: Path) -> None:
    recipes = [recipe_of(STARTS[0], tmp_path, workers) for workers in (1, 2)]
    fingerprint = open_splits(recipes[0].data).fingerprint
    assert len({teacher_hash(recipe.teacher, recipe, fingerprint) for recipe in recipes}) == 1
    assert len({recipe.hash for recipe in recipes}) == 1


def test_a_fit_goes_on_on_another_machine_from_what_the_store_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each machine has a working copy of its own; the first is gone."""
    teacher = {**VIT, "fit": "all", "training": {**FIT, "epochs": 4}}
    experiment = Experiment.model_validate({**TINY, "teacher": teacher})
    store = f"file://{tmp_path}/store"
    machines = [Workspace(tmp_path / name, store) for name in ("first", "second")]

    def killed(recipe: Recipe, folder: Path, workspace: Workspace, report: Any) -> None:
        fit_into(recipe, folder, workspace, report, saves=2)

    def interrupt(metrics: dict[str, float]) -> bool:
        told.append(metrics["epoch"])
        if metrics["epoch"] == 4:
            raise Interrupted
        return True

    told: list[float] = []
    with pytest.raises(Interrupted):
        prepare_teacher(experiment, machines[0], interrupt, killed)
    found = prepare_teacher(experiment, machines[1], lambda metrics: told.append(metrics["epoch"]) is None)
    assert told == [1, 2, 3, 4, 3, 4]
    assert found.fitted
    assert found.weights is not None
    left = {path.name for path in (tmp_path / "store" / "teachers").rglob("*") if path.is_file()}
    assert left == {"teacher.json", "teacher.safetensors", "recipe.yaml"}
    whole = prepare_teacher(experiment, Workspace(tmp_path / "alone"))
    assert found.card == whole.card
