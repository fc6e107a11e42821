"""Roots with characters that mean something in a URL, a pattern or a format keep all their files inside."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import fabricated
import mlflow
import optuna
import pytest
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url

from heterokd.storage.sqlite_url import mlflow_sqlite_uri, sqlite_file_uri, sqlite_url
from heterokd.study.importance import importances
from heterokd.study.storage import StudyFacts, open_database
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import existing_store, open_store

NAMES = ["a?b", "a%20b", "a%", "a b", "äöü", "a#b", "a&b;c", "o'brien", '"', "{x}", "{SCHEMA_VERSION}", "a+b", "a:b@c"]
NAMES += ["%3F", "%2F", "[a]", "$HOME", "~", "-", "\\", "名前", "a\nb", "a=b,c", "file:x", "%(here)s", "x" * 255]
WORST = "a?b %20c#ä&;'\"{x}[bold]$HOME+@:\\%"


@pytest.mark.parametrize("name", NAMES)
def test_a_url_opens_the_file_that_it_was_made_of(tmp_path: Path, name: str) -> None:
    file = tmp_path / name / "x.db"
    file.parent.mkdir()
    for url in (sqlite_url(file), mlflow_sqlite_uri(file)):
        assert make_url(url).database == str(file)
        assert url.format(SCHEMA_VERSION=12) == url, "Optuna formats it"
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE x (y)")
    engine = create_engine(sqlite_url(file, read_only=True))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT name FROM sqlite_master").all() == [("x",)]
        with pytest.raises(Exception, match="readonly"):
            connection.exec_driver_sql("DROP TABLE x")
    engine.dispose()
    with closing(sqlite3.connect(sqlite_file_uri(file), uri=True)) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("x",)]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_root_of_any_name_keeps_its_databases_and_artifacts_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    place = tmp_path / "parent" / WORST
    place.mkdir(parents=True)
    root = fabricated.root_with_store(place)
    question = fabricated.experiment()
    folder = fabricated.study(root, question)
    study = open_database(question, folder, StudyFacts())
    study.add_trial(optuna.create_trial(value=0.5, user_attrs={}))
    uri = existing_store(root, None)
    assert open_store(root, uri) == uri, "its own URI, as MLFLOW_TRACKING_URI would hold it"
    runs = StudyRuns(question, folder, uri, root.artifacts)
    trial = fabricated.trial(folder, question, 0)
    assert runs.sync(trial)
    run = runs.client.get_run(runs.run_id(trial))
    assert Path(local_file_uri_to_path(run.info.artifact_uri)).is_relative_to(root.artifacts.resolve())
    runs.client.log_artifact(run.info.run_id, str(trial.path / "recipe.yaml"), "weights")
    got = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="weights", dst_path=str(tmp_path / "got"), tracking_uri=uri
    )
    assert (Path(got) / "recipe.yaml").read_bytes() == (trial.path / "recipe.yaml").read_bytes()
    assert importances(folder)[0].trials == 0
    assert folder.database.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "got", "parent"]
    assert [path.name for path in place.parent.iterdir()] == [WORST]
    assert not list(elsewhere.iterdir())
