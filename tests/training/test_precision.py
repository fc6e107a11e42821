"""`precision: auto`: measured by turns, remembered, and fp32 wherever the gain is in doubt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.config.recipe import Recipe
from heterokd.training.precision import FP32, ROUNDS, Precision, forbid_tf32, resolve_precision

Write = Callable[..., Path]
FAST = Precision("bf16", channels_last=True)


@pytest.fixture
def experiment(tiny_file: Write) -> Experiment:
    return load_experiment(tiny_file(search={"space": {"methods": "all"}}))


@pytest.fixture
def recipe(experiment: Experiment) -> Recipe:
    training = experiment.training.model_copy(update={"precision": "auto", "channels_last": "auto"})
    return experiment.model_copy(update={"training": training}).recipe({"method": "kd"})


def test_explicit_precision_is_obeyed_without_measuring(experiment: Experiment) -> None:
    recipe = experiment.recipe({"method": "kd"})

    def measure(precision: Precision) -> float:
        raise AssertionError("measured")

    assert resolve_precision(recipe, "cpu", measure, None) == FP32


def test_it_measures_once_and_remembers(recipe: Recipe, tmp_path: Path) -> None:
    asked: list[Precision] = []

    def measure(precision: Precision) -> float:
        asked.append(precision)
        return 1.0 if precision == FAST else 2.0

    memory = tmp_path / "deep" / "precision.json"
    assert resolve_precision(recipe, "cpu", measure, memory) == FAST
    everything = {Precision(dtype, last) for dtype in ("fp32", "bf16") for last in (False, True)}
    for turn in range(ROUNDS):
        assert set(asked[4 * turn : 4 * turn + 4]) == everything
    steps = len(asked)
    assert resolve_precision(recipe, "cpu", measure, memory) == FAST
    assert len(asked) == steps
    larger = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": 40})})
    resolve_precision(larger, "cpu", measure, memory)
    assert len(asked) == 2 * steps


def test_a_close_call_is_no_reason_to_leave_fp32(recipe: Recipe) -> None:
    assert resolve_precision(recipe, "cpu", lambda precision: 1.0 if precision == FP32 else 0.95, None) == FP32


def test_what_slows_everything_down_decides_nothing(recipe: Recipe) -> None:
    steps = iter(range(1000))

    def measure(precision: Precision) -> float:
        # The machine becomes slower and slower; bf16 takes a little longer throughout.
        return (1.0 if precision == FP32 else 1.04) * 1.01 ** next(steps)

    assert resolve_precision(recipe, "cpu", measure, None) == FP32


def test_one_lucky_look_is_not_enough(recipe: Recipe) -> None:
    asked: list[Precision] = []

    def measure(precision: Precision) -> float:
        asked.append(precision)
        first_look = len(asked) <= 4 * ROUNDS
        return 0.5 if precision == FAST and first_look else 1.0

    assert resolve_precision(recipe, "cpu", measure, None) == FP32
    assert set(asked[4 * ROUNDS :]) == {FP32, FAST}


def test_a_full_gpu_leaves_fp32(recipe: Recipe) -> None:
    def measure(precision: Precision) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert resolve_precision(recipe, "cpu", measure, None) == FP32


def test_fp32_means_fp32_on_a_gpu() -> None:
    owners: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [owner.allow_tf32 for owner in owners]
    try:
        for owner in owners:
            owner.allow_tf32 = True
        forbid_tf32("cpu")
        assert all(owner.allow_tf32 for owner in owners)
        forbid_tf32("cuda")
        assert not any(owner.allow_tf32 for owner in owners)
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.allow_tf32 = value
