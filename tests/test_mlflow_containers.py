"""deploy/mlflow_containers.sh with a `docker` that only writes down what it is asked."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "deploy/mlflow_containers.sh"
DOCKER = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
if [ "$1 $2" = "container inspect" ]; then grep -q -- "--name $3 " "$CALLS"; fi
"""
AWS = """#!/usr/bin/env bash
printf 'aws %s\\n' "$*" >> "$CALLS"
echo 'postgresql+psycopg2://mlflow:from-the-secret@database.example.org:5432/mlflow'
"""


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def healthy() -> Iterator[int]:
    """The port of a server that answers as MLflow's does."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"docker": DOCKER, "aws": AWS}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "calls").touch()
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
    }


def run(environment: dict[str, str], port: int, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    command = ["bash", str(SCRIPT), "team/heterokd:1", "127.0.0.1", "s3://bucket/heterokd", str(port)]
    done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=False)
    return done, Path(environment["CALLS"]).read_text().splitlines()


def test_a_new_head_restores_before_it_serves(environment: dict[str, str], tmp_path: Path) -> None:
    with healthy() as port:
        done, calls = run(environment, port)
        assert done.returncode == 0, done.stderr
        assert f"MLflow answers at http://127.0.0.1:{port}" in done.stdout
        order = [
            "--name heterokd-postgres",
            "restore s3://bucket/heterokd/backups --if-empty",
            "dump s3://",
            "mlflow server",
        ]
        places = [next(i for i, call in enumerate(calls) if part in call) for part in order]
        assert places == sorted(places)
        assert "--publish 127.0.0.1:5432:5432" in calls[places[0]]
        assert "--restart unless-stopped" in calls[places[2]]
        uri = (tmp_path / ".heterokd/mlflow.env").read_text().splitlines()[0]
        password = uri.split(":")[2].split("@")[0]
        assert len(password) == 48
        assert password not in "\n".join(calls) + done.stdout + done.stderr
        for file in (tmp_path / ".heterokd").iterdir():
            assert file.stat().st_mode & 0o077 == 0
        again, more = run(environment, port)
        assert again.returncode == 0
        assert sum("--name heterokd-postgres" in call for call in more) == 1, "a running database stays"
        assert (tmp_path / ".heterokd/mlflow.env").read_text().splitlines()[0] == uri


def test_a_database_elsewhere_is_read_from_its_secret(environment: dict[str, str], tmp_path: Path) -> None:
    with healthy() as port:
        done, calls = run(environment, port, DATABASE_SECRET="heterokd-mlflow")
    assert done.returncode == 0, done.stderr
    assert not [call for call in calls if "postgres:17" in call or "mlflow_backup" in call]
    assert "aws secretsmanager get-secret-value --secret-id heterokd-mlflow --query SecretString --output text" in calls
    assert "from-the-secret@database.example.org" in (tmp_path / ".heterokd/mlflow.env").read_text()
    assert "from-the-secret" not in "\n".join(calls)


def test_a_server_that_does_not_answer_is_reported(environment: dict[str, str]) -> None:
    with healthy() as port:
        pass
    done, _ = run(environment, port, POLLS="1")
    assert done.returncode == 1
    assert "docker logs heterokd-mlflow" in done.stderr
