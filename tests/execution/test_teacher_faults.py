"""Processes killed under the fit of a teacher: it goes on from the last checkpoint, with the weights of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from object_store import s3_server
from own_ray import ray_head
from safetensors.torch import load_file
from test_doctor import second_node

from heterokd.config.reading import load_experiment
from heterokd.storage.workspace import Workspace
from heterokd.teachers.prepare import PreparedTeacher, prepare_teacher

pytestmark = [pytest.mark.faults, pytest.mark.slow]
Write = Callable[..., Path]

VIT = {"network": "test_vit", "options": {"img_size": 32, "patch_size": 8}}
EPOCHS, KILLED_AT = 10, 7

ON_WORKERS = """
import json, os, signal, sys, time

import psutil

from heterokd.config.reading import load_experiment
from heterokd.execution.node_task import tasks_on
from heterokd.execution.prepare import prepare_teachers
from heterokd.storage.workspace import open_workspace

file, url, address, killed_at = sys.argv[1:]
asked, told = load_experiment(file), []

def workers():
    found = []
    for process in psutil.process_iter():
        try:
            if "ray::RayTrainWorker" in " ".join(process.cmdline()) and sys.argv[0] in process.environ()["WHO"]:
                found.append(process)
        except (psutil.Error, KeyError):
            continue
    return sorted(found, key=lambda process: process.create_time())

def progress(metrics, network):
    told.append(int(metrics["epoch"]))
    if told[-1] == int(killed_at) and told.count(told[-1]) == 1:
        found = workers()
        assert len(found) == 2, found
        time.sleep(7 if address else 0)  # until the store has the last checkpoint
        found[-1].kill()
    return True

with tasks_on(asked, open_workspace(url), address or None) as tasks:
    (teacher,) = prepare_teachers(asked, open_workspace(url), progress, tasks).values()
print(json.dumps({"told": told, "weights": str(teacher.weights), "card": teacher.card.content()}))
"""

ON_NODE = """
import json, os, signal, sys, time

import psutil

from heterokd.config.reading import load_experiment
from heterokd.execution.node_task import tasks_on
from heterokd.execution.prepare import prepare_teachers
from heterokd.storage.workspace import open_workspace

file, url, address, killed_at = sys.argv[1:]
asked, root, told = load_experiment(file), open_workspace(url), []

def raylet():
    for process in psutil.process_iter():
        try:
            if "ray::run_here" in " ".join(process.cmdline()) and sys.argv[0] in process.environ()["WHO"]:
                return process.parent()
        except (psutil.Error, KeyError):
            continue

def progress(metrics, network):
    told.append(int(metrics["epoch"]))
    if told[-1] == int(killed_at) and told.count(told[-1]) == 1:
        time.sleep(7)  # until the store has the last checkpoint
        found = raylet()
        assert found is not None and "raylet" in found.name(), found
        found.kill()
    return True

with tasks_on(asked, root, address) as tasks:
    (teacher,) = prepare_teachers(asked, root, progress, tasks).values()
left = sorted(file.name for file in root.mirror(teacher.weights.parent).store.files())
print(json.dumps({"told": told, "weights": str(teacher.weights), "card": teacher.card.content(), "left": left}))
"""


def asked(tiny_file: Write, workers: int) -> Path:
    training = {"epochs": EPOCHS, "workers": workers, "precision": "fp32", "channels_last": False, "warmup_epochs": 0}
    return tiny_file(teacher={**VIT, "fit": "all", "training": training})


def ran(script: Path, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    ours = {**environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), *arguments, str(KILLED_AT)]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_told(told: list[int]) -> None:
    """A process was killed once; there is a checkpoint of each epoch, so that at most the last one is lost."""
    again = next(place for place in range(1, len(told)) if told[place] <= told[place - 1])
    assert told[:again] in (list(range(1, KILLED_AT + 1)), list(range(1, KILLED_AT + 2)))
    assert told[again] >= KILLED_AT - 1
    assert told[again:] == list(range(told[again], EPOCHS + 1))


def alone(file: Path, root: Path) -> PreparedTeacher:
    return prepare_teacher(load_experiment(file), Workspace(root))


def check_equal(found: dict[str, Any], expected: PreparedTeacher, weights: Path) -> None:
    assert found["card"]["val_score"] == pytest.approx(expected.card.val_score, abs=0.02)
    assert expected.weights is not None
    theirs = load_file(expected.weights)
    for key, value in load_file(weights).items():
        torch.testing.assert_close(value, theirs[key], rtol=5e-3, atol=5e-3, msg=key)


def test_a_killed_worker_costs_the_epochs_since_the_last_checkpoint(tiny_file: Write, tmp_path: Path) -> None:
    file, script = asked(tiny_file, workers=2), tmp_path / "fit.py"
    script.write_text(ON_WORKERS)
    found = ran(script, [str(file), str(tmp_path / "runs"), ""], {**os.environ, "WHO": str(script)})
    check_told(found["told"])
    check_equal(found, alone(file, tmp_path / "alone"), Path(found["weights"]))
    left = {path.name for path in Path(found["weights"]).parent.iterdir()}
    assert left - {".lock"} == {"teacher.json", "teacher.safetensors", "recipe.yaml"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fit_goes_on_on_another_node_from_the_store(workers: int, tiny_file: Write, tmp_path: Path) -> None:
    """Nodes that share no folder: with one worker, the node of the fit's task dies, with two, a worker."""
    file, script = asked(tiny_file, workers), tmp_path / "fit.py"
    script.write_text(ON_NODE if workers == 1 else ON_WORKERS)
    homes = [tmp_path / name for name in ("driver", "first", "second")]
    for home in homes:
        home.mkdir()
    with ExitStack() as running:
        s3 = running.enter_context(s3_server(tmp_path / "s3.log"))
        environment = {"HOME": str(homes[0]), "WHO": str(script), **s3}
        head = running.enter_context(ray_head(cpus=0, pages=True, environment=environment))
        for home in homes[1:]:
            running.enter_context(second_node(head, [], {**head.environment, "HOME": str(home)}, gpus=0))
        found = ran(script, [str(file), "s3://state/runs", head.address], head.environment)
    check_told(found["told"])
    check_equal(found, alone(file, tmp_path / "alone"), Path(found["weights"]))
    if workers == 1:
        assert found["card"] == json.loads(json.dumps(alone(file, tmp_path / "alone").card.content()))
        assert found["left"] == ["recipe.yaml", "teacher.json", "teacher.safetensors"]
