"""Lock of a registered model, for all that use the same registry, on any machine and in any workspace.

MLflow has no compare-and-set. The lock is Lamport's bakery algorithm ("A New Solution of Dijkstra's Concurrent
Programming Problem", 1974), which needs only values that each process writes for itself and all can read: each waiting
process has a tag of the registered model, with a ticket that is larger than those it saw; the smallest is served first.

Limits: a tag that its process has not renewed for `EXPIRES_SECONDS` does not count, so the clocks of the machines must
agree to within a minute, and a process that was suspended for longer than that may no longer hold the lock. Programs
that change aliases without this lock (MLflow's UI) are not held up.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

import psutil
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from heterokd.errors import TrackingError
from heterokd.storage.typed_json import parse
from heterokd.tracking.labels import is_alive

logger = logging.getLogger(__name__)

PREFIX = "heterokd.lock."
EXPIRES_SECONDS = 300.0
"""Time after which a tag that is not renewed no longer counts: its process has died on another machine."""
RENEW_SECONDS = 60.0
WAIT_SECONDS = 3600.0
"""Maximum time to wait: the others evaluate students on test images."""
POLL_SECONDS = 0.2
CHOOSING = 0
"""Ticket of a process that reads the others' tickets."""


@dataclass(frozen=True)
class Ticket:
    """Value of a tag.

    Attributes:
        ticket: place in the queue; `CHOOSING` before it is known.
        expires: time in seconds since 1970 after which it does not count.
        host: machine of its process.
        pid: id of its process.
        started: start of its process, in seconds since 1970.
    """

    ticket: int
    expires: float
    host: str
    pid: int
    started: float

    @property
    def counts(self) -> bool:
        """Whether its process may still hold the lock or wait for it."""
        if self.host == socket.gethostname():
            return is_alive({"heterokd.pid": str(self.pid), "heterokd.started": str(self.started)})
        return self.expires > time.time()


_of_this_process: set[str] = set()
"""Keys of the calls that run in this process; another tag of it was left because the registry did not answer."""


class _Queue:
    """Tags of a registered model; `key` is that of this call."""

    def __init__(self, client: MlflowClient, name: str) -> None:
        self._client, self._name = client, name
        self.key = f"{PREFIX}{uuid.uuid4().hex}"
        started = psutil.Process().create_time()
        self._mine = Ticket(CHOOSING, 0.0, socket.gethostname(), os.getpid(), started)
        _of_this_process.add(self.key)

    def write(self, ticket: int | None = None) -> None:
        """Write this process's ticket, or renew it."""
        place = self._mine.ticket if ticket is None else ticket
        self._mine = replace(self._mine, ticket=place, expires=time.time() + EXPIRES_SECONDS)
        self._client.set_registered_model_tag(self._name, self.key, json.dumps(asdict(self._mine)))

    def others(self) -> Mapping[str, Ticket]:
        """Return the tickets of other processes that count; remove the others."""
        found: dict[str, Ticket] = {}
        for key, value in self._client.get_registered_model(self._name).tags.items():
            if not key.startswith(PREFIX) or key == self.key:
                continue
            ticket = _parsed(value)
            if ticket is not None and ticket.counts and (key in _of_this_process or not self._is_ours(ticket)):
                found[key] = ticket
            else:
                with suppress(MlflowException):  # another process may have removed it
                    self._client.delete_registered_model_tag(self._name, key)
        return found

    def _is_ours(self, ticket: Ticket) -> bool:
        mine = self._mine
        return (ticket.host, ticket.pid, ticket.started) == (mine.host, mine.pid, mine.started)

    def before(self) -> list[Ticket]:
        """Return the tickets of the processes that come first, or may do so."""
        mine = (self._mine.ticket, self.key)
        return [other for key, other in self.others().items() if (other.ticket, key) < mine]

    def leave(self) -> None:
        """Remove this call's tag; without an answer, it expires."""
        _of_this_process.discard(self.key)
        with suppress(MlflowException):
            self._client.delete_registered_model_tag(self._name, self.key)


@contextmanager
def locked_model(client: MlflowClient, name: str, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of a registered model, which exists; see the module's docstring.

    Raises:
        TrackingError: another process holds it for longer than `wait_seconds`.
        MlflowException: the registry does not answer.
    """
    queue = _Queue(client, name)
    try:
        queue.write(CHOOSING)
        queue.write(1 + max((other.ticket for other in queue.others().values()), default=CHOOSING))
        _wait(queue, name, wait_seconds)
        ended = threading.Event()
        renewing = threading.Thread(target=_renew, args=(queue, ended), name="registry lock", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
    finally:
        queue.leave()


def _wait(queue: _Queue, name: str, wait_seconds: float) -> None:
    began = renewed = time.monotonic()
    has_warned = False
    while first := queue.before():
        now = time.monotonic()
        holder = f"process {first[0].pid} on {first[0].host}"
        if now - began > wait_seconds:
            raise TrackingError(
                f"{name}: {holder} has been changing this registered model for {wait_seconds:.0f} s; try again later, "
                f"or end it and delete the model's tags {PREFIX}*"
            )
        if not has_warned and now - began > RENEW_SECONDS / 10:
            logger.warning("%s: waiting for %s, which is changing this registered model", name, holder)
            has_warned = True
        if now - renewed > RENEW_SECONDS:
            queue.write()
            renewed = now
        time.sleep(POLL_SECONDS)


def _renew(queue: _Queue, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with suppress(MlflowException):  # the next attempt is in time
            queue.write()


def _parsed(value: str) -> Ticket | None:
    try:
        return parse(Ticket, json.loads(value))
    except ValueError:
        return None
