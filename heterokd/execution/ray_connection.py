"""Start a local Ray, or connect to a cluster."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from heterokd.errors import ConfigError, SearchError
from heterokd.execution import working_dir
from heterokd.execution.abandoned import mark, remove_abandoned
from heterokd.execution.failure_cause import first_line_of
from heterokd.execution.ray_messages import handlers_kept
from heterokd.execution.ray_settings import ray, services, token_headers
from heterokd.execution.ray_temp_dir import ray_temp_dir, sessions_folder
from heterokd.execution.ray_watch import starting
from heterokd.execution.signals import interrupt_on_sigterm
from heterokd.storage.machine_load import under_load

logger = logging.getLogger(__name__)


class LocalRayError(SearchError):
    """A local Ray did not start."""


OBJECT_STORE_BYTES = 128 * 1024**2
"""Size of a local Ray's object store: trials exchange small messages, data comes from files."""

CONNECT_SECONDS = 5.0
"""Timeout of the TCP connection to a cluster."""

GREET_SECONDS = 20.0
"""Timeout of the gRPC handshake that follows. Ray itself would wait for minutes."""

ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""A question to Ray's head that needs the token."""

SUBMITTING = "(docs/cluster.md, step 6)"
"""Where it is explained how a search is submitted from another machine."""


def check_address(address: str | None, patience: float = GREET_SECONDS) -> None:
    """Check that a local Ray can start, or that a Ray cluster answers at an address, before work begins.

    Args:
        address: address of the cluster; None or "local": a local Ray; "auto" is not checked.
        patience: seconds to wait for the gRPC handshake, more on a busy machine.

    Raises:
        ConfigError: it is not an address, nothing listens there, what listens there is not Ray or refuses this
            process's token, no node of a cluster runs on this machine, or a local Ray has no folder for its sockets.
    """
    if address in (None, "local"):
        ray_temp_dir()
    if address in (None, "local", "auto"):
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: a search cannot run through Ray Client, because its driver must be on a node of the "
            f"cluster; give HOST:PORT there, or submit it with `ray job submit` {SUBMITTING}"
        )
    host = port = None
    with suppress(ValueError):
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    if not host or not port or "://" in address:
        raise ConfigError(f"--address {address}: expected HOST:PORT or auto")
    try:
        socket.create_connection((host, port), timeout=under_load(CONNECT_SECONDS)).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--address {address}: no Ray cluster answers ({error}); start one, or leave it out"
        ) from None
    answer = _greet(host, port, under_load(patience))
    if answer == "refused":
        raise ConfigError(refusal(address, "token"))
    if answer == "silent":
        raise ConfigError(
            f"--address {address}: the server there is not Ray; give the port that `ray start --head` printed "
            "(6379 by default)"
        )
    if not services.find_node_ids():
        raise ConfigError(_off_cluster(address))


def _greet(host: str, port: int, patience: float) -> Literal["known", "refused", "silent"]:
    """Ask a server as Ray does; with TLS nothing is asked.

    Ray itself asks for 20 seconds, and then says nothing about a token that is refused.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return "known"
    import grpc

    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(patience)
        except grpc.FutureTimeoutError:
            return "silent"
        try:
            channel.unary_unary(ALIVE)(b"", timeout=patience, metadata=token_headers())
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return "refused"
    return "known"


def refusal(address: str, reason: str) -> str:
    """Return the sentence for a cluster that refuses this process.

    Args:
        address: its address.
        reason: message of Ray's exception.
    """
    text = reason.lower()
    if any(word in text for word in ("token", "unauthenticated", "authenticat")):
        return (
            f"--address {address}: the cluster refuses this process, which has no token or another one; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token of its nodes (or copy their ~/.ray/auth_token)"
        )
    if reason.startswith("Version mismatch"):
        words = ("Ray", "Python")
        theirs, mine = (
            " and ".join(f"{word} {number}" for word, number in zip(words, numbers, strict=True))
            for numbers in zip(*(re.findall(rf"{word}: (\S+)", reason) for word in words), strict=True)
        )
        return (
            f"--address {address}: the cluster runs {theirs}, this process {mine}; install the cluster's versions here"
        )
    if "No node info found" in reason:
        return _off_cluster(address)
    return f"--address {address}: no Ray cluster answers ({reason.splitlines()[0]}); start one, or leave it out"


def _off_cluster(address: str) -> str:
    return (
        f"--address {address}: no node of this cluster runs on this machine, and a search must be started on a node: "
        f"log in to the head, or submit it with `ray job submit` {SUBMITTING}"
    )


@contextmanager
def connected(address: str | None, cores: int | None = None, *, shared: bool = False) -> Iterator[None]:
    """Connect to Ray: the cluster at `address`, the Ray that this process is already connected to, or a local Ray.

    Args:
        address: address of a cluster; None starts a local Ray.
        cores: cores of a local Ray; None: all cores of the machine.
        shared: trainings may be sharded. When a trial's process is killed, Ray Train asks Ray's dashboard whether it
            still lives before it frees the workers' resources, so a local Ray then starts a dashboard (on 127.0.0.1).
            Where several Rays run on the machine, it does not find the right dashboard, and a killed trial keeps its
            resources.

    Raises:
        ConfigError: no cluster answers at the address, or a local Ray has no folder for its sockets.
        LocalRayError: a local Ray did not start: a process of it died, or the machine is too busy.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    if address is None:
        _start_local(cores, shared, quiet)
    else:
        temp_dir = ray_temp_dir() if address == "local" else None
        try:
            with handlers_kept():
                ray.init(address=address, runtime_env=code_for_nodes(), _temp_dir=temp_dir, **quiet)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise ConfigError(refusal(address, str(error).strip())) from None
    try:
        # Ray has installed a handler for SIGTERM that would end this process at once.
        with interrupt_on_sigterm():
            yield
    finally:
        ray.shutdown()


def _start_local(cores: int | None, shared: bool, quiet: Mapping[str, object]) -> None:
    # A local Ray's machine is not preempted.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    temp_dir = ray_temp_dir()
    try:
        with starting(sessions_folder()), handlers_kept():
            ray.init(
                address="local",
                num_cpus=cores or os.cpu_count(),
                include_dashboard=shared,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=temp_dir,
                **quiet,
            )
    except Exception as error:  # Ray raises plain exceptions where its processes die, or do not answer in half a minute
        with suppress(Exception):
            ray.shutdown()
        raise LocalRayError(
            f"a local Ray did not start ({first_line_of(error)}); see its logs in {sessions_folder()}"
        ) from error
    _tidy_sessions()


def _tidy_sessions() -> None:
    """Mark the folder of this local Ray's session, and remove those of killed drivers, which Ray keeps."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    try:
        mark(session)
        remove_abandoned(session.parent, "session_*")
    except OSError as error:
        logger.info("%s: its older sessions are kept (%s)", session.parent, error)


def is_preempted(*, anywhere: bool = False) -> bool:
    """Whether this process's node (or any node) is draining, for example after a spot instance's notice.

    Ray has no public API for this; Ray Train uses the same internal API.
    """
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return bool(draining) and (anywhere or ray.get_runtime_context().get_node_id() in draining)


def code_for_nodes() -> dict[str, object] | None:
    """Return the runtime environment that ships this heterokd, the working directory and MLflow's URI to the nodes.

    None inside a submitted job (`ray job submit`), whose processes already have its environment. A URI with a password
    is left out, since Ray shows runtime environments on its dashboard.
    """
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return None
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    carried = {"MLFLOW_TRACKING_URI": uri} if uri and "@" not in uri else {}
    package = Path(__file__).parents[1]
    return {
        "py_modules": [str(package)],
        "env_vars": {**carried, working_dir.VARIABLE: str(Path.cwd())},
        "worker_process_setup_hook": "heterokd.execution.working_dir.enter",
        "excludes": ["**/__pycache__/"],
    }
