"""A search's trials on made-up nodes, one of them at fault: searcher, trials, study and callbacks, without a Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_ray import FakeRay, Here
from torch import nn

from heterokd.config.experiment import Experiment
from heterokd.config.reading import load_experiment
from heterokd.errors import DataError
from heterokd.execution import callbacks, node_watch, parallel, searcher, trial
from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.node_faults import NodeFault
from heterokd.execution.placement import Cluster
from heterokd.execution.study_actor import StudyActor
from heterokd.execution.this_node import NodeCheck, this_node
from heterokd.execution.trial_deaths import TrialDeaths
from heterokd.storage.workspace import Workspace
from heterokd.study.search_space import open_space
from heterokd.training.train import TrainResult

Write = Callable[..., Path]
FAULT = NodeFault("bad", "10.0.0.2", "data: there is no folder /data")


class MadeUpCheck(NodeCheck):
    """The nodes' faults, by node."""

    def __init__(self, faults: dict[str, NodeFault]) -> None:
        super().__init__(driver="good", questions=None, mine=None)  # type: ignore[arg-type]
        object.__setattr__(self, "faults", faults)

    def fault(self) -> NodeFault | None:
        found: NodeFault | None = self.faults.get(this_node())  # type: ignore[attr-defined]
        return found


class Search:
    """A search of four trials, two at a time, whose nodes are named as each trial runs."""

    def __init__(self, tiny_file: Write, tmp_path: Path, fake: FakeRay) -> None:
        space = {"methods": ["scratch", "kd"]}
        settings = {"space": space, "trials": 4, "parallel": 2, "prune": False, "confirm_leaders": 0}
        self.experiment: Experiment = load_experiment(tiny_file(name="moved", search=settings))
        self.root = Workspace(tmp_path / "runs")
        folder = self.root.study("moved")
        self.actor = Here(
            StudyActor(self.experiment.model_dump_json(), folder.path, open_space(self.experiment, folder))
        )
        failures, plan = FailureLimit(folder, 2), parallel.Parallelism(self.experiment, Cluster(2, 1, 0))
        self.searcher = searcher.StudySearcher(self.actor, failures, TrialDeaths(folder, lambda: 0), plan)
        self.ray, self.faults = fake, {"bad": FAULT}
        fake.node, fake.nodes = "good", ("bad", "good")
        self.watch = node_watch.NodeWatch(self.actor, None, plan, failures)
        quiet: Any = SimpleNamespace(put=lambda event, trial: None, raise_if_lost=lambda: None)
        self.events = callbacks.TuneCallback(folder, self.searcher, quiet, quiet, [], self.watch)

    def run(self, name: str, config: Any, node: str, train: Any = None) -> str:
        """Run a suggested trial on a node, to its end in Ray Tune; how it ended."""
        self.ray.node = node
        self.ray.reports.clear()
        job = trial.TrialJob(self.root, "moved", {}, {}, MadeUpCheck(self.faults))
        trial.run_trial(config, self.actor, job, train or self.train)
        for report in self.ray.reports:
            self.events.on_trial_result(0, [], SimpleNamespace(config=config), report)  # type: ignore[arg-type]
        self.searcher.on_trial_complete(name)
        return (
            "moved"
            if self.ray.reports[-1].get("moved")
            else str(self.root.study("moved").trial(config["number"]).status)
        )

    @staticmethod
    def train(recipe: Any, folder: Any, context: Any, on_epoch: Any) -> TrainResult:
        metrics = {"epoch": float(recipe.training.epochs), "val/top1": 0.5}
        folder.append(metrics)
        on_epoch(metrics)
        return TrainResult(nn.Linear(1, 1), metrics, recipe.training.epochs, stopped=False)  # type: ignore[arg-type]


@pytest.fixture
def search(tiny_file: Write, tmp_path: Path, fake_ray: FakeRay) -> Search:
    return Search(tiny_file, tmp_path, fake_ray)


def rest(search: Search) -> list[str]:
    """Run what is left on the good node."""
    ended = []
    while (config := search.searcher.suggest(f"rest{len(ended)}")) != "FINISHED":
        ended.append(search.run(f"rest{len(ended)}", config, "good"))
    return ended


def test_a_trial_moves_to_another_node_and_none_is_lost(search: Search) -> None:
    first, second = search.searcher.suggest("a"), search.searcher.suggest("b")
    assert search.searcher.suggest("c") is None  # two at a time
    assert search.run("b", second, "bad") == "moved"
    assert search.searcher.running == [first["number"]]
    again = search.searcher.suggest("d")
    assert (again["number"], again["avoid"]) == (second["number"], ["bad"])
    assert search.run("a", first, "good") == "complete"
    assert search.run("d", again, "good") == "complete"
    assert rest(search) == ["complete"] * 2
    summary = search.actor.actor.summary()
    assert (summary.progress.complete, summary.progress.failed, summary.progress.finished) == (4, 0, True)
    assert summary.failing_nodes == {"10.0.0.2": FAULT.reason}
    assert not search.watch.failures.is_reached


def test_data_that_is_missing_on_one_node_alone_is_not_the_trials_fault(search: Search) -> None:
    def without_data(*_: object) -> TrainResult:
        raise DataError("/data/1.png is missing")

    search.faults = {}
    config = search.searcher.suggest("a")
    assert search.run("a", config, "bad", without_data) == "moved"
    assert rest(search) == ["complete"] * 4
    assert search.actor.actor.summary().failing_nodes == {"address of bad": "DataError: /data/1.png is missing"}


def test_a_method_that_raises_everywhere_fails_and_no_node_is_named(search: Search) -> None:
    def raising(*_: object) -> TrainResult:
        raise DataError("/data/1.png is missing")

    search.faults = {}
    config = search.searcher.suggest("a")
    search.actor.actor.nodes.add(replace(FAULT, node="gone", address="gone"))
    assert search.run("a", config, "bad", raising) == "moved"
    again = search.searcher.suggest("b")
    assert again["number"] == config["number"]
    assert search.run("b", again, "third", raising) == "failed"
    assert list(search.actor.actor.summary().failing_nodes) == ["gone"]


def test_the_search_stops_where_every_node_is_at_fault(search: Search) -> None:
    search.faults["good"] = replace(FAULT, node="good", address="10.0.0.1")
    first, second = search.searcher.suggest("a"), search.searcher.suggest("b")
    assert search.run("a", first, "bad") == "moved"
    assert not search.watch.failures.is_reached
    assert search.run("b", second, "good") == "moved"
    assert search.watch.failures.is_reached
    assert search.watch.failures.sentence.startswith(f"{search.root.study('moved').path}: 2 of 2 nodes cannot train")
    assert search.actor.actor.summary().progress.failed == 0
