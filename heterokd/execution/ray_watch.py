"""Watch the processes that a connected Ray cannot do without: the GCS, and the raylet of this node.

Ray itself notices the death of a raylet after a quarter of a minute. Without the GCS it waits for a minute and then
ends this process, whatever it does.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil

from heterokd.execution.ray_settings import ray
from heterokd.storage.machine_load import under_load

WATCH_SECONDS = 1.0
"""Interval of the checks, and timeout of a connection."""

LOCAL_PATIENCE = 3
"""Failed checks in a row after which a process of a local Ray is lost: nothing starts it again."""

CLUSTER_PATIENCE = 40
"""The same for a cluster, where an operator may start the GCS again within Ray's minute."""

GIVE_UP_SECONDS = 30.0
"""Time that the main thread has to leave Ray once a process is lost; it may wait for Ray for ever.

The load of the machine does not prolong it: a minute after the GCS has died, Ray ends this process without a sentence.
"""

Probe = Callable[[], bool]
"""Returns whether a process answers."""

logger = logging.getLogger(__name__)


class RayLost(BaseException):
    """A process of Ray has died, without which nothing goes on.

    Not an `Exception`, after which Tune would wait for its actors, which cannot answer.
    """

    def __init__(self, process: str) -> None:
        super().__init__(f"Ray's {process} does not answer any more (it was killed, or has crashed)")


class RayWatch:
    """Thread that checks whether processes answer; a context manager, which ends the thread.

    Attributes:
        lost: name of the process that does not answer any more; None while all do.
    """

    def __init__(self, sentence: Callable[[RayLost], str], interval: float = WATCH_SECONDS) -> None:
        """Watch nothing yet; `sentence` formats the message if this process can only be ended."""
        self.lost: str | None = None
        self._sentence, self._interval = sentence, interval
        self._probes: Mapping[str, Probe] = {}
        self._patience, self._raylet = 1, 0
        self._failed: dict[str, int] = {}
        self._is_left, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="ray-watch", daemon=True)

    def __enter__(self) -> RayWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.lost is not None and self._raylet:
            end_workers(self._raylet)

    def start(self, probes: Mapping[str, Probe], patience: int, raylet: int = 0) -> None:
        """Start the thread.

        Args:
            probes: the checks, by the name of the process.
            patience: number of failed checks in a row after which a process is lost.
            raylet: id of the process of a local Ray's raylet, whose workers are ended once a process is lost; 0: none.
        """
        self._probes, self._patience, self._raylet = probes, patience, raylet
        self._thread.start()

    def add(self, probes: Mapping[str, Probe]) -> None:
        """Add checks, or replace those of the same name."""
        self._probes = {**self._probes, **probes}

    def leave(self) -> None:
        """End the checks, before Ray's processes are ended in order."""
        self._is_left.set()

    def check(self) -> None:
        """Check every process once."""
        for name, answers in self._probes.items():
            self._failed[name] = 0 if answers() else self._failed.get(name, 0) + 1
            if self._failed[name] >= self._patience:
                self.lost = self.lost or name

    def raise_if_dead(self) -> None:
        """Check until all processes answer or one is lost, after an exception that its death may have caused.

        Raises:
            RayLost: a process does not answer any more.
        """
        for _ in range(self._patience):
            self.check()
            if self.lost is not None or not any(self._failed.values()):
                break
            time.sleep(self._interval)
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raise `RayLost` if a process does not answer any more."""
        if self.lost is not None:
            raise RayLost(self.lost)

    def _work(self) -> None:
        while self.lost is None and not self._is_left.wait(self._interval):
            self.check()
        if self.lost is not None and not self._is_over.wait(GIVE_UP_SECONDS):
            # Ray would end this process soon, too, without a word.
            logger.error("error: %s", self._sentence(RayLost(self.lost)))
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            if self._raylet:
                end_workers(self._raylet)
            os._exit(1)


@contextmanager
def watching(watch: RayWatch, address: str | None) -> Iterator[None]:
    """Watch the connected Ray; `address`: that of its cluster, None if it is a local Ray.

    Raises:
        RayLost: an exception of the block has the death of a process as its cause.
    """
    node = ray._private.worker._global_node
    local = node.all_processes if address is None and node is not None else {}
    raylet = local["raylet"][0].process.pid if "raylet" in local else 0
    # First the process of a local GCS: the other probes ask it for an address, which it may not answer.
    first = {"GCS": lambda: local["gcs_server"][0].process.poll() is None} if "gcs_server" in local else {}
    watch.start(first, LOCAL_PATIENCE if raylet else CLUSTER_PATIENCE, raylet)
    try:
        watch.add(_probes())
        yield
    except Exception:
        watch.raise_if_dead()
        raise
    finally:
        watch.leave()


def listens(host: str, port: int) -> bool:
    """Whether a process listens at an address."""
    try:
        socket.create_connection((host, port), timeout=under_load(WATCH_SECONDS)).close()
    except OSError:
        return False
    return True


def end_workers(raylet: int) -> None:
    """Kill the workers of a raylet: they outlive it for a while, and would train what is started again."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("RAY_RAYLET_PID") == str(raylet):
                process.kill()


@contextmanager
def starting(logs: str, interval: float = WATCH_SECONDS) -> Iterator[None]:
    """Watch the GCS that the block starts, without which `ray.init` may wait until Ray ends this process.

    Args:
        logs: folder of Ray's logs, for the message.
        interval: of the checks.
    """
    advice = f"see its logs in {logs}, and run the command again (--resume continues the search of a study)"
    ended = f"error: a local Ray did not start: it ended this process, or something else did; {advice}"
    with _printed_if_ended(ended) as disarm:

        def sentence(lost: RayLost) -> str:
            disarm()
            return f"a local Ray did not start ({lost}); {advice}"

        with RayWatch(sentence, interval) as watch:
            watch.start({"GCS": new_gcs()}, LOCAL_PATIENCE)
            yield


@contextmanager
def _printed_if_ended(sentence: str) -> Iterator[Callable[[], object]]:
    """Print a sentence if this process ends during the block; yields a function after which it is not printed.

    Ray's library calls `_exit` where the raylet does not answer the registration of this process. Python runs nothing
    then, so a shell waits for the end of a pipe that only this process holds.
    """
    command = ["/bin/sh", "-c", 'read -r line || printf "%s\\n" "$1" >&2', "sh", sentence]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as shell:

        def disarm() -> None:
            # A signal to the whole group, such as Ctrl-C, has ended the shell.
            with suppress(OSError, ValueError):
                shell.communicate("\n")

        try:
            yield disarm
        finally:
            disarm()


def new_gcs() -> Probe:
    """Return a probe of the GCS that this process starts from now on; it answers before its start, too."""
    known = {process.pid for process in _own_gcs()}
    started: list[psutil.Process] = []

    def answers() -> bool:
        if not started:
            started.extend(process for process in _own_gcs() if process.pid not in known)
        try:
            return not started or (started[0].is_running() and started[0].status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return answers


def _own_gcs() -> list[psutil.Process]:
    """Return the GCS processes that this process has started, also those that ended and are not reaped."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if process.name() == "gcs_server":
                found.append(process)
    return found


def _probes() -> dict[str, Probe]:
    """Return the probes of the GCS and of this node's raylet; none over Ray Client, which keeps its own connection."""
    if ray.util.client.ray.is_connected():
        return {}
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    probes: dict[str, Probe] = {"GCS": lambda: listens(host.strip("[]"), int(port))}
    here = ray.get_runtime_context().get_node_id()
    found = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["NodeID"] == here]
    if found:
        probes["raylet"] = lambda: listens(*found[0])
    return probes
