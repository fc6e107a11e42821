"""Run `mlflow server` on this machine until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from heterokd.errors import TrackingError, without_password
from heterokd.storage.machine_load import under_load
from heterokd.storage.workspace import Workspace

HOST = "127.0.0.1"
START_SECONDS = 120.0
"""Timeout of the server's start, which takes 5 to 12 s on two idle cores."""
ANSWER_SECONDS = 2.0
"""Timeout of an answer of the started server."""
STOP_SECONDS = 10.0
"""Time that the server has to stop by itself. All three are longer on a busy machine."""


def ui_command(root: Workspace, port: int, uri: str) -> tuple[list[str], dict[str, str]]:
    """Build the command and the environment of `mlflow server`, with two processes instead of ten.

    Args:
        root: workspace with the artifacts.
        port: port on 127.0.0.1.
        uri: URI that `open_store` returned.

    Raises:
        TrackingError: the store is a server, which shows the runs itself.
    """
    if uri.startswith("http"):
        raise TrackingError(
            f"tracking.uri: {without_password(uri)} is a server and shows the runs itself; open it in a browser"
        )
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", HOST, "--port", str(port)]
    command += ["--artifacts-destination", root.artifacts.resolve().as_uri()]
    environment = {
        **os.environ,
        # Not as an argument, which every user of the machine can read: a database's address may hold a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    return command, environment


def serve(
    command: Sequence[str], environment: Mapping[str, str], port: int, log: Path, when_ready: Callable[[], None]
) -> None:
    """Run a server until it is interrupted.

    Args:
        command: command of the server.
        environment: environment of the server.
        port: port of the server on 127.0.0.1.
        log: file for the server's output.
        when_ready: called when the server answers.

    Raises:
        TrackingError: the server exited, or does not answer in `START_SECONDS`.
        KeyboardInterrupt: the user stopped it.
    """
    with log.open("wb") as file:
        # In a separate process group: Ctrl-C reaches only this process, which then stops all processes of the server.
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            began = time.monotonic()
            while server.poll() is None and not _answers(port):
                if time.monotonic() - began > under_load(START_SECONDS):
                    raise TrackingError(f"MLflow's server does not answer on port {port}; see {log}")
                time.sleep(0.2)
            if server.returncode is None:
                when_ready()
            raise TrackingError(f"MLflow's server exited with code {server.wait()}; see {log}")
        finally:
            _stop(server)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=under_load(ANSWER_SECONDS)):
            return True
    except OSError:
        return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server's process group, which outlives a leader that died."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(under_load(STOP_SECONDS))
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
