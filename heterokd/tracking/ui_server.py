"""MLflow's pages on this machine: a lean server that is watched over until it ends or its user has seen enough."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from heterokd.errors import TrackingError
from heterokd.storage.workspace import Root
from heterokd.tracking.store import shown

HOST = "127.0.0.1"
START_SECONDS = 120.0
"""Until the server answers; it takes 5 to 12 s on an idle machine of two cores."""
STOP_SECONDS = 10.0


def ui_command(root: Root, port: int, uri: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of MLflow's pages on this machine, in two processes instead of ten.

    Args:
        root: holds the artifacts.
        port: on 127.0.0.1.
        uri: what `open_store` returned.

    Raises:
        TrackingError: the store is a server, which has its own pages.
    """
    if uri.startswith("http"):
        raise TrackingError(f"tracking.uri: {shown(uri)} is a server and shows the runs itself; open it in a browser")
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", HOST, "--port", str(port)]
    command += ["--artifacts-destination", root.artifacts.resolve().as_uri()]
    environment = {
        **os.environ,
        # Not as an argument, which everybody on the machine sees: a database's address may hold a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    return command, environment


def serve(
    command: Sequence[str], environment: Mapping[str, str], port: int, log: Path, when_ready: Callable[[], None]
) -> None:
    """Run a server until it is interrupted; whatever ends this process's wait ends the server too.

    Args:
        command: of the server.
        environment: of its processes.
        port: on 127.0.0.1, where it will answer.
        log: takes what it prints.
        when_ready: called once, when it answers.

    Raises:
        TrackingError: it ended by itself, or does not answer in `START_SECONDS`.
        KeyboardInterrupt: the user, or a SIGTERM, ended it.
    """
    with log.open("wb") as file, _terminable():
        # A group of its own: Ctrl-C reaches this process alone, which ends the server's processes together.
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            _until_it_answers(server, port, log)
            when_ready()
            code = server.wait()
            raise TrackingError(f"MLflow's server ended by itself ({_ending(code)}): {_last_line(log)}; see {log}")
        finally:
            _stop(server)


def _until_it_answers(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        if server.poll() is not None:
            ending = _ending(server.returncode)
            raise TrackingError(f"MLflow's server did not start ({ending}): {_last_line(log)}; see {log}")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    raise TrackingError(f"MLflow's server does not answer on port {port} after {START_SECONDS:.0f} s; see {log}")


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    """What the server said last of itself; requests that it answered tell nothing."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line and " INFO:" not in line]
    return lines[-1][:200].rstrip(".") if lines else "it said nothing"


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its worker; the group outlives a leader that died."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


@contextmanager
def _terminable() -> Iterator[None]:
    """A SIGTERM ends the wait as Ctrl-C does, or the server would outlive it.

    Both signals, since a shell that runs this in the background has the first one ignored.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
