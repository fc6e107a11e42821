"""A search on a cluster with a node at fault: no trial is lost, the node is named, and a useless cluster stops it."""

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
from own_ray import ray_head
from test_doctor import apart, second_node, write_images

from heterokd.storage.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.ray]
Write = Callable[..., Path]
SETTINGS = {"space": {"methods": ["scratch", "kd"]}, "parallel": 2, "prune": False, "confirm_leaders": 0}

SEARCH = """
import json, sys, time
from pathlib import Path

from torch import nn

from heterokd.config.reading import dump_experiment, load_experiment
from heterokd.errors import SearchError
from heterokd.execution.executor import SearchJob, run_study
from heterokd.storage.files import write_text
from heterokd.storage.workspace import Workspace
from heterokd.study.search_space import open_space
from heterokd.training.data import open_splits
from heterokd.training.train import TrainResult

class Silent:
    def sync(self, trial):
        return True
    def finish(self, summary, status="FINISHED"):
        return True

def run(recipe, folder, context, on_epoch):
    open_splits(recipe.data)  # as each training does
    while folder.number == 0 and (root.path.parent / "wait").exists():
        time.sleep(0.2)
    for epoch in range(folder.reported_epochs() + 1, recipe.training.epochs + 1):
        metrics = {"epoch": epoch, "val/top1": 0.5}
        folder.append(metrics)
        on_epoch(metrics)
    return TrainResult(nn.Linear(1, 1), metrics, recipe.training.epochs, False)

file, root, address = sys.argv[1], Workspace(Path(sys.argv[2])), sys.argv[3] or None
experiment = load_experiment(file)
folder = root.study(experiment.name)
space = open_space(experiment, folder)
write_text(folder.experiment_file, dump_experiment(experiment))
sentence, nodes = None, {}
try:
    summary = run_study(SearchJob(experiment, root, space), Silent(), address=address, run=run)
    nodes = dict(summary.failing_nodes)
except SearchError as error:
    sentence = str(error)
print(json.dumps({"stopped": sentence, "nodes": nodes, "states": [str(one.status) for one in folder.trials()]}))
"""


def searching(
    file: Path, root: Workspace, address: str, environment: dict[str, str], code: str = SEARCH
) -> subprocess.Popen[str]:
    script = file.parent / "search.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(file), str(root.path), address]
    ours = {**environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (file.parent / "log").open("w") as log:
        return subprocess.Popen(command, env=ours, stdout=subprocess.PIPE, stderr=log, text=True)


def outcome(process: subprocess.Popen[str], file: Path) -> dict[str, Any]:
    try:
        said, _ = process.communicate(timeout=250)
    finally:
        process.kill()
    log = (file.parent / "log").read_text()
    print(log[-3000:])
    assert process.returncode == 0, log[-3000:]
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 200
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_a_node_without_the_data_that_joins_a_search_costs_no_trial(tiny_file: Write, tmp_path: Path) -> None:
    """The second of two parallel trials waits for a node: the one that joins gets it at once, and lacks the images.

    The first trial trains until the fault is named, so that the second has no other place meanwhile.
    """
    images, empty, root = tmp_path / "images", tmp_path / "empty", Workspace(tmp_path / "runs")
    write_images(images)
    empty.mkdir()
    data = {"dataset": "image_folder", "root": str(images)}
    file = tiny_file(name="joined", data=data, search={**SETTINGS, "trials": 6}, training={"epochs": 4})
    log, wait = tmp_path / "log", tmp_path / "wait"
    wait.touch()
    away = apart(f"mount --bind {empty} {images}")
    with ray_head(cpus=1) as head:
        process = searching(file, root, head.address, head.environment)
        try:
            until((root.study("joined").trial(0).path / "trial.json").exists, process)
            with second_node(head, away, head.environment, gpus=0):
                until(lambda: "is avoided: data: " in log.read_text(), process)
                wait.unlink()
                found = outcome(process, file)
        finally:
            process.kill()
    assert found["states"] == ["complete"] * 6
    assert found["stopped"] is None
    (reason,) = found["nodes"].values()
    assert reason.startswith("data: ")
    assert str(images) in reason


def test_a_gpu_that_is_none_stops_the_search_which_resumes_elsewhere(tiny_file: Write, tmp_path: Path) -> None:
    root = Workspace(tmp_path / "runs")
    file = tiny_file(name="promised", search={**SETTINGS, "trials": 2}, training={"epochs": 2})
    with ray_head(cpus=1) as head, second_node(head, [], head.environment, gpus=1):
        found = outcome(searching(file, root, head.address, head.environment), file)
    assert "gpus: torch sees 0 GPU(s), and Ray promised 1" in found["stopped"]
    assert "no trial is lost" in found["stopped"]
    assert found["states"] == []  # none has begun: none was trained on the CPU

    found = outcome(searching(file, root, "", dict(os.environ)), file)
    assert found == {"stopped": None, "nodes": {}, "states": ["complete"] * 2}
