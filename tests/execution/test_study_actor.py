"""The study's actor decides without torch: it lives as long as the search."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heterokd.config.reading import load_experiment
from heterokd.execution.executor import SearchJob, start_actor
from heterokd.execution.node_faults import MOST_MOVES, NodeFault
from heterokd.execution.ray_settings import ray
from heterokd.execution.study_actor import StudyActor
from heterokd.report.wording import notes
from heterokd.storage.trial_status import TrialSnapshot, TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.study.assignment import Assignment
from heterokd.study.search_space import open_space
from heterokd.study.summary import StudySummary

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


def actor_here(tiny_file: Callable[..., Path], root: Workspace) -> StudyActor:
    experiment = load_experiment(tiny_file(name="moved", search={"trials": 4, "parallel": 2, "prune": False}))
    folder = root.study(experiment.name)
    return StudyActor(experiment.model_dump_json(), folder.path, open_space(experiment, folder))


def begun(actor: StudyActor) -> Assignment:
    assignment = actor.next()
    assert isinstance(assignment, Assignment)
    return assignment


def test_a_trial_on_a_bad_node_is_the_next_to_run(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    actor = actor_here(tiny_file, Workspace(tmp_path / "runs"))
    first, second = begun(actor), begun(actor)
    assert actor.assignment(second.number, "bad") == second
    fault = NodeFault("bad", "10.0.0.2", "data: there is no folder")
    assert actor.move(second.number, fault, ["bad", "good"])
    assert actor.assignment(second.number, "bad") is None  # a process that Tune restarts there has nothing to do
    assert actor.avoided() == ["bad"]
    again = begun(actor)
    assert (again.number, again.sample) == (second.number, second.sample)
    for number in (first.number, again.number):
        assert actor.assignment(number, "good") is not None
        actor.finish(number, TrialStatus.COMPLETE, {"epoch": 8, "val/top1": 0.5}, None)
    summary = actor.summary()
    assert (summary.progress.complete, summary.progress.failed) == (2, 0)
    assert summary.failing_nodes == {"10.0.0.2": fault.reason}
    assert StudySummary.from_json(summary.to_json()).failing_nodes == summary.failing_nodes
    assert f"Node 10.0.0.2 was avoided, and its trials ran on other nodes: {fault.reason}." in notes(summary)


def test_a_process_that_dies_before_it_begins_is_not_the_trials_fault(
    tiny_file: Callable[..., Path], tmp_path: Path
) -> None:
    root = Workspace(tmp_path / "runs")
    actor = actor_here(tiny_file, root)
    number = begun(actor).number
    for _ in range(MOST_MOVES):
        actor.died(number, "killed")
        assert begun(actor).number == number
    root.study("moved").trial(number).start(actor.running[number].recipe, TrialSnapshot())
    actor.died(number, "killed")
    assert actor.summary().progress.failed == 1

    other = begun(actor)
    root.study("moved").trial(other.number).start(other.recipe, TrialSnapshot())
    actor.assignment(other.number, "good")
    actor.died(other.number, "killed")
    assert actor.summary().progress.failed == 2
