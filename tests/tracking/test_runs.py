"""MLflow as a projection: nothing twice, nothing lost, and no search stopped by it."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import fabricated
import mlflow
import pytest
import torch
import torch.nn.functional as F
import uvicorn
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from torch import Tensor, nn

from heterokd.datasets import load_dataset
from heterokd.datasets.io.split import Splits
from heterokd.errors import NetworkError, TrackingError
from heterokd.execution.driver import _registered
from heterokd.storage.study_dir import TrialFolder
from heterokd.storage.workspace import Workspace
from heterokd.students.registry import log_student, register
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import current, open_store, quiet
from heterokd.tracking.ui_server import ui_command
from heterokd.training.data import open_splits
from heterokd.training.meters import upsample


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    # mlflow would keep it for the process, and the next search would log there.
    assert os.environ.get("MLFLOW_TRACKING_URI") in (None, "sqlite:///environment.db")


@pytest.fixture
def root(tmp_path: Path) -> Workspace:
    return fabricated.root_with_store(tmp_path)


def project(root: Workspace, question=None, client: type[MlflowClient] = MlflowClient) -> StudyRuns:
    question, uri = question or fabricated.experiment(), open_store(root, None)
    return StudyRuns(question, root.study(question.name), uri, root.artifacts, client=client(uri))


def all_runs(runs: StudyRuns) -> dict[str, Run]:
    experiment = runs.client.get_experiment_by_name(runs.experiment.experiment_name)
    return {run.info.run_name: run for run in runs.client.search_runs([experiment.experiment_id])}


def steps(runs: StudyRuns, run: Run, key: str) -> list[int]:
    return [metric.step for metric in runs.client.get_metric_history(run.info.run_id, key)]


def _open_and_log(folder: str, barrier, results) -> None:
    barrier.wait()
    try:
        uri = open_store(Workspace(Path(folder)), None)
        MlflowClient(uri).create_experiment(f"of-{os.getpid()}")
        results.put("ok")
    except Exception as error:  # noqa: BLE001  whatever goes wrong is what the test shows
        results.put(repr(error))


def test_four_processes_open_a_new_store_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_open_and_log, args=(str(tmp_path), barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == ["ok"] * 4
    for process in processes:
        process.join()
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_stale_mlruns_folder_does_not_matter(root: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mlruns/0").mkdir(parents=True)
    (tmp_path / "mlruns/0/meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    assert open_store(root, None) == f"sqlite:///{root.mlflow_database}"
    runs = project(root)
    made = fabricated.trial(runs.folder, runs.experiment, 0)
    assert runs.sync(made)
    assert [path.name for path in (tmp_path / "mlruns/0").iterdir()] == ["meta.yaml"]


def test_a_trial_that_has_ended_has_its_cost(root: Workspace) -> None:
    runs = project(root, fabricated.experiment(cluster={"currency": "EUR"}))
    priced = fabricated.trial(runs.folder, runs.experiment, 0, status="running")
    fabricated.change(priced, price=2.0, paid=0.25, began=1000.0)
    free = fabricated.trial(runs.folder, runs.experiment, 1)
    assert runs.sync(priced)
    assert runs.sync(free)
    assert "cost/trial" not in all_runs(runs)["000-kd"].data.metrics
    fabricated.change(priced, status="complete", ended=2800.0)
    assert runs.sync(priced)
    ended = all_runs(runs)["000-kd"]
    assert ended.data.metrics["cost/trial"] == 0.25 + 2.0 / 2
    assert ended.data.tags["heterokd.currency"] == "EUR"
    assert "cost/trial" not in all_runs(runs)["001-kd"].data.metrics


def test_the_environment_names_the_store_unless_the_experiment_does(
    root: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("environment.db", "experiment.db"):
        (tmp_path / name).write_bytes(root.mlflow_database.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///environment.db")
    assert open_store(Workspace(tmp_path), None) == f"sqlite:///{tmp_path}/environment.db"
    assert open_store(Workspace(tmp_path), "sqlite:///experiment.db") == f"sqlite:///{tmp_path}/experiment.db"


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("http://127.0.0.1:9", "does not answer"),
        ("http://user:secret@127.0.0.1:9", r"http://\*\*\*@127.0.0.1:9 does not answer"),
        ("mlruns", "is not a database or a server"),
        ("sqlite://", "names no file"),
    ],
)
def test_an_unusable_store_is_one_sentence(root: Workspace, uri: str, sentence: str) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError, match=sentence) as caught:
        open_store(root, uri)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert time.monotonic() - started < 10


def test_a_damaged_store_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(TrackingError, match=r"mlflow\.db is no SQLite database; give another file") as caught:
        open_store(Workspace(tmp_path), None)
    assert "\n" not in str(caught.value)


def test_trials_are_children_and_confirmations_grandchildren(root: Workspace) -> None:
    runs = project(root)
    fabricated.study(root, runs.experiment)
    fabricated.trial(runs.folder, runs.experiment, 0, "scratch", origin="published")
    fabricated.trial(runs.folder, runs.experiment, 7, "kd")
    confirmation = fabricated.trial(runs.folder, runs.experiment, 31, "kd", seed=2000, confirms=7)
    assert runs.sync(confirmation)
    assert all(runs.sync(trial) for trial in runs.folder.trials())
    nodes = {"10.0.0.2": "data: there is no folder"}
    assert runs.finish(fabricated.summary(fabricated.ranked(7, mean=0.25), failing_nodes=nodes))

    found = all_runs(runs)
    assert set(found) == {"tiny", "000-scratch", "007-kd", "031-kd-seed2000"}
    parent, child, grandchild = found["tiny"], found["007-kd"], found["031-kd-seed2000"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert grandchild.data.tags["mlflow.parentRunId"] == child.info.run_id
    assert {run.info.status for run in found.values()} == {"FINISHED"}

    params = child.data.params
    assert params["method"] == "kd"
    assert float(params["kd.temperature"]) == runs.folder.trial(7).recipe.params["temperature"]
    assert params["training.learning_rate"] == "0.12"
    assert (params["student"], params["teacher"], params["seed"]) == ("test_resnet", "vit_tiny_patch16_224", "0")
    assert params["recipe"] == runs.folder.trial(7).recipe.hash
    assert found["000-scratch"].data.tags["heterokd.origin"] == "published"
    assert steps(runs, child, "val/top1") == [1, 2, 3]
    assert steps(runs, child, "student/params_m") == [0]
    assert parent.data.metrics == {"best/val/top1": 0.25}
    assert parent.data.tags["heterokd.best_run_id"] == child.info.run_id
    assert parent.data.tags["heterokd.failing_nodes"] == "10.0.0.2: data: there is no folder"
    assert "vit_tiny_patch16_224" in parent.data.tags["mlflow.note.content"]
    assert [file.path for file in runs.client.list_artifacts(child.info.run_id)] == ["recipe.yaml"]
    assert [file.path for file in runs.client.list_artifacts(parent.info.run_id)] == ["experiment.yaml"]
    assert child.info.artifact_uri.startswith(root.artifacts.as_uri())
    experiment = runs.client.get_experiment(parent.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_syncing_twice_and_resuming_log_nothing_twice(root: Workspace) -> None:
    runs = project(root)
    made = fabricated.trial(runs.folder, runs.experiment, 3, status="running", epochs=2)
    assert runs.sync(made)
    assert runs.sync(made)

    resumed = project(root)
    fabricated.report(made, 3)
    assert resumed.sync(made)
    fabricated.change(made, status="complete")
    assert resumed.sync(made)
    again = project(root)
    assert again.sync(made)
    assert again.finish(None)
    assert again.finish(None)

    found = all_runs(again)
    assert set(found) == {"tiny", "003-kd"}
    assert steps(again, found["003-kd"], "train/loss") == [1, 2, 3]
    assert found["003-kd"].info.status == "FINISHED"


def test_failed_and_pruned_trials(root: Workspace) -> None:
    runs = project(root)
    failed = fabricated.trial(runs.folder, runs.experiment, 0, status="failed", epochs=1)
    (failed.path / "error.txt").write_text("Traceback\n  File x\nTrainingDiverged: train/kd is not finite\n")
    pruned = fabricated.trial(runs.folder, runs.experiment, 1, status="pruned", epochs=1)
    assert runs.sync(failed)
    assert runs.sync(pruned)
    found = all_runs(runs)
    assert found["000-kd"].info.status == "FAILED"
    assert found["000-kd"].data.tags["heterokd.error"] == "TrainingDiverged: train/kd is not finite"
    artifacts = {file.path for file in runs.client.list_artifacts(found["000-kd"].info.run_id)}
    assert artifacts == {"recipe.yaml", "error.txt"}
    assert found["001-kd"].info.status == "FINISHED"
    assert found["001-kd"].data.tags["heterokd.pruned"] == "true"

    fabricated.change(pruned, status="running")
    assert project(root).sync(pruned)
    going_on = all_runs(runs)["001-kd"]
    assert (going_on.info.status, going_on.data.tags["heterokd.pruned"]) == ("RUNNING", "false")


def test_a_number_used_again_for_another_recipe_is_another_run(root: Workspace) -> None:
    runs = project(root)
    made = fabricated.trial(runs.folder, runs.experiment, 0)
    assert runs.sync(made)
    (made.path / "recipe.yaml").write_text(runs.experiment.recipe({"method": "scratch"}).to_yaml())
    assert project(root).sync(made)
    assert set(all_runs(runs)) == {"tiny", "000-kd", "000-scratch"}


def _search_until_killed(folder: str) -> None:
    runs = project(Workspace(Path(folder)))
    runs.sync(fabricated.trial(runs.folder, runs.experiment, 0, status="running", epochs=1))
    os.kill(os.getpid(), signal.SIGKILL)


def test_runs_of_a_killed_driver_are_closed(root: Workspace) -> None:
    process = multiprocessing.get_context("fork").Process(target=_search_until_killed, args=(str(root.path),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    runs = project(root, fabricated.experiment("other"))
    alive = fabricated.trial(runs.folder, runs.experiment, 0, status="running", epochs=1)
    assert runs.sync(alive)
    killed = project(root)
    assert {run.info.status for run in all_runs(killed).values()} == {"RUNNING"}

    assert runs.close_zombies() == 2
    assert runs.close_zombies() == 0
    assert {run.info.status for run in all_runs(killed).values()} == {"KILLED"}
    assert {run.info.status for run in all_runs(runs).values()} == {"RUNNING"}

    assert killed.sync(killed.folder.trial(0))
    assert {run.info.status for run in all_runs(killed).values()} == {"RUNNING"}
    assert killed.finish(None, "KILLED")
    assert {run.info.status for run in all_runs(killed).values()} == {"KILLED"}


def execute(root: Workspace, statement: str) -> None:
    with closing(sqlite3.connect(root.mlflow_database)) as store:
        store.execute(statement)


@pytest.mark.parametrize("when", ["before a call", "during a call"])
def test_a_store_that_goes_away_stops_nothing(root: Workspace, caplog: pytest.LogCaptureFixture, when: str) -> None:
    runs = project(root)
    made = fabricated.trial(runs.folder, runs.experiment, 0, status="running", epochs=1)
    assert runs.sync(made)
    uri = runs.uri
    if when == "before a call":
        runs.uri = "http://127.0.0.1:9"
    else:
        execute(root, "CREATE TRIGGER gone BEFORE INSERT ON metrics BEGIN SELECT RAISE(ABORT, 'no disk'); END")
    with caplog.at_level(logging.WARNING, "heterokd"):
        for epoch in (2, 3):
            fabricated.report(made, epoch)
            started = time.monotonic()
            assert not runs.sync(made)
            assert time.monotonic() - started < 20
    ours = [record for record in caplog.records if record.name.startswith("heterokd")]
    assert len(ours) == 1
    assert "is not up to date" in ours[0].getMessage()
    assert "\n" not in ours[0].getMessage()

    runs.uri = uri
    execute(root, "DROP TRIGGER IF EXISTS gone")
    assert runs.sync(made)
    assert steps(runs, all_runs(runs)["000-kd"], "train/loss") == [1, 2, 3]


@pytest.mark.parametrize("call", ["create_run", "log_batch", "log_artifact", "set_terminated"])
def test_an_answer_that_is_lost_doubles_nothing(root: Workspace, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The store does what it is asked, and its server dies before it says so."""
    runs = project(root)
    made = fabricated.trial(runs.folder, runs.experiment, 0, epochs=3)
    done = getattr(runs.client, call)

    def unanswered(*given: object, **named: object) -> None:
        done(*given, **named)
        raise MlflowException("the connection was reset")

    with monkeypatch.context() as patch:
        patch.setattr(runs.client, call, unanswered)
        assert not runs.sync(made)
    assert runs.sync(made)
    assert runs.finish(None)
    found = runs.client.search_runs([runs.experiment_id])
    assert sorted(str(run.info.run_name) for run in found) == ["000-kd", "tiny"]
    assert {run.info.status for run in found} == {"FINISHED"}
    for key in ("train/loss", "val/top1"):
        assert steps(runs, all_runs(runs)["000-kd"], key) == [1, 2, 3]
    for key in all_runs(runs)["000-kd"].data.metrics:
        if key.startswith("student/"):
            assert steps(runs, all_runs(runs)["000-kd"], key) == [0]


def test_a_run_is_created_by_a_single_request_and_a_late_copy_is_deleted(
    root: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow would repeat the request, and the server may carry both out."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    retries = []

    class Twice(MlflowClient):
        def create_run(self, *given: Any, **named: Any) -> Run:
            retries.append(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
            super().create_run(*given, **named)
            return super().create_run(*given, **named)

    runs = project(root, client=Twice)
    made = fabricated.trial(runs.folder, runs.experiment, 0, epochs=3)
    assert runs.sync(made)
    assert runs.finish(None)
    assert retries == ["0", "0"]
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    found = runs.client.search_runs([runs.experiment_id])
    assert sorted(str(run.info.run_name) for run in found) == ["000-kd", "tiny"]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert steps(runs, all_runs(runs)["000-kd"], "val/top1") == [1, 2, 3]


def test_the_end_of_a_study_is_logged_again_to_a_server_that_refused(root: Workspace, tmp_path: Path) -> None:
    calls = []

    class RefusesOnce(MlflowClient):
        def set_terminated(self, *given: Any, **named: Any) -> None:
            calls.append(given)
            if len(calls) == 1:
                raise MlflowException("500 Internal Server Error")
            super().set_terminated(*given, **named)

    runs = project(root, client=RefusesOnce)
    made = fabricated.trial(runs.folder, runs.experiment, 0, epochs=3)
    fabricated.change(made, status="running")
    with HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        runs.uri = f"http://127.0.0.1:{server.server_port}"  # what it answers to its probe is no 5xx
        assert runs.finish(None, pauses=(0.0, 0.0))
        server.shutdown()
    assert {run.info.status for run in runs.client.search_runs([runs.experiment_id])} == {"FINISHED", "KILLED"}


def test_a_logged_student_gives_its_logits_without_pickle(root: Workspace) -> None:
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    runs, student = project(root), fabricated.random_student()
    splits = load_dataset("digits", image_size=32, labels_per_class=20)
    made = fabricated.trial(runs.folder, runs.experiment, 5, student=student)
    uri = log_student(runs, made, splits)
    assert uri.startswith("models:/m-")
    assert log_student(project(root), made, splits) == uri

    with current(runs.uri):
        model = mlflow.pytorch.load_model(uri)
    with torch.inference_mode():
        for batch in (1, 2, 5):
            images = torch.rand(batch, 3, 32, 32)
            torch.testing.assert_close(model(images), student(images).logits, atol=1e-5, rtol=0)

    run = all_runs(runs)["005-kd"]
    files = {file.path for file in runs.client.list_artifacts(run.info.run_id, "weights")}
    assert files == {"weights/student.json", "weights/student.safetensors", "weights/recipe.yaml"}
    assert run.info.status == "FINISHED"

    version = register(runs, made, uri, splits)
    assert register(project(root), made, uri, splits) == version == "1"
    found = runs.client.get_model_version_by_alias("digits-student", "challenger")
    assert str(found.version) == version
    assert found.source == uri
    assert (found.tags["method"], found.tags["trial"], found.tags["val/top1"]) == ("kd", "5", "0.3000")
    assert found.tags["data"] == splits.fingerprint
    assert "distilled from vit_tiny_patch16_224 by kd" in found.description


@pytest.mark.thorough
def test_a_served_student_refuses_images_that_are_none(root: Workspace) -> None:
    """By MLflow's scoring server: 400 and the reason, not NaN, which is no JSON."""
    runs = project(root)
    made = fabricated.trial(runs.folder, runs.experiment, 0, student=fabricated.random_student())
    uri = log_student(runs, made, load_dataset("digits", image_size=32, labels_per_class=20))
    with quiet(), current(runs.uri):  # importing the server warns
        from mlflow.pyfunc import scoring_server

        app = scoring_server.init(mlflow.pyfunc.load_model(uri))

    def answer(value: float) -> tuple[int, str]:
        images = [[[[value] * 32] * 32] * 3]
        request = urllib.request.Request(f"{address}/invocations", json.dumps({"inputs": images}).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            assert answer(0.5)[0] == 200
            for value in (math.nan, math.inf, 255.0, -3.0):
                code, text = answer(value)
                assert code == 400, text
                assert "images: expected values in [0, 1] and no NaN; divide 8-bit values by 255" in text
            code, text = answer(1.2)  # resizing overshoots
            assert code == 200
            assert all(math.isfinite(logit) for logit in json.loads(text)["predictions"][0])
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.thorough
def test_a_segmentation_is_logged_and_registered(root: Workspace) -> None:
    question = fabricated.scenes()
    runs, splits = project(root, question), open_splits(question.data)
    student = fabricated.scene_student(splits, 0)
    made = fabricated.trial(runs.folder, question, 3, "pixel_kd", student=student)
    runs.folder.pictures.mkdir()
    (runs.folder.pictures / "iou.png").write_bytes(b"a picture")
    uri = log_student(runs, made, splits)
    register(runs, made, uri, splits)
    assert runs.finish(fabricated.summary(fabricated.ranked(3, mean=0.31)))

    with current(runs.uri):
        model = mlflow.pytorch.load_model(uri)
        served = mlflow.pyfunc.load_model(uri)
    assert [tensor.shape for tensor in served.metadata.signature.inputs.inputs] == [(-1, 3, -1, -1)]
    assert [tensor.shape for tensor in served.metadata.signature.outputs.inputs] == [(-1, 11, -1, -1)]
    for size in ((1, 3, 64, 64), (3, 3, 96, 128)):
        images = torch.rand(size)
        with torch.inference_mode():
            logits = upsample(student(images).logits, size[2:])
            torch.testing.assert_close(model(images), logits, atol=1e-5, rtol=0)
        assert served.predict(images.numpy()).shape == (size[0], 11, *size[2:])

    found = all_runs(runs)
    parent, child = found["scenes"], found["003-pixel_kd"]
    assert parent.data.metrics == {"best/val/miou": 0.31}
    assert parent.data.tags["heterokd.metric"] == "val/miou"
    assert parent.data.tags["heterokd.task"] == child.data.tags["heterokd.task"] == "segmentation"
    assert steps(runs, child, "val/miou") == [1, 2, 3]
    assert [file.path for file in runs.client.list_artifacts(parent.info.run_id, "pictures")] == ["pictures/iou.png"]
    version = runs.client.get_model_version_by_alias("scenes-student", "challenger")
    assert version.tags["val/miou"] == "0.3000"
    assert "segmentation of digit_scenes (11 classes, 64 x 48 pixels)" in version.description


class Unwritten(nn.Module):
    """Logits of every pixel, which torch.export cannot write down: sizes are rounded, or values are asked for."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.classify = nn.Conv2d(3, 11, 1)

    def forward(self, images: Tensor) -> Tensor:
        if self.asks and images.sum() > 0:
            return self.classify(images)
        half = math.ceil(images.shape[-1] / 2)
        return self.classify(F.pad(images, (half, 0)))[..., half:]


def scene_trial(root: Workspace) -> tuple[StudyRuns, TrialFolder, Splits]:
    question = fabricated.scenes()
    runs, splits = project(root, question), open_splits(question.data)
    network = fabricated.scene_student(splits, 0)
    return runs, fabricated.trial(runs.folder, question, 3, "pixel_kd", student=network), splits


@pytest.fixture
def _unwritten(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students are `Unwritten`; the parameter is `asks`."""
    monkeypatch.setattr("heterokd.students.registry.deployable", lambda _network: Unwritten(asks=request.param).eval())


@pytest.mark.thorough
@pytest.mark.usefixtures("_unwritten")
@pytest.mark.parametrize("_unwritten", [False], indirect=True)
def test_a_graph_of_any_size_that_cannot_be_saved_is_one_of_the_views_size(
    root: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    runs, made, splits = scene_trial(root)
    uri = log_student(runs, made, splits)
    assert re.search(r"'segformer-test_resnet' takes only images of 64 x 48 pixels \(torch.export .*\)", caplog.text)
    assert log_student(runs, made, splits) == uri
    assert len(runs.client.search_logged_models([runs.experiment_id])) == 1, "nothing unfinished is left"
    register(runs, made, uri, splits)
    version = runs.client.get_model_version_by_alias("scenes-student", "challenger")
    assert "Takes images of 64 x 48 pixels." in version.description
    with current(runs.uri):
        served, graph = mlflow.pyfunc.load_model(uri), mlflow.pytorch.load_model(uri)
    assert [tensor.shape for tensor in served.metadata.signature.inputs.inputs] == [(-1, 3, 64, 48)]
    assert [tensor.shape for tensor in served.metadata.signature.outputs.inputs] == [(-1, 11, 64, 48)]
    assert {len(graph(torch.rand(batch, 3, 64, 48))) for batch in (1, 5)} == {1, 5}


@pytest.mark.thorough
@pytest.mark.usefixtures("_unwritten")
@pytest.mark.parametrize("_unwritten", [True], indirect=True)
def test_a_student_that_cannot_be_exported_ends_no_search(root: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    runs, made, splits = scene_trial(root)
    with pytest.raises(NetworkError, match=r"torch.export cannot export network 'segformer-test_resnet' \(.+\); use"):
        log_student(runs, made, splits)
    caplog.clear()
    summary = fabricated.summary(fabricated.ranked(3, mean=0.31))
    assert _registered(runs.experiment, runs.folder, summary, runs) is None
    assert "the best student, a segformer-test_resnet, is not registered (" in caplog.text
    assert runs.finish(summary)
    assert {run.info.status for run in all_runs(runs).values()} == {"FINISHED"}
    assert not runs.client.search_logged_models([runs.experiment_id])
    files = {file.path for file in runs.client.list_artifacts(all_runs(runs)["003-pixel_kd"].info.run_id, "weights")}
    assert f"weights/{made.weights.name}" in files, "its weights are kept all the same"


@contextmanager
def served(root: Workspace) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, environment = ui_command(root, port, open_store(root, None))
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        else:
            pytest.fail("no answer in a minute")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.thorough
def test_the_pages_answer_and_take_runs_over_http(root: Workspace) -> None:
    question = fabricated.experiment()
    folder = fabricated.study(root, question)
    made = fabricated.trial(folder, question, 0, status="running", epochs=1)
    with served(root) as uri:
        assert open_store(root, uri + "/") == uri
        runs = StudyRuns(question, folder, uri, root.artifacts)
        assert runs.sync(made)
        fabricated.change(made, status="complete")
        assert runs.finish(fabricated.summary(fabricated.ranked(0, mean=0.1)))
    started = time.monotonic()
    assert not runs.sync(made)
    assert time.monotonic() - started < 10
    found = all_runs(project(root))
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert steps(project(root), found["000-kd"], "val/top1") == [1]
    assert list(root.artifacts.rglob("recipe.yaml"))


def test_the_pages_of_a_server_are_its_own(root: Workspace) -> None:
    with pytest.raises(TrackingError, match="open it in a browser"):
        ui_command(root, 5000, "http://127.0.0.1:5000")
