"""What `heterokd doctor` asks a process of the driver or of a node, what it answers, and what that means."""

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
"""Clocks that differ by more mix up what is newer; object stores refuse signatures at 15 minutes."""
FREE_BYTES = 2 * 10**9
"""Room for a few checkpoints and the copies of a small cache."""
CHECK_SECONDS = 20.0
"""Longer, and a disk, a store or a server counts as one that does not answer."""
DATA_SECONDS = 60.0
"""To look through a data set: a million files on a slow mount take a while."""
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
"""By a store's kind, variables by which its client may be let in. Their names are compared, their values never."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        node: its address, or "driver".
        name: see the head of `heterokd/execution/doctor.py`.
        passed: whether the search would find it in order.
        told: what was found.
        advice: what to do, where it did not pass.
    """

    node: str
    name: str
    passed: bool
    told: str
    advice: str = ""


@dataclass(frozen=True)
class NodeProbe:
    """What a node is asked, as plain values.

    Attributes:
        root: as the driver sees it.
        tracking: the server's address; None where MLflow writes a file of the driver's.
        data: the experiment's, as JSON.
        teachers: files that every node must have, by the key that names them.
        probe: name of the driver's own file where state lives.
    """

    root: Workspace
    tracking: str | None
    data: str
    teachers: Mapping[str, Path]
    probe: str


def answers(questions: NodeProbe) -> dict[str, Any]:
    """What this process finds; runs on every node, and ends in time even where a disk or a server hangs.

    Returns:
        By name, plain values; where something went wrong, a sentence says what.
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
    """Checks of what a node answered.

    Args:
        node: its name.
        found: its answers.
        mine: the driver's.
        offset: seconds that its clock is ahead of the driver's.
        gpus: that Ray counts on it.
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
    told = "; ".join(other) or ", ".join(f"{name} {one}" for name, one in found["versions"].items())
    checks.append(Check(node, "versions", not other, told, "install requirements.lock and this heterokd on every node"))
    near = abs(offset) <= CLOCK_SECONDS
    told = "agrees" if near else f"is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the driver's"
    checks.append(Check(node, "clock", near, told, "let the nodes' clocks be set by NTP (chrony)"))
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
        told = "opens" if same else "is not the driver's data set: other files, or another version"
        checks = [Check(node, "data", same, told, "copy the driver's data set to this node")]
    for key, size in found.get("teachers", {}).items():
        same = size is not None and size == mine["teachers"][key]
        told = "the teacher's file is there" if same else f"{key}: is missing here, or another file"
        checks.append(Check(node, "teacher", same, told, "copy it to the same path on every node"))
    return checks


def started(attempt: Callable[[], Any]) -> Future[Any]:
    """An attempt in a thread of its own, which nobody need wait for: what hangs in the system cannot be ended."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(attempt())
        except BaseException as error:  # noqa: BLE001  handed to the one who waits for it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def sentence(future: Future[Any], seconds: float) -> str | None:
    """What went wrong with an attempt, the time it takes included; None when nothing did."""
    try:
        future.result(seconds)
    except TookTooLong:
        return f"no answer in {seconds:.0f} s"
    except Exception as error:  # noqa: BLE001  whatever it is, it is what this machine says
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def now() -> float:
    """A process's clock."""
    return time.time()


def _write_and_read(folder: RemoteDir, probe: str) -> None:
    name = f"doctor/{socket.gethostname()}-{uuid4().hex}"
    folder.write(name, b"node")
    try:
        if folder.read(name) != b"node":
            raise OSError(f"{folder}/{name}: reads differently than it was written")
    finally:
        folder.delete(name)
    if not folder.exists(probe):
        raise OSError(f"{folder}: is not the folder that the driver sees (its file is not there)")


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
