"""`heterokd doctor`: what would fail on a node is told before launch, by node, with what to do, and in time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from object_store import free_port, s3_server
from own_ray import STORE_BYTES, ray_head
from PIL import Image

from heterokd.config.reading import load_experiment
from heterokd.execution import node_checks
from heterokd.execution.doctor import as_json, examine, table
from heterokd.execution.node_checks import CLOCK_SECONDS, FREE_BYTES, SECRETS, Check, NodeAnswers, error_of, evaluate
from heterokd.execution.threads import in_thread
from heterokd.storage.workspace import Workspace

Write = Callable[..., Path]
NOWHERE = "http://127.0.0.1:9"
FINE = NodeAnswers(
    storage="",
    tracking="",
    data="",
    fingerprint="f",
    teachers={"teacher.checkpoint": 10},
    versions={"python": "3.12.1", "ray": "2.60.0"},
    gpus=1,
    secrets=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    free=FREE_BYTES,
)


def failed(checks: list[Check]) -> dict[str, str]:
    """What a user reads of a check that failed, by its name."""
    return {check.name: f"{check.finding} -> {check.advice}" for check in checks if not check.passed}


def test_a_node_like_the_driver_passes() -> None:
    checks = evaluate("10.0.0.2", FINE, FINE, offset=1.0, gpus=1)
    assert failed(checks) == {}
    assert [check.name for check in checks] == [
        "storage", "tracking", "data", "teacher", "gpus", "versions", "clock", "disk",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "name", "told"),
    [
        ({"storage": "no answer in 20 s"}, "storage", "no answer in 20 s -> every node must write to the same folder"),
        ({"storage": "denied", "secrets": ("AWS_ACCESS_KEY_ID",)}, "secrets", "AWS_SECRET_ACCESS_KEY is set for the"),
        ({"tracking": "does not answer"}, "tracking", "does not answer -> start it, or open its port to this node"),
        ({"data": "data.root: there is no folder x"}, "data", "no folder x -> put the data at data.root on every node"),
        ({"fingerprint": "g"}, "data", "differs from the driver's data set"),
        ({"teachers": {"teacher.checkpoint": None}}, "teacher", "copy it to the same path on every node"),
        ({"teachers": {"teacher.checkpoint": 11}}, "teacher", "or another file"),
        ({"gpus": 0}, "gpus", "torch sees 0 GPU(s), and Ray counts 1 -> install the GPU's driver"),
        ({"versions": {"python": "3.12.1"}}, "versions", "ray missing instead of 2.60.0"),
        ({"free": FREE_BYTES - 1}, "disk", "2.0 GB free -> free 2 GB"),
    ],
)  # fmt: skip
def test_what_fails_on_a_node_is_told_with_what_to_do(found: dict[str, Any], name: str, told: str) -> None:
    checks = evaluate("10.0.0.2", replace(FINE, **found), FINE, gpus=1)
    assert told in failed(checks)[name]
    assert {check.node for check in checks} == {"10.0.0.2"}
    assert set(failed(checks)) <= {name, "storage"}
    assert "10.0.0.2" in "\n".join(table(checks))
    assert not as_json(checks)["ok"]


@pytest.mark.parametrize(("offset", "told"), [(CLOCK_SECONDS + 1, "6 s ahead of"), (-60.0, "60 s behind")])
def test_a_clock_that_is_off_is_told(offset: float, told: str) -> None:
    assert told in failed(evaluate("n", FINE, FINE, offset=offset))["clock"]


def test_what_hangs_is_not_waited_for() -> None:
    began, never = time.monotonic(), threading.Event()
    assert error_of(in_thread(never.wait), 0.1) == "no answer in 0 s"
    assert time.monotonic() - began < 5
    never.set()


@pytest.mark.usefixtures("local_ray")
def test_a_local_ray_is_asked(tiny_file: Write, tmp_path: Path) -> None:
    began = time.monotonic()
    checks = examine(load_experiment(tiny_file()), Workspace(tmp_path / "runs"))
    assert failed(checks) == {}
    nodes = {check.node for check in checks}
    assert nodes == {"driver", "127.0.0.1", "cluster"}
    by_node = {node: {check.name for check in checks if check.node == node} for node in nodes}
    assert by_node["127.0.0.1"] == {"storage", "data", "versions", "clock", "disk"}
    assert by_node["driver"] == by_node["127.0.0.1"] | {"tracking"}
    assert not list((tmp_path / "runs").iterdir()), "the root is left as it was"

    # A dead server, and GPUs that nobody has: told, and nothing is waited for.
    experiment = load_experiment(tiny_file(tracking={"uri": NOWHERE}, search={"gpus_per_trial": 1}))
    checks = examine(experiment, Workspace(tmp_path / "runs"))
    wrong = {(check.node, check.name): check for check in checks if not check.passed}
    assert set(wrong) == {("driver", "tracking"), ("127.0.0.1", "tracking"), ("cluster", "resources")}
    assert NOWHERE in wrong["driver", "tracking"].finding
    assert "asks for 1 GPU(s), and no node has or will have one" in wrong["cluster", "resources"].finding
    assert time.monotonic() - began < 240


@contextmanager
def guarded() -> Iterator[str]:
    """A tracking server that asks who one is."""

    class Guard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == f"Basic {b64encode(b'me:right').decode()}"
            free = self.path == "/health" or known
            self.send_response(200 if free else 401)
            self.end_headers()
            self.wfile.write(b"{}" if free else b"who are you?")

        do_POST = do_GET  # noqa: N815  the server's name for it

        def log_message(self, *_: object) -> None:
            """Keep the test's output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Guard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_lets_the_driver_not_in_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from heterokd.errors import TrackingError
    from heterokd.tracking.store import check_access

    with guarded() as uri:
        for name, value in (("MLFLOW_TRACKING_USERNAME", "me"), ("MLFLOW_TRACKING_PASSWORD", "wrong")):
            monkeypatch.setenv(name, value)
        with pytest.raises(TrackingError, match=r"401.*MLFLOW_TRACKING_PASSWORD") as told:
            check_access(uri)
        assert "wrong" not in str(told.value)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
        check_access(uri)


# --- a node that sees another disk than the driver


def apart(*mounts: str) -> list[str]:
    """The beginning of a command that runs with mounts of its own; skips where this user may not mount."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("a node with a disk of its own needs `unshare --mount`, which this user may not run here")
    return [*unshare, "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]


NODE = """
import signal, sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
address, port, memory, gpus = sys.argv[1:]
node = Node(
    RayParams(gcs_address=address, redis_address=address, num_cpus=1, num_gpus=int(gpus),
              object_store_memory=int(memory), min_worker_port=0, max_worker_port=0,
              dashboard_agent_listen_port=int(port)),
    head=False, shutdown_at_exit=True, spawn_reaper=False,
)
print("Ray runtime started", flush=True)
time.sleep(3600)
"""
"""As Ray's own clusters for tests start theirs; `ray start` takes no second node on the loopback address."""


@contextmanager
def second_node(head: Any, command: list[str], environment: dict[str, str], gpus: int = 1) -> Iterator[None]:
    """A node with one core and GPUs that Ray counts, whether they are there or not."""
    starting = [sys.executable, "-c", NODE, head.address, str(free_port()), str(STORE_BYTES), str(gpus)]
    node = subprocess.Popen(
        [*command, *starting], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert node.stdout is not None
        said = ""
        while "Ray runtime started" not in said:
            line = node.stdout.readline()
            assert line, said
            said += line
        threading.Thread(target=node.stdout.read, daemon=True).start()
        yield
    finally:
        node.terminate()
        node.wait(60)
        if node.stdout is not None:
            node.stdout.close()


def doctor(head: Any, root: str, file: Path) -> tuple[int, list[Check], str]:
    """The command's exit code, its checks, and all that it said."""
    command = [
        sys.executable,
        "-m",
        "heterokd",
        "doctor",
        str(file),
        "--address",
        head.address,
        "--root",
        root,
        "--json",
    ]
    done = subprocess.run(
        command,
        env={**head.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout, done.stderr
    content = json.loads(done.stdout.splitlines()[-1])
    checks = [Check(c["node"], c["name"], c["passed"], c["told"], c["advice"]) for c in content["checks"]]
    return done.returncode, checks, done.stdout + done.stderr


def write_images(folder: Path) -> None:
    for split in ("train", "val", "test"):
        for kind in ("cat", "dog"):
            place = folder / split / kind
            place.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (number * 40, 90, 10)).save(place / f"{number}.png")


@pytest.mark.ray
@pytest.mark.slow
def test_each_of_two_nodes_says_what_it_lacks(tiny_file: Write, tmp_path: Path) -> None:
    """The second node has no data, a root that is read-only, a GPU that is none, and no key to the object store."""
    images, root, empty = tmp_path / "images", tmp_path / "runs", tmp_path / "empty"
    write_images(images)
    for folder in (root, empty):
        folder.mkdir()
    data = {"dataset": "image_folder", "root": str(images)}
    file = tiny_file(data=data, tracking={"uri": NOWHERE}, search={"gpus_per_trial": 2})
    command = apart(f"mount --bind {empty} {images}", f"mount --bind {root} {root}", f"mount -o remount,ro,bind {root}")
    home = {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    with s3_server(tmp_path / "s3.log") as s3, ray_head(cpus=1, environment={**home, **s3}) as head:
        without = {key: value for key, value in head.environment.items() if key not in SECRETS["s3"]}
        with second_node(head, command, {**without, "AWS_ENDPOINT_URL": NOWHERE}):
            code, checks, _ = doctor(head, str(root), file)
            names = {check.node for check in checks}
            (second,) = {check.node for check in checks if check.name == "gpus"}
            (first,) = names - {"driver", "cluster", second}
            wrong = {(check.node, check.name): check for check in checks if not check.passed}
            print("\n".join(table(checks)))
            assert code == 2
            assert set(wrong) == {
                ("driver", "tracking"),
                (first, "tracking"),
                *((second, name) for name in ("tracking", "storage", "data", "gpus")),
                ("cluster", "resources"),
            }
            assert "Read-only file system" in wrong[second, "storage"].finding
            assert f"{images}" in wrong[second, "data"].finding
            assert "torch sees 0 GPU(s), and Ray counts 1" in wrong[second, "gpus"].finding
            assert "2 GPUs for each trial are not available from 1" in wrong["cluster", "resources"].finding
            assert all(check.advice for check in wrong.values() if check.node != "driver")

            alone = tiny_file(data=data)
            code, checks, said = doctor(head, "s3://state/runs", alone)
            print("\n".join(table(checks)))
            wrong = {(check.node, check.name): check for check in checks if not check.passed}
            assert code == 2
            assert {name for node, name in wrong if node == second} == {"storage", "secrets", "data", "gpus"}
            assert "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in wrong[second, "secrets"].finding
            assert "before `ray start`" in wrong[second, "secrets"].advice
            assert s3["AWS_SECRET_ACCESS_KEY"] not in said
            assert not {name for node, name in wrong if node == "driver"}


def test_the_limits_let_a_node_answer_first() -> None:
    from heterokd.execution.doctor import ANSWER_SECONDS

    assert node_checks.CHECK_SECONDS + node_checks.DATA_SECONDS < ANSWER_SECONDS
