"""A Ray of the test's own, as a cluster's head: started by `ray start` on loopback, ended by its process group."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from object_store import free_port

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""Under which Ray's local multi-node provider knows the head."""

STORE_BYTES = 100 * 1024**2
"""Ray's shared memory on one node."""

COMMANDS = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray", "initialization")
OTHERWISE: dict[str, Any] = {
    **{f"{name}_commands": [] for name in COMMANDS},
    **{
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
    },
    "file_mounts_sync_continuously": False,
    "upscaling_speed": 8.0,
}
"""What Ray's autoscaler asks for, and its local provider makes no use of."""

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: HOST:PORT, as `--address` takes it.
        dashboard: http://HOST:PORT of its pages, which take jobs.
        environment: of its nodes, and of whoever would connect.
        process: `ray start --block`; everything that it started is below it.
        log: what it said.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def folder(self) -> Path:
        """Of Ray's own files, its logs among them."""
        return self.log.parent

    def processes(self) -> list[psutil.Process]:
        """Of all its nodes."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def ray_head(
    *,
    cpus: int,
    gpus: int = 0,
    pages: bool = False,
    environment: Mapping[str, str] | None = None,
    autoscaling: Mapping[str, Any] | None = None,
) -> Iterator[Head]:
    """A head whose nodes are not told where heterokd is.

    Args:
        cpus: of the head.
        gpus: that Ray counts on it, whether they are there or not.
        pages: serve Ray's dashboard, which also takes jobs.
        environment: more of it.
        autoscaling: node types, by which Ray's autoscaler adds nodes on this machine, and after how many idle minutes
            they go.
    """
    scratch = Path(tempfile.mkdtemp(prefix="hk", dir="/tmp"))  # sockets have short names
    port, pages_port = free_port(), free_port()
    nodes = {
        **os.environ,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # Ray's own default, without a file in the home folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **(environment or {}),
    }
    nodes.pop("PYTHONPATH", None)
    command = [*RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += [f"--num-cpus={cpus}", f"--temp-dir={scratch}/ray", f"--object-store-memory={STORE_BYTES}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={pages_port}"]
    command += [f"--num-gpus={gpus}", f"--include-dashboard={str(pages).lower()}"]
    # Ports that are always the same otherwise: another Ray of this machine may have them.
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    started = nodes
    if autoscaling is not None:
        types = {**autoscaling["types"], "ray.head.default": {"resources": {"CPU": cpus}, "node_config": {}}}
        types["ray.head.default"]["max_workers"] = 0
        file = scratch / "cluster.json"
        provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
        content = {
            "cluster_name": "here",
            "max_workers": autoscaling["max_workers"],
            "idle_timeout_minutes": autoscaling["idle_minutes"],
            "provider": {
                "type": "external",
                "module": provider,
                "gcs_address": f"127.0.0.1:{port}",
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
            },
            "available_node_types": types,
            "head_node_type": "ray.head.default",
            **OTHERWISE,
        }
        file.write_text(json.dumps(content))
        command.append(f"--autoscaling-config={file}")
        own = {"RAY_FAKE_CLUSTER": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
        started = {**nodes, **own}
    log = scratch / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=started, stdout=output, stderr=output, start_new_session=True)
    head = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{pages_port}", nodes, process, log)
    try:
        _wait(head)
        yield head
    finally:
        _end(process)
        shutil.rmtree(scratch, ignore_errors=True)


def _wait(head: Head) -> None:
    until = time.monotonic() + 90
    while "Ray runtime started" not in head.log.read_text(errors="replace"):
        assert head.process.poll() is None, head.log.read_text()
        assert time.monotonic() < until, head.log.read_text()
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its group, and nodes that were started in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        for one in below:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
