"""Two workers on nodes that share no folder, whose root is a store: stopped, resumed, killed, equal to one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from object_store import s3_server
from own_ray import ray_head
from safetensors.torch import load_file
from test_doctor import second_node
from test_workers import WITHOUT_BATCH_NORM

from heterokd.config.reading import load_experiment
from heterokd.execution import workers
from heterokd.execution.run import RunContext, run_recipe
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.trial_status import TrialSnapshot
from heterokd.storage.workspace import Workspace, open_workspace

Write = Callable[..., Path]

TRAINING = """
import json, os, shutil, signal, sys

from ray._private.state import actors

from heterokd.config.reading import load_experiment
from heterokd.execution.placement import Cluster
from heterokd.execution.ray_connection import connected
from heterokd.execution.run import RunContext
from heterokd.execution.workers import OnWorkers
from heterokd.storage.trial_status import TrialSnapshot
from heterokd.storage.workspace import open_workspace
from heterokd.teachers.prepare import prepare_teacher

file, url, address = sys.argv[1:]
asked, root = load_experiment(file), open_workspace(url)
weights = prepare_teacher(asked, root).weights
recipe, here = asked.recipe({"method": "kd"}), root.on_node()
folder = here.study(asked.name).trial(0)
told, nodes = [], set()

def train(decide):
    mirror = here.mirror(folder.path)
    mirror.replace()  # as a trial's process does, on any node
    folder.start(recipe, TrialSnapshot())
    mirror.push()

    def on_epoch(metrics):
        told.append(int(metrics["epoch"]))
        return decide(told[-1])

    context = RunContext(here, here.fetched(weights, root), checkpoint_epochs=(5,), mirror=mirror)
    found = OnWorkers(Cluster(1, 1, 0, (2, 2)), 2)(recipe, folder, context, on_epoch)
    mirror.close()
    return found

def workers():
    alive = [one for one in actors().values() if one["State"] == "ALIVE"]
    return [one for one in alive if "RayTrainWorker" in one["ActorClassName"]]

def kill_a_worker_once(epoch):
    if epoch == 7 and told.count(7) == 1:
        found = workers()
        nodes.update(one["Address"]["NodeID"] for one in found)
        assert len(found) == len(nodes) == 2, found
        os.kill(found[-1]["Pid"], signal.SIGKILL)
    return True

with connected(address):
    first = train(lambda epoch: epoch < 3)
    shutil.rmtree(here.path)
    second = train(kill_a_worker_once)
print(json.dumps({"told": told, "stopped": [first.stopped, second.stopped], "weights": str(weights),
                  "folder": str(folder.path), "left": list(root.store.at("train").folders())}))
"""


@dataclass(frozen=True)
class Rank:
    """What Ray Train tells a worker."""

    rank: int

    def get_world_rank(self) -> int:
        return self.rank


def test_each_worker_begins_with_the_stores_files_and_rank_0_alone_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = open_workspace(f"file://{tmp_path}/store").on_node()
    folder = root.study("apart").trial(3)
    mirror = root.mirror(folder.path)
    folder.append({"epoch": 1, "val/top1": 0.5})
    folder.checkpoint.write_bytes(b"first")
    assert mirror.push()
    work = workers.Work(
        recipe="", folder=folder.path, workspace=root, is_apart=True, weights=None, threads=1, check=None
    )  # fmt: skip
    copies = []
    for rank in (1, 0):
        monkeypatch.setattr(workers.train, "get_context", lambda rank=rank: Rank(rank))
        with workers._worker_folder(work) as copy:
            copies.append(copy.path)
            assert copy.number == 3
            assert copy.reported_epochs() == 1
            assert copy.checkpoint.read_bytes() == b"first"
            copy.append({"epoch": 2, "val/top1": 0.5})
            copy.checkpoint.write_bytes(f"by rank {rank}".encode())
            copy.weights.write_bytes(f"student of rank {rank}".encode())
    assert len({folder.path, *copies}) == 3
    store = mirror.store
    assert store is not None
    assert store.read("checkpoint.pt") == b"by rank 0"
    assert b'"epoch": 2' not in store.read("metrics.jsonl")  # the trial's process uploads these
    mirror.fetch_file(folder.weights.name)
    assert folder.weights.read_bytes() == b"student of rank 0"
    assert folder.checkpoint.read_bytes() == b"first"
    assert workers._storage(work) == f"file://{tmp_path}/store/train/studies/apart/trials/0003"
    assert not [path for copy in copies if copy.exists() for path in copy.iterdir()]


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_through_a_store_equal_one_process(tiny_file: Write, tmp_path: Path) -> None:
    file = tiny_file(name="apart", student=WITHOUT_BATCH_NORM, training={"epochs": 8, "learning_rate": 0.005})
    homes = [tmp_path / name for name in ("one", "other")]
    for home in homes:
        home.mkdir()
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    with (
        s3_server(tmp_path / "s3.log") as s3,
        ray_head(cpus=1, pages=True, environment={"HOME": str(homes[0]), **s3}) as head,
        second_node(head, [], {**head.environment, "HOME": str(homes[1])}, gpus=0),
    ):
        driver = {**head.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, str(script), str(file), "s3://state/runs", head.address],
            env=driver, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    told = found["told"]
    again = next(place for place in range(1, len(told)) if told[place] <= told[place - 1])
    assert told[:again] in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8])
    # From the last checkpoint in the store: that of epoch 5, or that of the stop if a slow upload had not ended.
    assert told[again:] in ([6, 7, 8], [4, 5, 6, 7, 8]), told
    assert found["stopped"] == [True, False]
    assert found["left"] in ([], ["studies"])
    disturbed = TrialFolder(Path(found["folder"]))
    assert [report["epoch"] for report in disturbed.metrics()] == list(range(1, 9))

    root = Workspace(tmp_path / "alone")
    recipe = load_experiment(file).recipe({"method": "kd"})
    undisturbed = root.study("apart").trial(0)
    undisturbed.start(recipe, TrialSnapshot())
    run_recipe(recipe, undisturbed, RunContext(root, Path(found["weights"])), lambda metrics: True)
    for ours, theirs in zip(disturbed.metrics(), undisturbed.metrics(), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    expected = load_file(undisturbed.weights)
    for key, value in load_file(disturbed.weights).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)
