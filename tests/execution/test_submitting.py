"""`ray job submit`, as docs/cluster.md says it, on a Ray that asks for a token: what it opens, and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import psutil
import pytest
from listening import listening, reached_from_outside
from object_store import free_port
from own_ray import RAY, ray_head

import heterokd
from heterokd.storage.workspace import Workspace
from heterokd.tracking.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.ray]
Write = Callable[..., Path]

CANARIES = {
    "RAY_AUTH_TOKEN": "canary-of-ray-0123456789abcdef0123456789abcdef",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
    "AWS_SECRET_ACCESS_KEY": "canary-of-aws",
}
IN_ADDRESS = "canary-in-address"


@contextmanager
def pages(folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    """`heterokd ui`: MLflow's pages, which also are the cluster's tracking server here."""
    port = free_port()
    open_store(Workspace(folder), None)
    command = [sys.executable, "-m", "heterokd", "ui", "--port", str(port), "--root", str(folder)]
    with (folder / "pages.log").open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "pages.log").read_text()
                assert time.monotonic() < until, "MLflow's pages do not come"
                time.sleep(0.2)
        yield port, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait(60)


def test_a_submitted_search_opens_nothing_and_leaves_no_secret(tiny_file: Write, tmp_path: Path) -> None:
    submitted, root, tracked = tmp_path / "submitted", Workspace(tmp_path / "runs"), tmp_path / "tracked"
    tracked.mkdir()
    # The folder that is submitted: the code, told from what is installed by its version, and the experiment.
    shutil.copytree(PACKAGE, submitted / "heterokd", ignore=shutil.ignore_patterns("__pycache__"))
    first = submitted / "heterokd/__init__.py"
    text = first.read_text()
    assert f'"{heterokd.__version__}"' in text
    first.write_text(text.replace(f'"{heterokd.__version__}"', f'"{heterokd.__version__}+submitted"'))
    settings = {"space": {"methods": ["kd"]}, "trials": 2, "confirm_leaders": 0, "prune": False}
    shutil.copy(tiny_file(name="sent", search=settings, training={"epochs": 8}), submitted / "tiny.yaml")

    with pages(tracked) as (port, server):
        secrets = {**CANARIES, "RAY_AUTH_MODE": "token", "MLFLOW_TRACKING_USERNAME": "someone"}
        address = f"http://someone:{IN_ADDRESS}@127.0.0.1:{port}"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**secrets, "MLFLOW_TRACKING_URI": address, "HETEROKD_ROOT": str(root.path), "PATH": path}
        with ray_head(cpus=1, pages=True, environment=environment) as head:
            command = [*RAY, "job", "submit", "--address", head.dashboard, "--working-dir", str(submitted), "--"]
            command += ["heterokd", "search", "tiny.yaml", "--address", "auto", "--resume", "--json"]
            with (tmp_path / "job.log").open("wb") as output:
                submitting = subprocess.Popen(command, env=head.environment, stdout=output, stderr=output)
            sockets: dict[str, str] = {}
            looks = 0
            while submitting.poll() is None:
                if any(trial.status == "running" for trial in root.study("sent").trials()):
                    looks += 1
                    below = [psutil.Process(head.process.pid), *head.processes()]
                    sockets |= listening([*below, server, *server.children(recursive=True)])
                time.sleep(0.5)
            said = (tmp_path / "job.log").read_text()
            assert submitting.returncode == 0, said[-4000:]
            shutil.copytree(head.folder, tmp_path / "ray", symlinks=True, ignore=_sockets)

            refused = subprocess.run(
                [*RAY, "job", "list", "--address", head.dashboard],
                env={**head.environment, "RAY_AUTH_TOKEN": "another-token-0123456789abcdef012345"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert refused.returncode != 0, refused.stdout

    # The submitted code ran, and finished.
    assert f"{heterokd.__version__}+submitted" in root.study("sent").report.read_text()
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert found["standing"]["complete"] == 2
    assert found["tracking"] == f"http://***@127.0.0.1:{port}"
    client = mlflow.MlflowClient(f"sqlite:///{tracked}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'sent'")
    assert len(client.search_runs([experiment.experiment_id])) == 3

    # While it ran, nothing listened but on loopback.
    assert looks
    names = " ".join(sockets.values())
    assert all(name in names for name in ("gcs_server", "raylet", "mlflow", "dashboard"))
    assert reached_from_outside(sockets) == {}

    # What it leaves: study, MLflow's store and artifacts, logs of the job, of MLflow and of Ray.
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for wanted in ("report.html", "mlflow.db", "job.log", "ui.log", "gcs_server.out", "experiment.yaml"):
        assert wanted in {path.name for path in files}
    told = {
        (name, str(path.relative_to(tmp_path)))
        for path in files
        for name, canary in {**CANARIES, "address": IN_ADDRESS}.items()
        if canary.encode() in path.read_bytes()
    }
    assert told == set()


PACKAGE = Path(heterokd.__file__).parent


def _sockets(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if (Path(folder) / name).is_socket() or name == "runtime_resources"}
