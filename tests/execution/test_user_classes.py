"""A search over a method and a data set of a user's own files, which are gone before its processes start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import user_classes

from heterokd.config.reading import load_experiment, load_study_experiment
from heterokd.execution.driver import search
from heterokd.storage.workspace import Workspace
from heterokd.students.export.export import export_student
from heterokd.students.export.find import find_student


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_files_travel_to_the_processes_of_a_search(
    tiny_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    user_classes.write(tmp_path)
    space = {
        "methods": ["scratch", "kd", "./my_method.py:MyKD"],
        "overrides": {"mykd.weight": {"low": 0.5, "high": 2.0}},
    }
    changes = {"search": {"space": space, "parallel": 2, "trials": 5, "prune": False}}
    experiment = load_experiment(tiny_file(name="mine", data={"dataset": "./my_data.py:MyData"}, **changes))
    (tmp_path / "my_method.py").unlink()
    (tmp_path / "my_data.py").unlink()
    root = Workspace(tmp_path / "runs")
    found = search(experiment, root)
    assert found.summary.progress.failed == 0
    trials = [trial for trial in found.folder.trials() if trial.recipe.method == "mykd"]
    assert trials
    assert all("train/logit" in trial.metrics()[-1] for trial in trials)
    assert os.getpid() not in {trial.snapshot.pid for trial in found.folder.trials()}

    (run,) = mlflow.MlflowClient(found.uri).search_runs(
        [mlflow.MlflowClient(found.uri).get_experiment_by_name("mine").experiment_id],
        f"tags.`heterokd.trial` = '{trials[0].number}'",
    )
    assert (run.data.tags["heterokd.method"], run.data.tags["heterokd.dataset"]) == ("mykd", "mydata")
    assert "mykd.weight" in run.data.params
    assert "mykd" in found.folder.report.read_text()

    again = search(load_study_experiment(found.folder.experiment_file), root, resume=True)
    assert again.summary.progress == found.summary.progress, "the study's file alone goes on with it"
    with find_student(root, str(trials[0].path)) as student:
        assert export_student(student, "safetensors", tmp_path / "out").parity.agrees
