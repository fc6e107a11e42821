"""A workspace that is moved or copied: its artifacts are found at the present place, and the old one is left alone."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import fabricated
import mlflow
import pytest
from golden_files import GOLDEN, PREFIX
from mlflow import MlflowClient

from heterokd.errors import CheckpointError, TrackingError
from heterokd.storage.workspace import Workspace
from heterokd.students.download import download_student
from heterokd.tracking.relocate import RECORDS, local_path
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import current, open_store


def runs_of(root: Workspace, uri: str | None = None, name: str = "tiny") -> StudyRuns:
    question = fabricated.experiment(name)
    return StudyRuns(question, root.study(name), open_store(root, uri), root.artifacts)


def with_a_trial(root: Workspace, uri: str | None = None, name: str = "tiny") -> StudyRuns:
    runs = runs_of(root, uri, name)
    fabricated.study(root, runs.experiment)
    trial = fabricated.trial(runs.folder, runs.experiment, 0)
    assert runs.sync(trial)
    runs.client.log_text(runs.run_id(trial), "old", "weights/student.json")
    return runs


def recorded(root: Workspace) -> list[Path]:
    """All recorded locations of artifacts."""
    with closing(sqlite3.connect(root.mlflow_database)) as store:
        rows = [row for table, column in RECORDS for row in store.execute(f"SELECT {column} FROM {table}")]
    return [path for (location,) in rows if (path := local_path(location)) is not None]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check_place(root: Workspace) -> None:
    """The study goes on here: what was logged is read, and what is logged lies here."""
    runs = runs_of(root)
    run = runs.run_id(runs.folder.trial(0))
    uri = f"runs:/{run}/weights/student.json"
    assert mlflow.artifacts.load_text(runs.client.get_run(run).info.artifact_uri + "/weights/student.json") == "old"
    with current(runs.uri):
        assert mlflow.artifacts.load_text(uri) == "old"
    again = fabricated.trial(runs.folder, runs.experiment, 1)
    assert runs.sync(again)
    assert (root.artifacts / runs.run_id(again) / "artifacts/recipe.yaml").is_file()
    assert all(path.is_relative_to(root.artifacts.resolve()) for path in recorded(root))


def test_a_moved_workspace_goes_on_at_its_new_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = fabricated.root_with_store(tmp_path)
    with_a_trial(old)
    new = Workspace(tmp_path / "elsewhere" / "a ?%20ä")
    new.path.parent.mkdir()
    old.path.rename(new.path)
    with caplog.at_level(logging.WARNING):
        check_place(new)
    (line,) = [record.getMessage() for record in caplog.records if "moved or copied" in record.getMessage()]
    assert f"from {old.artifacts} to {new.artifacts}" in line
    assert not old.path.exists()


def test_a_copy_leaves_the_original_alone(tmp_path: Path) -> None:
    old = fabricated.root_with_store(tmp_path)
    with_a_trial(old)
    new = Workspace(tmp_path / "copy")
    shutil.copytree(old.path, new.path)
    before = content(old.path)
    check_place(new)
    assert content(old.path) == before
    check_place(old)


def test_an_experiment_without_runs_moves_too(tmp_path: Path) -> None:
    old = fabricated.root_with_store(tmp_path)
    runs = runs_of(old)
    runs._mlflow_experiment()
    new = Workspace(tmp_path / "elsewhere")
    old.path.rename(new.path)
    with_a_trial(new)
    check_place(new)
    assert not old.path.exists()


def test_another_workspace_in_the_same_store_keeps_its_place(tmp_path: Path) -> None:
    ours = fabricated.root_with_store(tmp_path)
    with_a_trial(ours)
    other = Workspace(tmp_path / "other")
    runs = with_a_trial(other, f"sqlite:///{ours.mlflow_database}", "others")
    open_store(ours, None)
    assert runs.client.get_experiment_by_name("others").artifact_location == other.artifacts.as_uri()
    assert runs.client.get_experiment_by_name("tiny").artifact_location == ours.artifacts.as_uri()


@pytest.mark.parametrize("is_copied", [False, True], ids=["moved", "copied"])
def test_with_a_store_elsewhere_nothing_is_written_to_the_old_place(
    tmp_path: Path, is_copied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store = fabricated.root_with_store(tmp_path)
    uri = f"sqlite:///{store.mlflow_database}"
    old, new = Workspace(tmp_path / "old"), Workspace(tmp_path / "new")
    with_a_trial(old, uri)
    before = content(old.path)
    shutil.copytree(old.path, new.path)
    if not is_copied:
        shutil.rmtree(old.path)
    runs = runs_of(new, uri)
    again = fabricated.trial(runs.folder, runs.experiment, 1)
    assert not runs.sync(again)
    with pytest.raises(TrackingError, match="move it back, or choose another tracking") as caught:
        runs.run_id(again)
    for path in (old.artifacts, runs.folder.path):
        assert str(path) in str(caught.value)
        assert str(path) in caplog.text
    assert (content(old.path) if is_copied else {}) == (before if is_copied else content(old.path))
    assert old.path.exists() == is_copied


def test_the_default_experiment_lies_in_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = fabricated.root_with_store(tmp_path)
    question = fabricated.experiment("Default")
    runs = StudyRuns(question, root.study("Default"), open_store(root, None), root.artifacts)
    assert runs.sync(fabricated.trial(runs.folder, question, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert len(list(root.artifacts.glob("0/*/artifacts/recipe.yaml"))) == 1


def test_models_of_a_moved_workspace_are_loaded_and_downloaded(tmp_path: Path) -> None:
    with tarfile.open(GOLDEN / "finished.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    root = Workspace(tmp_path / "runs")
    assert any(str(path).startswith(PREFIX) for path in recorded(root))
    uri = open_store(root, None)
    with current(uri):
        mlflow.pytorch.load_model("models:/digits-student@champion")
    found = download_student(uri, "models:/digits-student@champion", tmp_path)
    assert (found.folder / "student.safetensors").is_file()
    version = MlflowClient(uri).get_model_version_by_alias("digits-student", "champion")
    place = MlflowClient(uri).get_model_version_download_uri("digits-student", version.version)
    assert local_path(place).is_relative_to(root.artifacts)
    shutil.rmtree(root.artifacts)
    with pytest.raises(CheckpointError, match="restore the store's artifacts in ") as caught:
        download_student(uri, "models:/digits-student@champion", tmp_path)
    assert place in str(caught.value)
    assert "remove" not in str(caught.value)
