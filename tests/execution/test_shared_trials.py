"""Trials on several of Ray Train's workers, as a search runs them: pruned, killed, resumed, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from safetensors.torch import load_file
from test_workers import WITHOUT_BATCH_NORM

from heterokd.storage.trial_status import TrialSnapshot
from heterokd.storage.workspace import Workspace
from heterokd.tracking.store import open_store

# A Ray of its own for each: with the dashboard that Ray Train asks, and with no other test's actors.
pytestmark = [pytest.mark.slow, pytest.mark.ray]
Write = Callable[..., Path]

PRUNED = 4
SEARCH = """
import json, sys, time
from pathlib import Path

import psutil

from heterokd.execution.ray_connection import connected
from heterokd.execution.ray_settings import ray
from heterokd.config.reading import load_experiment
from heterokd.storage.workspace import Workspace
from heterokd.execution.driver import search

file, root, trials, workers = sys.argv[1:]
asked = load_experiment(file, [f"search.trials={trials}", f"training.workers={workers}"])

def left():
    from ray.util import placement_group_table
    from ray.util.state import list_actors
    groups = [one["state"] for one in placement_group_table().values() if one["state"] != "REMOVED"]
    address = ray.get_runtime_context().gcs_address  # this Ray's, whatever others run on the machine
    actors = [one.class_name for one in list_actors(address, filters=[("state", "=", "ALIVE")])]
    names = [" ".join(one.cmdline()) for one in psutil.Process().children(recursive=True)]
    # Idle processes that Ray keeps for the next actor, its agents, and one actor of the job that it never ends.
    free = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
    processes = [name for name in names if name.startswith("ray::") and not name.startswith(free)]
    return {"groups": groups, "actors": [one for one in actors if one != "_AutoscalingCoordinatorActor"],
            "processes": processes, "cores": ray.available_resources().get("CPU")}

with connected(None, cores=4, shared=True):
    started = time.monotonic()
    found = search(asked, Workspace(Path(root)), resume=True)
    seconds = time.monotonic() - started
    until = time.monotonic() + 30
    while (rest := left()) and (rest["groups"] or rest["actors"] or rest["processes"] or rest["cores"] != 4):
        if time.monotonic() > until:
            break
        time.sleep(0.5)
print(json.dumps({"left": rest, "model": found.model, "uri": found.uri, "seconds": seconds}))
"""


def run_script(folder: Path, script: str, *arguments: object) -> Any:
    file = folder / "script.py"
    file.write_text(textwrap.dedent(script))
    command = [sys.executable, str(file), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_after_pruned_trials_nothing_is_left_and_a_student_is_registered(tiny_file: Write, tmp_path: Path) -> None:
    """A study begun with one worker a trial and gone on with two."""
    space = {"methods": ["kd"], "shared": {"training.learning_rate": {"low": 1e-6, "high": 0.05, "log": True}}}
    settings = {"space": space, "first_rung": 0.3, "reduction_factor": 6, "metric": "val/loss", "parallel": None}
    file = tiny_file(name="shared", student=WITHOUT_BATCH_NORM, search=settings)
    root = Workspace(tmp_path / "runs")
    run_script(tmp_path, SEARCH, file, root.path, 6, 1)
    folder = root.study("shared")
    alone = {trial.number for trial in folder.trials()}
    found = run_script(tmp_path, SEARCH, file, root.path, 16, 2)
    print(f"{found['seconds']:.0f} s for {len(folder.trials()) - len(alone)} trials on two workers each")
    assert found["left"] == {"groups": [], "actors": [], "processes": [], "cores": 4}

    trials = folder.trials()
    shared = [trial for trial in trials if trial.number not in alone]
    by_state = {state: [one for one in shared if one.status == state] for state in ("pruned", "complete")}
    assert len(by_state["pruned"]) >= PRUNED
    assert len(by_state["pruned"]) + len(by_state["complete"]) == len(shared)
    for trial in by_state["pruned"]:
        assert [report["epoch"] for report in trial.metrics()] == [1]
        assert trial.checkpoint.exists()
    # What trials leave is the same as after one worker; a trial that had a checkpoint keeps it.
    kept = {"recipe.yaml", "trial.json", "metrics.jsonl", "checkpoint.pt"}
    assert by_state["complete"]
    for trial in trials:
        names = {path.name for path in trial.path.iterdir()}
        assert names - {"checkpoint.pt"} == (
            kept - {"checkpoint.pt"} | ({"student.safetensors"} if trial.status == "complete" else set())
        )

    assert found["model"] is not None
    client = mlflow.MlflowClient(open_store(root, None))
    assert str(client.get_model_version_by_alias(found["model"][0], "challenger").version) == found["model"][1]
    (experiment,) = client.search_experiments(filter_string="name = 'shared'")
    runs = client.search_runs([experiment.experiment_id], max_results=200)
    assert len(runs) == 1 + len(trials)
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_trial = {int(run.data.tags["heterokd.trial"]): run for run in runs if "heterokd.trial" in run.data.tags}
    for trial in shared:
        history = client.get_metric_history(by_trial[trial.number].info.run_id, "val/loss")
        assert [point.step for point in history] == [int(report["epoch"]) for report in trial.metrics()]


TRAININGS = """
import json, os, signal, sys
from pathlib import Path

import psutil

from heterokd.execution.placement import Cluster; from heterokd.execution.ray_connection import connected
from heterokd.config.reading import load_experiment
from heterokd.teachers.prepare import prepare_teacher
from heterokd.errors import TrainingDiverged
from heterokd.storage.workspace import Workspace
from heterokd.storage.trial_status import TrialSnapshot
from heterokd.execution.run import RunContext
from heterokd.execution.workers import OnWorkers

file, root = sys.argv[1], Workspace(Path(sys.argv[2]))
asked = load_experiment(file)
weights = prepare_teacher(asked, root).weights
folder = root.study("trainings")
told = {}

def train(number, place, rungs, decide, **changes):
    told[number] = []
    recipe = asked.recipe({"method": "kd", **changes})
    trial = folder.trial(number)
    trial.start(recipe, TrialSnapshot())
    def keep_going(metrics):
        told[number].append(int(metrics["epoch"]))
        return decide(int(metrics["epoch"]))
    context = RunContext(root, weights, checkpoint_epochs=tuple(rungs))
    return OnWorkers(place, 2)(recipe, trial, context, keep_going)

def kill_a_worker_once(epoch):
    if epoch == 6 and told[0].count(6) == 1:
        children = psutil.Process().children(recursive=True)
        workers = [one for one in children if "ray::RayTrainWorker" in " ".join(one.cmdline())]
        assert len(workers) == 2, workers
        os.kill(workers[-1].pid, signal.SIGKILL)
    return True

with connected(None, cores=3, shared=True):
    disturbed = train(0, Cluster(1, 1, 0, (2, 2)), (4,), kill_a_worker_once)
    # As many as there is room for: two of at most five.
    elastic = train(1, Cluster(1, 1.5, 0, (1, 5)), (), lambda epoch: epoch < 2)
    try:
        train(2, Cluster(1, 1, 0, (2, 2)), (), lambda epoch: True, **{"training.learning_rate": 1e30})
        sentence = None
    except TrainingDiverged as error:
        sentence = str(error)
print(json.dumps({"told": told, "diverged": sentence, "metrics": disturbed.metrics,
                  "elastic": [elastic.stopped, elastic.epochs], "weights": str(weights)}))
"""


def test_a_killed_worker_costs_the_epochs_since_the_last_rung_and_nothing_else(
    tiny_file: Write, tmp_path: Path
) -> None:
    """Kill -9 of one of two workers; then a training on as many workers as there is room for, and one that diverges."""
    from heterokd.config.reading import load_experiment
    from heterokd.execution.run import RunContext, run_recipe

    file = tiny_file(name="trainings", student=WITHOUT_BATCH_NORM, training={"epochs": 8, "learning_rate": 0.005})
    root = Workspace(tmp_path / "runs")
    found = run_script(tmp_path, TRAININGS, file, root.path)
    folder = root.study("trainings")
    told = found["told"]["0"]
    again = told.index(5, told.index(6))
    assert told[:again] in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7])  # seen to die after epoch 6 or within the next
    assert told[again:] == [5, 6, 7, 8]
    disturbed = folder.trial(0)
    assert [report["epoch"] for report in disturbed.metrics()] == list(range(1, 9))

    undisturbed = folder.trial(9)
    recipe = load_experiment(file).recipe({"method": "kd"})
    undisturbed.start(recipe, TrialSnapshot())
    run_recipe(recipe, undisturbed, RunContext(root, Path(found["weights"])), lambda metrics: True)
    for ours, theirs in zip(disturbed.metrics(), undisturbed.metrics(), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    expected = load_file(undisturbed.weights)
    for key, value in load_file(disturbed.weights).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)

    assert found["elastic"] == [True, 2]
    assert found["told"]["1"] == [1, 2]
    assert folder.trial(1).checkpoint.exists()
    assert "is not finite in epoch" in found["diverged"]
