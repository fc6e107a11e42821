"""Connect to Ray: start a local one, or join a cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from heterokd.errors import ConfigError
from heterokd.execution import working_dir
from heterokd.execution.ray_settings import ray
from heterokd.execution.signals import ending_in_order

OBJECT_STORE_BYTES = 128 * 1024**2
"""Ray's shared memory on one machine: trials exchange small messages, their data comes from files."""

CONNECT_SECONDS = 5.0
"""How long a cluster may take to take a connection."""

GREET_SECONDS = 20.0
"""How long it may then take to answer as Ray does. Ray itself would wait for minutes, and ask anything that listens."""


def check_address(address: str | None, patience: float = GREET_SECONDS) -> None:
    """Ask whether a Ray answers at a cluster's address, before there is work that would be lost.

    Args:
        address: of the cluster.
        patience: seconds to wait for an answer of what listens there.

    Raises:
        ConfigError: it is no address, nothing listens there, or something else than Ray.
    """
    if address is None or address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme != "ray" or not host or not port:
        raise ConfigError(f"--address {address}: expected HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--address {address}: no Ray cluster answers ({error}); start one, or leave it out"
        ) from None
    if not _greets(host, port, patience):
        raise ConfigError(
            f"--address {address}: what listens there does not answer as Ray does; give the port that `ray start "
            "--head` named (6379 unless it was given another)"
        )


def _greets(host: str, port: int, patience: float) -> bool:
    """Whether a server speaks gRPC, as every Ray does; one that encrypts is taken at its word."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    import grpc

    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(patience)
        except grpc.FutureTimeoutError:
            return False
    return True


@contextmanager
def connected(address: str | None, cores: int | None = None, *, shared: bool = False) -> Iterator[None]:
    """A Ray to run on: the cluster at `address`, one that this process is connected to already, or a local one.

    Args:
        address: of a cluster; None starts a local Ray.
        cores: of a local one; the machine's when left out.
        shared: several workers may share a training. Should its process be killed, Ray Train asks Ray's dashboard
            whether it still lives before it frees the workers' places, so a local Ray has one then (on 127.0.0.1).
            Where several Rays run on the machine, it does not find the right one, and a killed trial keeps its places.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    # A new local Ray makes itself a token, which is as it should be, and says so in a warning, which is not needed.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    try:
        if address is None:
            # No machine of a local Ray is taken away with a warning.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            ray.init(
                address="local",
                num_cpus=cores or os.cpu_count(),
                include_dashboard=shared,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            ray.init(address=address, runtime_env=code_for_nodes(), **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--address {address}: no Ray cluster answers ({reason}); start one, or leave it out"
        ) from None
    try:
        # Ray has taken SIGTERM for itself, and would end this process wherever it is.
        with ending_in_order():
            yield
    finally:
        ray.shutdown()


def is_preempted(*, anywhere: bool = False) -> bool:
    """Whether this process's node (or any node) was told to leave: the warning of a spot machine, or a drain.

    Ray gives no other answer than its internal one, which Ray Train asks as well.
    """
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return bool(draining) and (anywhere or ray.get_runtime_context().get_node_id() in draining)


def code_for_nodes() -> dict[str, Any] | None:
    """Ray's runtime environment for a driver that brings its own code: this heterokd, where it stands, where MLflow is.

    None inside a submitted job (`ray job submit`), whose own environment all of its processes have. An address with a
    password is not carried: Ray shows runtime environments to whoever sees the dashboard.
    """
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return None
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    carried = {"MLFLOW_TRACKING_URI": uri} if uri and "@" not in uri else {}
    package = Path(__file__).parent
    return {
        "py_modules": [str(package)],
        "env_vars": {**carried, working_dir.VARIABLE: str(Path.cwd())},
        "worker_process_setup_hook": "heterokd.execution.working_dir.enter",
        "excludes": ["**/__pycache__/"],
    }
