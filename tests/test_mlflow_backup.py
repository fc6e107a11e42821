"""Backups of MLflow's database: a real PostgreSQL, dumped to a real S3 server, lost, and restored."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from object_store import free_port, s3_server
from sqlalchemy.engine import make_url

TOP = Path(__file__).parents[1]
SCRIPT = TOP / "deploy/mlflow_backup.py"
sys.path.insert(0, str(TOP / "deploy"))

import mlflow_backup  # noqa: E402

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
FIRST = datetime(2026, 11, 30, 3, tzinfo=UTC)


@contextmanager
def postgresql() -> Iterator[str]:
    """The URI of an empty database `mlflow` of a server of the test's own."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    programs = PROGRAMS[-1].parent
    # PostgreSQL's server does not run as root.
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="hkpg", dir="/tmp"))
    if user:
        shutil.chown(folder, "postgres", "postgres")
    port, data = free_port(), folder / "data"

    def run(*command: object) -> None:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False, cwd="/", **user
        )  # type: ignore[call-overload]
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run(programs / "initdb", "--pgdata", data, "--username", "mlflow", "--auth", "trust", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        run(programs / "pg_ctl", "start", "--wait", "-D", data, "-l", folder / "log", "-o", options)
        try:
            run(programs / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "mlflow", "mlflow")
            yield f"postgresql+psycopg2://mlflow:unused@127.0.0.1:{port}/mlflow"
        finally:
            run(programs / "pg_ctl", "stop", "-D", data, "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


REGISTER = """
import sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1], sys.argv[1])
run = client.create_run(client.create_experiment("digits", artifact_location="s3://state/artifacts"))
client.log_metric(run.info.run_id, "val/top1", 0.97)
client.create_registered_model("digits-student")
client.create_model_version("digits-student", "s3://state/artifacts/student", run.info.run_id)
client.set_registered_model_alias("digits-student", "champion", "1")
"""
READ = """
import sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1], sys.argv[1])
version = client.get_model_version_by_alias("digits-student", "champion")
print(version.version, version.source, client.get_run(version.run_id).data.metrics["val/top1"])
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_registry_comes_back_after_its_disk_is_lost(tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3.log") as store:
        with postgresql() as uri:
            environment = {**store, "MLFLOW_BACKEND_STORE_URI": uri}
            done = python("-c", REGISTER, uri, **environment)
            assert done.returncode == 0, done.stderr
            written = python(str(SCRIPT), "dump", "s3://state/heterokd/backups", **environment)
            assert written.returncode == 0, written.stderr
            assert "wrote s3://state/heterokd/backups/mlflow-20" in written.stdout
            full = python(str(SCRIPT), "restore", "s3://state/heterokd/backups", **environment)
            assert full.returncode == 2
            assert "tables; restore into an empty database" in full.stderr
            kept = python(str(SCRIPT), "restore", "s3://state/heterokd/backups", "--if-empty", **environment)
            assert (kept.returncode, "nothing restored" in kept.stdout) == (0, True)
        with postgresql() as uri:
            environment["MLFLOW_BACKEND_STORE_URI"] = uri
            restored = python(str(SCRIPT), "restore", "s3://state/heterokd/backups", "--if-empty", **environment)
            assert restored.returncode == 0, restored.stderr
            found = python("-c", READ, uri, **environment)
            assert found.stdout.split() == ["1", "s3://state/artifacts/student", "0.97"], found.stderr


@pytest.mark.thorough
def test_old_backups_go_and_a_broken_one_leaves_the_database_empty(tmp_path: Path) -> None:
    with postgresql() as uri:
        url = make_url(uri)
        mlflow_backup.run("psql", "--command=CREATE TABLE runs AS SELECT 7 AS value", url=url)
        names = [mlflow_backup.dump(url, str(tmp_path), 2, FIRST + timedelta(days=day)) for day in range(3)]
        assert sorted(file.name for file in tmp_path.iterdir()) == names[1:]
        mlflow_backup.run("psql", "--command=DROP TABLE runs", url=url)
        (tmp_path / names[2]).write_bytes((tmp_path / names[1]).read_bytes()[:-40])
        with pytest.raises(mlflow_backup.BackupError, match="pg_restore failed"):
            mlflow_backup.restore(url, str(tmp_path), None)
        assert mlflow_backup.tables(url, 0) == 0
        with pytest.raises(mlflow_backup.BackupError, match=r"holds no backup other; it holds mlflow-.*, mlflow-"):
            mlflow_backup.restore(url, str(tmp_path), "other")
        assert mlflow_backup.restore(url, str(tmp_path), names[1]) == names[1]
        assert mlflow_backup.run("psql", "--tuples-only", "--command=SELECT value FROM runs", url=url).strip() == "7"


@pytest.mark.parametrize("command", ["dump", "restore"])
def test_without_a_database_it_says_what_to_set(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:///runs/mlflow.db")
    assert mlflow_backup.main([command, "backups"]) == 2
    assert "MLFLOW_BACKEND_STORE_URI is no address of a PostgreSQL database" in capsys.readouterr().err


def test_an_absent_server_is_reported_after_the_wait(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"postgresql://mlflow:hidden@127.0.0.1:{free_port()}/mlflow"
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", uri)
    assert mlflow_backup.main(["restore", "backups", "--wait", "0"]) == 2
    told = capsys.readouterr().err
    assert "psql" in told
    assert "hidden" not in told
