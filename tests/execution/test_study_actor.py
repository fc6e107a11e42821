"""The study's actor decides without torch: it lives as long as the search."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heterokd.config.reading import load_experiment
from heterokd.execution.executor import SearchJob, start_actor
from heterokd.execution.ray_settings import ray
from heterokd.storage.trial_status import TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.search_space import open_space

UNNEEDED = {"torch", "torchvision", "timm", "mlflow", "ray.tune"}


@pytest.mark.usefixtures("local_ray")
def test_a_whole_study_is_decided_without_torch(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    experiment = load_experiment(tiny_file(name="decided", search={"trials": 6, "parallel": 1}))
    root = Workspace(tmp_path / "runs")
    folder = root.study(experiment.name)
    actor: Any = start_actor(SearchJob(experiment, root, open_space(experiment, folder)), devices=1.0)
    recipes = []
    while (assignment := ray.get(actor.next.remote())) is not None:
        recipes.append(assignment.recipe)
        for epoch in assignment.rungs:
            ray.get(actor.report.remote(assignment.number, epoch, {"epoch": epoch, "val/top1": 0.5}, []))
        metrics = {"epoch": experiment.training.epochs, "val/top1": 0.5}
        ray.get(actor.finish.remote(assignment.number, TrialStatus.COMPLETE, metrics, None))
    summary = ray.get(actor.summary.remote())
    loaded = ray.get(actor.__ray_call__.remote(lambda _: set(sys.modules)))
    ray.kill(actor)
    assert summary.progress.finished
    assert len(recipes) >= 6
    assert "heterokd.study.sampler" in loaded
    assert not loaded & UNNEEDED
