"""Processes of Ray that die are noticed; `test_search_faults.py` kills real ones."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from heterokd.execution.ray_watch import RayLost, RayWatch, end_workers, listens, new_gcs


def watch(interval: float = 60.0) -> RayWatch:
    return RayWatch(lambda lost: str(lost), interval)


def until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.01)


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_process_is_lost_after_failed_checks_in_a_row() -> None:
    answers = iter([True, False, False, True, False, False, False])
    with watch() as watching:
        watching.start({"GCS": lambda: next(answers), "raylet": lambda: True}, patience=3)
        for _ in range(6):
            watching.check()
            watching.raise_if_lost()
        watching.check()
        with pytest.raises(RayLost, match="Ray's GCS does not answer any more"):
            watching.raise_if_lost()


def test_after_an_exception_a_process_that_does_not_answer_is_asked_until_it_is_lost_or_answers() -> None:
    with watch(0.001) as watching:
        watching.start({"GCS": lambda: True}, patience=3)
        watching.raise_if_dead()
    answers = iter([False, False, True])
    with watch(0.001) as watching:
        watching._probes, watching._patience = {"GCS": lambda: next(answers)}, 3
        watching.raise_if_dead()
        assert list(answers) == []
        watching._probes = {"raylet": lambda: False}
        with pytest.raises(RayLost, match="raylet"):
            watching.raise_if_dead()


def test_the_thread_finds_a_socket_that_is_closed_and_names_the_first_process_that_is_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, watch(0.01) as watching:
        host, port = server.getsockname()
        watching.start({"raylet": lambda: listens(host, port), "GCS": lambda: True}, patience=2)
        time.sleep(0.1)
        assert watching.lost is None
        server.close()
        ends = time.monotonic() + 20
        while watching.lost is None and time.monotonic() < ends:
            time.sleep(0.01)
        assert watching.lost == "raylet"


def test_processes_that_are_ended_in_order_are_not_lost() -> None:
    alive = True
    with watch(0.01) as watching:
        watching.start({"GCS": lambda: alive}, patience=2)
        watching.leave()
        time.sleep(0.05)
        alive = False
        time.sleep(0.1)
        watching.raise_if_lost()


def test_a_gcs_that_ends_while_ray_starts_is_lost_and_an_earlier_is_not(tmp_path: Path) -> None:
    program = tmp_path / "gcs_server"
    shutil.copy(shutil.which("sleep") or "", program)
    with ending(subprocess.Popen([program, "60"])) as earlier:
        answers = new_gcs()
        earlier.kill()
        assert answers()  # nothing has been started since
        with ending(subprocess.Popen([program, "60"])) as gcs:
            until(lambda: psutil.Process(gcs.pid).name() == "gcs_server")
            assert answers()
            gcs.kill()
            until(lambda: not answers())


def test_a_start_that_waits_for_a_dead_gcs_ends_with_a_sentence(tmp_path: Path) -> None:
    program = tmp_path / "gcs_server"
    shutil.copy(shutil.which("sleep") or "", program)
    code = (
        "import subprocess, sys, time\nfrom heterokd.execution import ray_watch\n"
        "ray_watch.GIVE_UP_SECONDS = 0.2\n"
        f"with ray_watch.starting('/logs', 0.05):\n"
        f"    gcs = subprocess.Popen([{str(program)!r}, '60'])\n    time.sleep(0.5)\n    gcs.kill()\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: a local Ray did not start (Ray's GCS does not answer any more (it was killed, or has crashed)); see "
        "its logs in /logs, and run the command again (--resume continues the search of a study)\n"
    )


@pytest.mark.parametrize(("end", "code"), [("os._exit(1)", 1), ("os.kill(os.getpid(), 9)", -9)])
def test_a_process_that_ray_ends_while_it_starts_leaves_a_sentence(end: str, code: int) -> None:
    done = started(f"    {end}\n")
    assert done.returncode == code
    assert done.stderr == (
        "error: a local Ray did not start: it ended this process, or something else did; see its logs in /logs, and "
        "run the command again (--resume continues the search of a study)\n"
    )


@pytest.mark.parametrize("end", ["    pass\n", "    sys.exit(0)\n"])
def test_a_start_that_ends_in_order_prints_nothing(end: str) -> None:
    done = started(end)
    assert (done.returncode, done.stderr) == (0, "")


def started(block: str) -> subprocess.CompletedProcess[str]:
    code = f"import os, sys\nfrom heterokd.execution import ray_watch\nwith ray_watch.starting('/logs', 0.05):\n{block}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_nothing_is_watched_before_the_start() -> None:
    with watch() as watching:
        watching.check()
        watching.raise_if_lost()


def test_workers_of_a_lost_raylet_are_ended_and_no_others() -> None:
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    raylet = 2**22 + os.getpid()  # no process has this id
    mine, other = (
        subprocess.Popen(program, env={**os.environ, "RAY_RAYLET_PID": str(each)}) for each in (raylet, raylet + 1)
    )
    try:
        end_workers(raylet)
        assert mine.wait(20) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
