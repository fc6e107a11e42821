"""A search on Ray's own autoscaler: nodes come for trials that wait, trials run on them, and nodes go when idle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_ray import HEAD_ID, STORE_BYTES, ray_head

from heterokd.storage.workspace import Workspace
from heterokd.study.read_summary import read_summary

pytestmark = [pytest.mark.slow, pytest.mark.ray]
Write = Callable[..., Path]

CORES = 2
"""Of a node that may be added; the head has one core, on which no trial fits."""

WATCH = """
import json, sys, time
import ray
from ray._private.state import actors

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
began = time.monotonic()
while True:
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    processes = {str(one["Pid"]): one["Address"]["NodeID"] for one in actors().values()
              if one["State"] == "ALIVE" and one["Pid"]}
    print(json.dumps({"at": time.monotonic() - began, "nodes": nodes, "actors": processes}), flush=True)
    time.sleep(0.2)
"""

ALONE = """
import sys
from heterokd.execution.ray_connection import connected
from heterokd.config.reading import load_experiment
from heterokd.storage.workspace import Workspace, open_workspace
from heterokd.execution.driver import search

with connected(None, cores=4):
    search(load_experiment(sys.argv[1]), open_workspace(sys.argv[2]))
"""


def outcomes(root: Workspace, name: str) -> dict[str, list[tuple[float, float, float | None]]]:
    """By recipe, what was reported after each epoch (some are not evaluated): equal if sampling and training are."""
    return {
        trial.recipe.hash: [(one["epoch"], one["train/loss"], one.get("val/loss")) for one in trial.metrics()]
        for trial in root.study(name).trials()
    }


def run(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_nodes_come_for_a_search_and_go_after_it(tiny_file: Write, tmp_path: Path) -> None:
    # Two trials at a time, each as wide as an added node; which ends first decides nothing.
    settings = {"trials": 4, "parallel": 2, "prune": False, "confirm_leaders": 0}
    file = tiny_file(name="grown", search=settings, training={"epochs": 12}, cache={"enabled": False})
    # A node fits the teacher with a trial's threads, and another number of threads rounds in another way.
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(CORES)}
    alone, grown = Workspace(tmp_path / "alone"), Workspace(tmp_path / "grown")
    run([sys.executable, "-c", ALONE, str(file), str(alone.path)], here, tmp_path / "a")

    worker = {"resources": {"CPU": CORES, "object_store_memory": STORE_BYTES}, "node_config": {}}
    types = {"worker": {**worker, "min_workers": 0, "max_workers": 2}}
    with ray_head(cpus=1, autoscaling={"types": types, "max_workers": 2, "idle_minutes": 0.1}) as head:
        seen = tmp_path / "seen"
        with seen.open("wb") as output:
            watching = subprocess.Popen(
                [sys.executable, "-c", WATCH, head.address], env=head.environment, stdout=output
            )
        try:
            command = [sys.executable, "-m", "heterokd", "search", str(file), "--address", head.address, "--json"]
            driver = {**head.environment, "PYTHONPATH": here["PYTHONPATH"]}
            done = run([*command, "--root", str(grown.path)], driver, tmp_path / "b")
            searched = looks(seen)
            until = time.monotonic() + 120
            while looks(seen)[-1]["nodes"] != [HEAD_ID]:
                assert time.monotonic() < until, "idle nodes stay"
                assert watching.poll() is None
                time.sleep(0.5)
        finally:
            watching.kill()
            watching.wait()

    print([(round(look["at"], 1), len(look["nodes"])) for look in looks(seen)[::10]])
    # Nodes came, and trials ran on them alone.
    assert searched[0]["nodes"] == [HEAD_ID]
    assert max(len(look["nodes"]) for look in searched) == 3
    trials = grown.study("grown").trials()
    places = {pid: node for look in searched for pid, node in look["actors"].items()}
    nodes = {places[str(trial.snapshot.pid)] for trial in trials}
    assert len(nodes) == 2
    assert HEAD_ID not in nodes

    # What was found is what one node finds, to the last bit.
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["standing"]["complete"] == len(trials) == 4
    assert outcomes(grown, "grown") == outcomes(alone, "grown")
    summaries = [read_summary(root.study("grown")) for root in (grown, alone)]
    ranked = [[(one.method, one.sample, one.values) for one in summary.leaders] for summary in summaries]
    assert ranked[0] == ranked[1]
    winners = [summary.winner for summary in summaries]
    assert winners[0] is not None
    assert winners[1] is not None
    assert winners[0].values == winners[1].values


def looks(seen: Path) -> list[dict[str, Any]]:
    """What was seen so far; a line that is being written is left out."""
    return [json.loads(line) for line in seen.read_text().splitlines() if line.endswith("}")]
