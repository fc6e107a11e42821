"""A spot instance's notice reaches Ray: a metadata service of the test's own, and a real cluster whose node drains."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from own_ray import ray_head
from test_doctor import second_node

from heterokd.execution.spot_notice import Metadata, main, seconds_left, wait_for_notice

TOP = Path(__file__).parents[2]
NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)


@dataclass
class Service:
    """What an instance's metadata service answers.

    Attributes:
        life_cycle: `spot` or `on-demand`.
        action: the notice, once there is one.
        failures: how many requests fail first.
        tokens: that were given; only the last is valid.
        asked: paths in order.
    """

    life_cycle: str = "spot"
    action: str | None = None
    failures: int = 0
    tokens: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        self.asked.append(path)
        if self.failures:
            self.failures -= 1
            return 503, ""
        if (method, path) == ("PUT", "/latest/api/token"):
            assert headers["x-aws-ec2-metadata-token-ttl-seconds"] == "21600"
            self.tokens.append(f"token{len(self.tokens)}")
            return 200, self.tokens[-1]
        if not self.tokens or headers.get("x-aws-ec2-metadata-token") != self.tokens[-1]:
            return 401, ""
        found = {"instance-life-cycle": self.life_cycle, "spot/instance-action": self.action}
        text = found.get(path.removeprefix("/latest/meta-data/"))
        return (404, "") if text is None else (200, text)


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The address at which a service answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {key.lower(): value for key, value in self.headers.items()}
            status, text = service.answer(self.command, self.path, headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def notice(seconds: float, now: datetime | None = None) -> str:
    end = (now or datetime.now(UTC)) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"})


def test_a_notice_is_waited_for() -> None:
    service, pauses = Service(), []

    def pause() -> None:
        pauses.append(len(service.asked))
        if len(pauses) == 3:
            service.action = notice(120)

    with served(service) as url:
        left = wait_for_notice(Metadata(url), pause)
    assert left is not None
    assert 110 < left <= 120
    assert len(pauses) == 3


def test_failures_and_expired_tokens_are_survived(capsys: pytest.CaptureFixture[str]) -> None:
    service = Service(failures=2)

    def pause() -> None:
        if service.tokens:
            service.tokens.append("renewed by the service")
            service.action = notice(60)

    with served(service) as url:
        assert wait_for_notice(Metadata(url), pause) is not None
    assert "503" in capsys.readouterr().err
    assert service.tokens[1] == "renewed by the service"
    assert service.tokens[2] == "token2"


def test_an_on_demand_instance_is_not_watched(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Service(life_cycle="on-demand")) as url:
        assert main(["--address", "127.0.0.1:1", "--metadata", url]) == 0
    assert "not a spot instance" in capsys.readouterr().out


def test_time_left() -> None:
    assert seconds_left(notice(90, NOW), NOW) == 90
    assert seconds_left(notice(-5, NOW), NOW) == 0
    for text in ("", "{}", "[]", '{"time": "soon"}'):
        with pytest.raises(ValueError):
            seconds_left(text, NOW)


STATE = """
import json, sys
import ray
ray.init(sys.argv[1], logging_level="ERROR")
from ray._private.state import state
head = "node:__internal_head__"
workers = [node["NodeID"] for node in ray.nodes() if node["Alive"] and head not in node["Resources"]]
print(json.dumps([state.get_draining_nodes(), workers]))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_the_node_of_a_spot_instance_drains() -> None:
    service = Service()
    with ray_head(cpus=1) as head, served(service) as url, second_node(head, [], head.environment, gpus=0):
        environment = {**head.environment, "PYTHONPATH": str(TOP)}

        def state() -> tuple[dict[str, int], list[str]]:
            command = [sys.executable, "-c", STATE, head.address]
            found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            draining, workers = json.loads(found.stdout)
            return draining, workers

        _, (worker,) = state()
        watch = [sys.executable, "-m", "heterokd.execution.spot_notice", "--address", head.address]
        watch += ["--node-ip", "127.0.0.1", "--metadata", url, "--poll", "0.2"]
        watcher = subprocess.Popen(watch, env=environment, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while "/latest/meta-data/spot/instance-action" not in service.asked:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        service.action = notice(120)
        told, _ = watcher.communicate(timeout=60)
        assert watcher.returncode == 0, told
        draining, workers = state()
    assert worker in told, "the spot instance's node, and not the head"
    # Ray ends an idle node at once.
    assert (list(draining), workers) in (([worker], [worker]), ([], []))
