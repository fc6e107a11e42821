"""Waits that decide something grow with the load of the machine; the others are listed here, with the reason."""

from __future__ import annotations

import ast
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import heterokd
from heterokd.errors import TrackingError
from heterokd.storage.machine_load import MOST, machine_load, under_load
from heterokd.tracking.store import PROBE_SECONDS, probe

PACKAGE = Path(heterokd.__file__).parent
ROOMS = ("storage", "teachers", "study", "tracking", "students", "execution")
ENDINGS = ("SECONDS", "PATIENCE")

FIXED = {
    "execution/answers.py": {"POLL_SECONDS": "an interval"},
    "execution/callbacks.py": {"WATCH_SECONDS": "an interval"},
    "execution/cache_builders.py": {"POLL_SECONDS": "an interval"},
    "execution/node_checks.py": {"CLOCK_SECONDS": "a difference of clocks"},
    "execution/node_watch.py": {"POLL_SECONDS": "an interval"},
    "execution/planning/time_steps.py": {"MOST_SECONDS": "a budget of a measurement"},
    "execution/ray_watch.py": {
        "LOCAL_PATIENCE": "a number of checks, each of which waits longer",
        "GIVE_UP_SECONDS": "Ray ends this process a minute after the GCS has died, whatever the load is",
        "CLUSTER_PATIENCE": "a number of checks; Ray ends this process after a minute, whatever the load is",
    },
    "execution/spot_notice.py": {
        "POLL_SECONDS": "an interval",
        "REQUEST_SECONDS": "the next request follows in seconds",
        "TOKEN_SECONDS": "the validity of a token",
    },
    "execution/study_sync.py": {"UPLOAD_SECONDS": "an interval", "RETRY_SECONDS": "a pause between attempts"},
    "execution/workers.py": {"PATIENCE_SECONDS": "hours, in which a trial is stopped"},
    "storage/disk.py": {"PATIENCE": "half an hour for a full disk", "POLL_SECONDS": "an interval"},
    "storage/filesystem.py": {"ABANDONED_SECONDS": "a day"},
    "storage/stored_data/node_copy.py": {"WAIT_SECONDS": "a pause between attempts"},
    "storage/sync.py": {"FOLLOW_SECONDS": "an interval"},
    "students/registry_lock.py": {
        "EXPIRES_SECONDS": "machines with different loads must agree on it; five renewals may be late",
        "RENEW_SECONDS": "an interval",
        "WAIT_SECONDS": "an hour for another promotion",
        "POLL_SECONDS": "an interval",
    },
}


def constants(tree: ast.Module) -> Iterator[str]:
    """Names of a module's numbers of seconds."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and target.id.endswith(ENDINGS):
                yield target.id


def grown(trees: dict[str, ast.Module]) -> set[str]:
    """Names that `under_load` gets, also those that a parameter with this default passes on."""
    found: set[str] = set()
    for tree in trees.values():
        passed: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "under_load":
                passed |= {
                    name.id for argument in node.args[:1] for name in ast.walk(argument) if isinstance(name, ast.Name)
                }
        found |= passed
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                positional = list(zip(node.args.args[::-1], node.args.defaults[::-1], strict=False))
                named = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
                for argument, default in positional + named:
                    if isinstance(default, ast.Name) and argument.arg in passed:
                        found.add(default.id)
    return found


def test_every_wait_grows_with_the_load_or_is_listed_with_the_reason_why_not() -> None:
    files = [file for room in ROOMS for file in sorted((PACKAGE / room).rglob("*.py"))]
    trees = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    named = grown(trees)
    fixed = {
        (name, constant)
        for name, tree in trees.items()
        for constant in constants(tree)
        if constant not in named or constant in FIXED.get(name, {})
    }
    assert fixed == {(name, constant) for name, listed in FIXED.items() for constant in listed}
    numbers = {
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "timeout" and isinstance(node.value, ast.Constant)
        if node.value.value
    }
    assert numbers == set()


def test_a_timeout_is_multiplied_by_the_processes_per_core_within_bounds() -> None:
    assert under_load(3.0, lambda: 0.0) == 3.0
    assert under_load(3.0, lambda: 10.0) == 30.0
    assert under_load(3.0, lambda: 1000.0) == 3.0 * MOST
    assert machine_load() == pytest.approx(os.getloadavg()[0] / (os.cpu_count() or 1), abs=1.0)


@contextmanager
def server(delay: float) -> Iterator[str]:
    """Address of an HTTP server that answers a request after a delay."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                time.sleep(delay)
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nOK")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize("load", [0.0, 10.0])
def test_a_slow_server_answers_on_a_busy_machine(load: float) -> None:
    with server(PROBE_SECONDS + 1.0) as address:
        if load:
            probe(address, load=lambda: load)
            return
        with pytest.raises(TrackingError, match="does not answer"):
            probe(address, load=lambda: load)
