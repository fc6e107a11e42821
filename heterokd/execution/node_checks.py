"""Checks of a node: what `heterokd doctor` runs on the driver and on every node, and how the results are judged."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from heterokd import __version__
from heterokd.config.data import DataSettings
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.workspace import Workspace
from heterokd.training.data import open_splits

CLOCK_SECONDS = 5.0
"""Largest tolerated clock difference; object stores refuse signatures that are off by 15 minutes."""
FREE_BYTES = 2 * 10**9
"""Minimum free disk space: a few checkpoints and the copies of a small cache."""
CHECK_SECONDS = 20.0
"""Timeout for a disk, a store or a server."""
DATA_SECONDS = 60.0
"""Timeout for opening a data set: a million files on a slow mount take a while."""
DRIVER = "driver"
SECRETS = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "gcs": ("GOOGLE_APPLICATION_CREDENTIALS",),
}
"""By a store's scheme, variables that hold credentials. Their names are compared, never their values."""


@dataclass(frozen=True)
class Check:
    """Result of a single check.

    Attributes:
        node: address of the node, or "driver".
        name: name of the check, see `heterokd/execution/doctor.py`.
        passed: whether a search can run with it.
        told: finding in words (a key of `heterokd doctor --json`).
        advice: what to do if the check failed.
    """

    node: str
    name: str
    passed: bool
    told: str
    advice: str = ""


@dataclass(frozen=True)
class NodeProbe:
    """Questions to a node, as plain values.

    Attributes:
        root: workspace, as the driver sees it.
        tracking: address of the tracking server; None if MLflow writes a local file of the driver.
        data: the experiment's data section, as JSON.
        teachers: files that every node must have, by their keys in the experiment.
        probe: name of a file that the driver wrote into the workspace.
    """

    root: Workspace
    tracking: str | None
    data: str
    teachers: Mapping[str, Path]
    probe: str


def answers(questions: NodeProbe) -> dict[str, Any]:
    """Run the checks on this node, with timeouts: a disk or a server may hang.

    Returns:
        Plain values by name; error messages where something is wrong.
    """
    found: dict[str, Any] = {"host": socket.gethostname(), "versions": _versions(), "gpus": _gpus()}
    root, tracking = questions.root.on_node(), questions.tracking
    data = started(lambda: open_splits(DataSettings.model_validate_json(questions.data)).fingerprint)
    storage = started(lambda: _write_and_read(root.store or open_folder(root.path), questions.probe))
    answering = None if tracking is None else started(lambda: _ask(tracking))
    found["storage"] = sentence(storage, CHECK_SECONDS)
    if answering is not None:
        found["tracking"] = sentence(answering, CHECK_SECONDS)
    wrong = sentence(data, DATA_SECONDS)
    found |= {"data": wrong} if wrong else {"fingerprint": data.result()}
    found["teachers"] = {
        key: file.stat().st_size if file.is_file() else None for key, file in questions.teachers.items()
    }
    scheme = urlsplit(root.url or "").scheme
    found["secrets"] = [name for name in SECRETS.get(scheme, ()) if os.environ.get(name)]
    place = root.path
    while not place.exists():
        place = place.parent
    found["free"] = shutil.disk_usage(place).free
    return found


def judge(
    node: str, found: Mapping[str, Any], mine: Mapping[str, Any], offset: float = 0.0, gpus: int = 0
) -> list[Check]:
    """Judge a node's answers.

    Args:
        node: name of the node.
        found: the node's answers.
        mine: the driver's answers.
        offset: seconds by which the node's clock is ahead of the driver's.
        gpus: number of GPUs that Ray counts on the node.
    """
    checks = _storage(node, found, mine)
    if "tracking" in found:
        told = found["tracking"]
        advice = "start it, or correct its address" if node == DRIVER else "start it, or open its port to this node"
        checks.append(Check(node, "tracking", told is None, told or "answers", advice))
    checks += _data(node, found, mine)
    if gpus:
        seen = found["gpus"]
        told = f"torch sees {seen} GPU(s)" + ("" if seen >= gpus else f", and Ray counts {gpus}")
        advice = "install the GPU's driver and a torch build for it there, or start that node with --num-gpus=0"
        checks.append(Check(node, "gpus", seen >= gpus, told, advice))
    other = [
        f"{name} {found['versions'].get(name, 'missing')} instead of {wanted}"
        for name, wanted in mine["versions"].items()
        if found["versions"].get(name) != wanted
    ]
    told = "; ".join(other) or ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    checks.append(Check(node, "versions", not other, told, "install requirements.lock and this heterokd on every node"))
    near = abs(offset) <= CLOCK_SECONDS
    told = "agrees" if near else f"is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the driver's"
    checks.append(Check(node, "clock", near, told, "synchronise the nodes' clocks with NTP (chrony)"))
    enough = found["free"] >= FREE_BYTES
    told = f"{found['free'] / 1e9:.1f} GB free"
    checks.append(Check(node, "disk", enough, told, f"free {FREE_BYTES / 1e9:.0f} GB where working copies lie"))
    return checks


def _storage(node: str, found: Mapping[str, Any], mine: Mapping[str, Any]) -> list[Check]:
    told = found["storage"]
    advice = "check the address, the bucket and this machine's rights"
    if node != DRIVER:
        advice = "every node must write to the same folder: give --root s3://BUCKET/..., gs://..., or a shared mount"
    checks = [Check(node, "storage", told is None, told or "written, read and deleted", advice)]
    lacking = [name for name in mine["secrets"] if name not in found["secrets"]]
    if told is not None and lacking:
        are = "are" if len(lacking) > 1 else "is"
        advice = "set them there before `ray start`, or give the machine a role; never write them into the experiment"
        checks.append(Check(node, "secrets", False, f"{', '.join(lacking)} {are} set for the driver, not here", advice))
    return checks


def _data(node: str, found: Mapping[str, Any], mine: Mapping[str, Any]) -> list[Check]:
    if "data" in found:
        advice = "put the data at data.root on every node, or on a mount that all have"
        checks = [Check(node, "data", False, found["data"], advice)]
    else:
        same = found["fingerprint"] == mine.get("fingerprint")
        told = "opens" if same else "differs from the driver's data set: other files, or another version"
        checks = [Check(node, "data", same, told, "copy the driver's data set to this node")]
    for key, size in found.get("teachers", {}).items():
        same = size is not None and size == mine["teachers"][key]
        told = "the teacher's file exists" if same else f"{key}: missing on this node, or another file"
        checks.append(Check(node, "teacher", same, told, "copy it to the same path on every node"))
    return checks


def started(attempt: Callable[[], Any]) -> Future[Any]:
    """Run an attempt in a daemon thread: a call that hangs in the operating system cannot be cancelled."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(attempt())
        except BaseException as error:  # noqa: BLE001  re-raised by `Future.result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def sentence(future: Future[Any], seconds: float) -> str | None:
    """Return an attempt's error message (or that it timed out), or None."""
    try:
        future.result(seconds)
    except TookTooLong:
        return f"no answer in {seconds:.0f} s"
    except Exception as error:  # noqa: BLE001  any error is a finding
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def now() -> float:
    """Return the time of this process's clock."""
    return time.time()


def _write_and_read(folder: RemoteDir, probe: str) -> None:
    name = f"doctor/{socket.gethostname()}-{uuid4().hex}"
    folder.write(name, b"node")
    try:
        if folder.read(name) != b"node":
            raise OSError(f"{folder}/{name}: was read differently than it was written")
    finally:
        folder.delete(name)
    if not folder.exists(probe):
        raise OSError(f"{folder}: is not the driver's folder (the driver's file is missing)")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "heterokd": __version__}
    for name in ("ray", "torch"):
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", None) or version(name))
        except (ImportError, PackageNotFoundError):
            found[name] = "missing"
    return found


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _ask(uri: str) -> None:
    from heterokd.tracking.store import probe

    probe(uri)
