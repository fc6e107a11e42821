"""One process at a time changes a registered model, whichever workspace it uses."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from heterokd.errors import TrackingError
from heterokd.students.registry_lock import CHOOSING, PREFIX, Ticket, locked_model
from heterokd.tracking.store import quiet

NAME = "digits-student"


class SlowRegistry:
    """Tags of a registered model behind a slow network: each call takes effect after a random time."""

    def __init__(self, seed: int = 0) -> None:
        self.tags: dict[str, str] = {}
        self._random, self._lock = random.Random(seed), threading.Lock()

    def _wait(self) -> None:
        time.sleep(self._random.uniform(0, 0.004))

    def get_registered_model(self, name: str) -> SimpleNamespace:
        self._wait()
        with self._lock:
            found = dict(self.tags)
        self._wait()
        return SimpleNamespace(tags=found)

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self._wait()
        with self._lock:
            self.tags[key] = value
        self._wait()

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        self._wait()
        with self._lock:
            if self.tags.pop(key, None) is None:
                raise MlflowException("no such tag")


def ticket(number: int = 1, **changes: object) -> str:
    values = {"ticket": number, "expires": time.time() + 100, "host": "elsewhere", "pid": 1, "started": 0.0}
    return json.dumps(asdict(Ticket(**values | changes)))


@pytest.mark.parametrize("seed", range(3))
def test_one_at_a_time(seed):
    registry, inside, most, done = SlowRegistry(seed), [0], [0], []

    def work(number: int) -> None:
        with locked_model(registry, NAME, 60):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.003)
            inside[0] -= 1
            done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(5))
    assert most == [1]
    assert registry.tags == {}


def test_the_lock_is_released_after_an_error():
    registry = SlowRegistry()
    seen: list[str] = []

    def fail() -> None:
        with locked_model(registry, NAME):
            seen.extend(registry.tags)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [key.startswith(PREFIX) for key in seen] == [True]
    assert registry.tags == {}


@pytest.mark.parametrize("number", [CHOOSING, 1])
def test_another_machine_is_waited_for(number):
    registry = SlowRegistry()
    registry.tags[f"{PREFIX}a"] = ticket(number)
    with (
        pytest.raises(TrackingError, match="process 1 on elsewhere has been changing"),
        locked_model(registry, NAME, 0.3),
    ):
        pass
    assert list(registry.tags) == [f"{PREFIX}a"]  # its own tag is gone


def dead_pid() -> int:
    return next(pid for pid in range(4_000_000, 4_100_000) if not psutil.pid_exists(pid))


@pytest.mark.parametrize(
    "left",
    [
        ticket(expires=0.0),  # of another machine, which no longer renews it
        ticket(host=socket.gethostname(), pid=dead_pid()),
        ticket(host=socket.gethostname(), pid=psutil.Process().pid, started=1.0),  # the number was given again
        "no JSON",
        "{}",
    ],
    ids=["expired", "dead process", "number of another process", "no JSON", "no ticket"],  # equal in every process
)
def test_what_a_dead_process_left_does_not_count(left):
    registry = SlowRegistry()
    registry.tags |= {f"{PREFIX}a": left, "dataset": "digits"}
    with locked_model(registry, NAME, 1):
        pass
    assert registry.tags == {"dataset": "digits"}


def test_what_this_process_left_because_the_registry_did_not_answer_does_not_count():
    class Forgetful(SlowRegistry):
        """A registry that does not answer to the first deletion."""

        answers = False

        def delete_registered_model_tag(self, name: str, key: str) -> None:
            if not self.answers:
                self.answers = True
                raise MlflowException("no answer")
            super().delete_registered_model_tag(name, key)

    registry = Forgetful()
    with locked_model(registry, NAME, 1):
        pass
    assert len(registry.tags) == 1
    with locked_model(registry, NAME, 1):
        assert len(registry.tags) == 1
    assert registry.tags == {}


@pytest.mark.thorough
def test_mlflow_stores_the_lock(tmp_path: Path):
    with quiet():
        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        client.create_registered_model(NAME)
        with locked_model(client, NAME):
            with pytest.raises(TrackingError, match="has been changing"), locked_model(client, NAME, 0.3):
                pass
            assert len(client.get_registered_model(NAME).tags) == 1
        assert client.get_registered_model(NAME).tags == {}
