"""What operators see of a search: prices of trials, and metrics for Prometheus and Grafana."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fabricated
import pytest

from heterokd.execution.callbacks import Forwarding, TuneCallback
from heterokd.execution.parallel import Parallelism
from heterokd.execution.placement import Cluster
from heterokd.execution.prices import hourly_price
from heterokd.execution.search_metrics import SearchMetrics
from heterokd.execution.study_sync import LocalEvents
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialSnapshot
from heterokd.study.progress import StudyProgress
from heterokd.study.summary import StudySummary, stored_summary

TOP = Path(__file__).parents[2]
NODES = {"gpu": {"count": 4, "gpus": 2, "price_per_hour": 3.0}, "other": {"count": 2, "price_per_hour": 1.0}}


@pytest.mark.parametrize(
    ("sections", "cluster", "price"),
    [
        ({}, Cluster(8, 2, 1.0), None),
        ({"cluster": {"nodes": {"free": {"count": 2}}}}, Cluster(8, 2, 1.0), None),
        ({"search": {"budget": {"price": 2.0}}}, Cluster(8, 2, 0.5), 1.0),
        ({"search": {"budget": {"price": 2.0}}}, Cluster(8, 2, 0.0), 2.0),
        ({"search": {"budget": {"price": 2.0}}}, Cluster(2, 2, 1.0, workers=(4, 4)), 8.0),
        ({"cluster": {"nodes": NODES}}, Cluster(8, 2, 1.0), 1.5),
        ({"cluster": {"nodes": NODES}}, Cluster(7, 2, 0.0), 2.0),
        ({"cluster": {"nodes": {"any": {"count": 2, "price_per_hour": 3.0}}}}, Cluster(4, 2, 1.0), 1.5),
    ],
)
def test_an_hour_of_a_trial_has_a_price(sections: dict[str, Any], cluster: Cluster, price: float | None) -> None:
    assert hourly_price(fabricated.experiment(**sections), cluster) == price


def test_a_trial_costs_the_time_of_all_its_processes(tmp_path: Path) -> None:
    trial, experiment = TrialFolder(tmp_path / "0003"), fabricated.experiment()
    assert trial.cost is None
    recipe = experiment.recipe({"method": "kd"})
    trial.start(recipe, TrialSnapshot(began=1000.0, price=6.0))
    assert trial.cost == 0.0
    fabricated.report(trial, 1)
    reported = (trial.path / "metrics.jsonl").stat().st_mtime
    trial.save(TrialSnapshot(began=reported - 600, price=6.0))
    assert trial.cost == pytest.approx(1.0)  # its process died after the report
    trial.save(TrialSnapshot(began=reported, ended=reported + 1800, price=6.0, paid=1.0))
    assert trial.cost == pytest.approx(4.0)


class Gauges:
    """Metrics of Ray that are kept here, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[str, ...], float]] = {}
        self.labels: dict[str, tuple[str, ...]] = {}

    def make(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        assert description
        self.values[name], self.labels[name] = {}, tag_keys

        def set_value(value: float, tags: Mapping[str, str]) -> None:
            assert tuple(tags) == tag_keys
            self.values[name][tuple(tags.values())] = value

        return SimpleNamespace(set=set_value)


def plan() -> Parallelism:
    return Parallelism(fabricated.experiment(search={"budget": {"price": 2.0}}), Cluster(8, 2, 0.5))


def test_metrics_say_what_the_summary_says(tmp_path: Path) -> None:
    gauges = Gauges()
    metrics = SearchMetrics(plan(), gauges.make)
    progress = StudyProgress(running=2, complete=5, pruned=3, failed=1, confirmations_done=4)
    summary = fabricated.summary(progress=progress, spent={"gpu_hours": 1.5})
    answer = SimpleNamespace(is_ready=lambda: True, get=lambda: summary)
    folder, heard = StudyFolder(tmp_path / "tiny"), []

    def listener(event: str, trial: TrialFolder, summary: StudySummary) -> None:
        heard.append((event, trial.number))

    quiet: Any = SimpleNamespace(put=lambda trial: None, raise_if_lost=lambda: None, look=lambda: None)
    forwarding = Forwarding(folder, LocalEvents(), quiet, lambda: answer, listener, metrics.update)
    searcher: Any = SimpleNamespace(actor=None)
    callback = TuneCallback(folder, searcher, forwarding, quiet, [], quiet, metrics.add_failure)
    for number, failed in ((7, True), (8, False), (9, True)):
        result: Any = {"number": number, "epoch": 3, "finished": True, "failed": failed, "node_ip": "10.0.0.7"}
        callback.on_trial_result(0, [], None, result)  # type: ignore[arg-type]
    assert heard == []
    forwarding.close()
    assert heard == [("finish", 7), ("finish", 8), ("finish", 9)]
    assert stored_summary(folder) is not None
    found = gauges.values
    assert found["heterokd_trials"]["tiny", "complete"] == 5
    assert sum(found["heterokd_trials"].values()) == 15
    assert found["heterokd_gpu_seconds"] == {("tiny",): 5400.0}
    assert found["heterokd_spend"] == {("tiny", "USD"): 3.0}
    assert found["heterokd_node_failures"] == {("tiny", "10.0.0.7"): 2}


def test_documentation_and_dashboard_name_the_metrics_that_there_are() -> None:
    gauges = Gauges()
    SearchMetrics(plan(), gauges.make)
    names = {f"ray_{name}" for name in gauges.values}
    page = (TOP / "docs/cluster.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(ray_heterokd_\w+)` \| ([^|]+) \|", page, re.M))
    assert rows.keys() == names
    for name, labels in rows.items():
        assert tuple(re.findall(r"`(\w+)`", labels)) == gauges.labels[name.removeprefix("ray_")]
    dashboard = json.loads((TOP / "deploy/grafana_dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {name for query in queries for name in re.findall(r"ray_heterokd_\w+", query)} == names
    for query in queries:
        for name, matched, by in re.findall(r"(ray_heterokd_\w+)\{(.*?)\}.*?(?:by \((.*?)\)|$)", query):
            used = set(re.findall(r"(\w+)=", matched)) | set(filter(None, by.split(", ")))
            assert used <= set(gauges.labels[name.removeprefix("ray_")])
