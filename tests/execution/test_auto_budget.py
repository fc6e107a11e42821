"""`heterokd auto --budget`: what is trained is shortened until students can be compared in the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heterokd.config.reading import load_experiment
from heterokd.datasets.io.inspect import inspect_folder
from heterokd.errors import ConfigError
from heterokd.execution.auto import EPOCHS, TEACHER_EPOCHS, AutoRequest, Proposal, propose
from heterokd.execution.auto_budget import CACHE_SHARE, ENOUGH_TRAININGS, FEWEST_VIEWS, TEACHER_SHARE, within_budget
from heterokd.execution.planning.plan import affordable, existing_stock
from heterokd.storage.workspace import Workspace
from heterokd.study.plan.costs import Costs, MethodCost

LONG = 80
"""Epochs of students that `auto` proposes for a small folder."""


def costs(teacher: float, epoch: float, view: float = 1e-6) -> Costs:
    method = MethodCost(begin=1.0, epoch=epoch, live=epoch, stored=True)
    return Costs("a processor", 2, 1.0, 0.0, 10.0, 5.0, 4.0, teacher, view, {"scratch": method, "kd": method})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance, found = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for label in ("cat", "dog"):
        for number in range(30):
            file = found / label / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(chance.integers(0, 255, (32, 32, 3), np.uint8)).save(file)
    return found


@pytest.fixture
def proposed(folder: Path, tmp_path: Path) -> Callable[..., Proposal]:
    def proposal(**more: object) -> Proposal:
        request = AutoRequest(folder, ["test_vit"], ["test_resnet"], hours=1.0, file=tmp_path / "mine.yaml")
        return propose(inspect_folder(folder), replace(request, **more), Workspace(tmp_path), fit=False)

    return proposal


@pytest.fixture
def root(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_what_fits_is_left_as_it_is(proposed: Callable[..., Proposal], root: Workspace) -> None:
    made = proposed()
    known = costs(teacher=100, epoch=1.0)
    fitted, same = within_budget(made, root, known, 3000.0)
    assert same == known
    assert fitted.reasons == made.reasons
    assert fitted.experiment.training.epochs == LONG
    # Planning counts: an hour was asked, 50 minutes are left.
    assert fitted.experiment.search.budget.hours == pytest.approx(3000 / 3600, abs=1e-4)
    assert load_experiment(made.file) == fitted.experiment


def test_trainings_are_shortened_until_there_are_enough(proposed: Callable[..., Proposal], root: Workspace) -> None:
    known = costs(teacher=100, epoch=4.0)
    fitted, _ = within_budget(proposed(), root, known, 1000.0)
    epochs = fitted.experiment.training.epochs
    assert EPOCHS[0] < epochs < LONG
    found = affordable(fitted.experiment, known, existing_stock(fitted.experiment, root, {}))
    assert found is not None
    assert ENOUGH_TRAININGS <= found < 1.1 * ENOUGH_TRAININGS
    assert (
        fitted.reasons[-1] == f"trainings have {epochs} instead of 80 epochs: the time allows 5.6 full trainings of 80"
    )
    assert fitted.reasons[-1] in fitted.file.read_text()


def test_a_teacher_from_random_weights_has_fewer_epochs(proposed: Callable[..., Proposal], root: Workspace) -> None:
    made = proposed()
    before = made.experiment.teacher.training.epochs
    per_epoch = 10.0
    fitted, shorter = within_budget(
        made,
        root,
        costs(before * per_epoch, 0.1),
        900.0,
        lambda experiment, root: per_epoch * experiment.teacher.training.epochs,
    )
    after = fitted.experiment.teacher.training.epochs
    assert TEACHER_EPOCHS[0] < after < before
    assert shorter.teacher == after * per_epoch <= TEACHER_SHARE * 900
    assert fitted.experiment.teacher.training.batch_size == made.experiment.teacher.training.batch_size
    assert f"{after} instead of {before} epochs" in fitted.reasons[-1]


def test_only_the_classifier_of_a_pretrained_teacher_is_fitted(
    proposed: Callable[..., Proposal], root: Workspace, tmp_path: Path
) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "imagenet.safetensors"
    save_file(timm.create_model("test_vit", num_classes=1000).state_dict(), weights)
    made = proposed(checkpoint=str(weights))
    fitted, shorter = within_budget(made, root, costs(teacher=2000, epoch=0.1), 3000.0)
    assert fitted.experiment.teacher.fit == "head"
    assert shorter.teacher < 60, "the fit of the classifier was timed"
    assert "only its classifier is fitted" in fitted.reasons[-1]
    assert load_experiment(made.file).teacher.fit == "head"


def test_a_cache_that_takes_too_long_has_fewer_views(proposed: Callable[..., Proposal], root: Workspace) -> None:
    made = proposed()
    images = existing_stock(made.experiment, root, {}).views / made.experiment.cache.views
    known = costs(teacher=100, epoch=0.1, view=1.0)
    fitted, _ = within_budget(made, root, known, 1000.0)
    views = fitted.experiment.cache.views
    assert FEWEST_VIEWS < views < made.experiment.cache.views
    assert images * views / 2 <= CACHE_SHARE * (1000 - 100 - 5) < images * (views + 1) / 2
    assert f"has {views} instead of 50 views" in fitted.reasons[-1]
    assert load_experiment(made.file).cache.views == views
    # What the cache takes is missing for trainings.
    stock = existing_stock(fitted.experiment, root, {})
    known_trainings = affordable(fitted.experiment, known, stock)
    assert known_trainings == pytest.approx((2 * 895 - images * views) / 9, rel=0.01)


def test_too_short_a_time_is_refused_with_what_suffices(proposed: Callable[..., Proposal], root: Workspace) -> None:
    made = proposed()
    with pytest.raises(
        ConfigError, match=r"--budget: 1 min 40 s are left .*fit takes about 20 s .*training of 15 epochs"
    ):
        within_budget(made, root, costs(teacher=20, epoch=60.0), 100.0)
    assert not made.file.exists()
    with pytest.raises(ConfigError, match=r"--budget: 0 s are left after planning"):
        within_budget(proposed(), root, costs(teacher=20, epoch=0.1), -30.0)
