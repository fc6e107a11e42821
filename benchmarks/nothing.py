"""Objectives that do nothing, to measure everything else with: `many_trials.py`, `overhead.py`. Trials import them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from heterokd.config.recipe import Recipe
from heterokd.execution.run import RunContext
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.storage.study_dir import TrialFolder
from heterokd.training.train import Metrics, Report, TrainResult


def score(sample: Mapping[str, Any], progress: float) -> float:
    """A top-1 that depends on all values and rises with training: what the sampler learns from costs it as much."""
    reached = 0.9
    for key, value in sample.items():
        if isinstance(value, float):
            place = math.log10(max(value, 1e-9)) / 9
        else:
            place = sum(map(ord, f"{key}{value}")) % 97 / 97
        reached -= 0.02 * abs(math.sin(3 * place))
    return max(0.0, reached * (1 - 0.5 * math.exp(-4 * progress)))


@lru_cache(maxsize=1)
def some_student() -> AnyNetwork:
    """Made once a process: building networks is no cost of a search."""
    return build_network("test_resnet", 10, image_size=32).eval()


def train_nothing(recipe: Recipe, folder: TrialFolder, context: RunContext, on_epoch: Report) -> TrainResult:
    """As `run_recipe`, without training: reports are written and rungs asked."""
    sample = {"method": recipe.method, **recipe.params, "rate": recipe.training.learning_rate}
    epochs = recipe.training.epochs
    metrics: Metrics = {}
    epoch, stopped = 0, False
    while epoch < epochs and not stopped:
        epoch += 1
        reached = score(sample, epoch / epochs)
        metrics = {"val/top1": reached, "val/loss": 1 - reached, "train/loss": 1 - reached, "epoch": epoch}
        folder.append(metrics)
        stopped = not on_epoch(metrics) and epoch < epochs
    return TrainResult(some_student(), metrics, epoch, stopped)


def sleep_through(recipe: Recipe, folder: TrialFolder, context: RunContext, on_epoch: Report) -> TrainResult:
    """As `run_recipe`: its training sleeps through `SLEEP_SECONDS`, and it says how long it slept."""
    some_student()
    epochs, slept = recipe.training.epochs, 0.0
    metrics: Metrics = {}
    for epoch in range(1, epochs + 1):
        started = time.monotonic()
        time.sleep(float(os.environ["SLEEP_SECONDS"]) / epochs)
        slept += time.monotonic() - started
        metrics = {"val/top1": 0.5, "train/loss": 1.0, "time/slept": slept, "epoch": epoch}
        folder.append(metrics)
        context.save_now()
        on_epoch(metrics)
    return TrainResult(some_student(), metrics, epochs, stopped=False)
