"""Checks of a node: what `heterokd doctor` runs on the driver and on every node, and how the results are judged."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from heterokd.config.data import DataSettings
from heterokd.config.experiment import Experiment
from heterokd.config.given_files import given_files
from heterokd.execution.threads import in_thread
from heterokd.formatting import package_version
from heterokd.storage.filesystem import RemoteDir, open_folder
from heterokd.storage.machine_load import under_load
from heterokd.storage.workspace import Workspace
from heterokd.teachers.given import is_stored
from heterokd.training.data import open_splits, stored_data

T = TypeVar("T")

CLOCK_SECONDS = 5.0
"""Largest tolerated clock difference; object stores refuse signatures that are off by 15 minutes."""
FREE_BYTES = 2 * 10**9
"""Minimum free disk space: a few checkpoints and the copies of a small cache."""
CHECK_SECONDS = 20.0
"""Timeout for a disk, a store or a server."""
DATA_SECONDS = 60.0
"""Timeout for opening a data set: a million files on a slow mount take a while."""
ANSWER_SECONDS = 120.0
"""Timeout for a node's answer: the first import of torch is slow, and opening data takes up to DATA_SECONDS."""
SLOWEST_FETCH = 10e6
"""Bytes per second below which the fetch of a data set from a store counts as no answer."""
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
        finding: finding in words.
        advice: what to do if the check failed.
    """

    node: str
    name: str
    passed: bool
    finding: str
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
        fetched_bytes: bytes of a data set in a store that this node fetches now; 0: it is only opened.
    """

    root: Workspace
    tracking: str | None
    data: str
    teachers: Mapping[str, Path]
    probe: str
    fetched_bytes: int = 0

    @property
    def data_seconds(self) -> float:
        """Timeout for opening the data set, and fetching it."""
        return DATA_SECONDS + self.fetched_bytes / SLOWEST_FETCH

    @property
    def answer_seconds(self) -> float:
        """Timeout for a node's answer."""
        return ANSWER_SECONDS + self.fetched_bytes / SLOWEST_FETCH


@dataclass(frozen=True)
class NodeAnswers:
    """Findings on a node.

    Attributes:
        storage: error message; empty if the workspace was written, read and cleaned.
        tracking: error message; empty if the server answers, None if there is no server to ask.
        data: error message; empty if the data set opens.
        fingerprint: of the data set; empty if it does not open.
        teachers: size in bytes of each teacher's file, by key; None if it is missing.
        versions: by library.
        gpus: number that torch sees.
        secrets: names of the variables with credentials that are set.
        free: free bytes on the disk of the working copies.
    """

    storage: str
    tracking: str | None
    data: str
    fingerprint: str
    teachers: Mapping[str, int | None]
    versions: Mapping[str, str]
    gpus: int
    secrets: tuple[str, ...]
    free: int


def needed_files(experiment: Experiment, root: Workspace) -> dict[str, Path]:
    """Return the files of given weights that every node must have, by key.

    Weights in MLflow, and files in a workspace that is a store, reach the nodes through the workspace.
    """
    files = {given.key: given.file for given in given_files(experiment) if not is_stored(given.file)}
    return {key: file for key, file in files.items() if root.url is None or not file.is_relative_to(root.path)}


def probe_node(questions: NodeProbe) -> NodeAnswers:
    """Run the checks on this node, with timeouts: a disk or a server may hang."""
    import torch

    versions = _versions()
    root, tracking = questions.root.on_node(), questions.tracking
    settings = DataSettings.model_validate_json(questions.data)
    data = in_thread(lambda: _open_data(settings, is_fetched=questions.fetched_bytes > 0))
    storage = in_thread(lambda: _write_and_read(root.store or open_folder(root.path), questions.probe))
    answering = None if tracking is None else in_thread(lambda: _ask_tracking(tracking))
    place = root.path
    while not place.exists():
        place = place.parent
    wrong = error_of(data, under_load(questions.data_seconds))
    schemes = {urlsplit(address).scheme for address in (root.url or "", str(settings.root or ""))}
    secrets = dict.fromkeys(name for scheme in sorted(schemes) for name in SECRETS.get(scheme, ()))
    return NodeAnswers(
        storage=error_of(storage, under_load(CHECK_SECONDS)),
        tracking=None if answering is None else error_of(answering, under_load(CHECK_SECONDS)),
        data=wrong,
        fingerprint="" if wrong else data.result(),
        teachers={key: file.stat().st_size if file.is_file() else None for key, file in questions.teachers.items()},
        versions=versions,
        gpus=torch.cuda.device_count(),
        secrets=tuple(name for name in secrets if os.environ.get(name)),
        free=shutil.disk_usage(place).free,
    )


def _open_data(settings: DataSettings, *, is_fetched: bool) -> str:
    """Open the data set, and fetch it to this node if it is in a store; return its fingerprint."""
    stored = stored_data(settings)
    if stored is not None and is_fetched:
        stored.fetch()
    elif stored is not None:
        stored.check_room()
    return open_splits(settings).fingerprint


def evaluate(node: str, found: NodeAnswers, mine: NodeAnswers, offset: float = 0.0, gpus: int = 0) -> list[Check]:
    """Judge a node's answers.

    Args:
        node: name of the node.
        found: the node's answers.
        mine: the driver's answers.
        offset: seconds by which the node's clock is ahead of the driver's.
        gpus: number of GPUs that Ray counts on the node.
    """
    checks = _storage(node, found, mine)
    if found.tracking is not None:
        advice = "start it, or correct its address" if node == DRIVER else "start it, or open its port to this node"
        checks.append(Check(node, "tracking", not found.tracking, found.tracking or "answers", advice))
    checks += _data(node, found, mine)
    if gpus:
        finding = f"torch sees {found.gpus} GPU(s)" + ("" if found.gpus >= gpus else f", and Ray counts {gpus}")
        advice = "install the GPU's driver and a torch build for it there, or start that node with --num-gpus=0"
        checks.append(Check(node, "gpus", found.gpus >= gpus, finding, advice))
    other = [
        f"{name} {found.versions.get(name, 'missing')} instead of {wanted}"
        for name, wanted in mine.versions.items()
        if found.versions.get(name) != wanted
    ]
    finding = "; ".join(other) or ", ".join(f"{name} {number}" for name, number in found.versions.items())
    checks.append(
        Check(node, "versions", not other, finding, "install requirements-runtime.lock and this heterokd on every node")
    )
    near = abs(offset) <= CLOCK_SECONDS
    finding = "agrees" if near else f"is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the driver's"
    checks.append(Check(node, "clock", near, finding, "synchronise the nodes' clocks with NTP (chrony)"))
    finding = f"{found.free / 1e9:.1f} GB free"
    checks.append(
        Check(
            node, "disk", found.free >= FREE_BYTES, finding, f"free {FREE_BYTES / 1e9:.0f} GB where working copies lie"
        )
    )
    return checks


def _storage(node: str, found: NodeAnswers, mine: NodeAnswers) -> list[Check]:
    advice = "check the address, the bucket and this machine's rights"
    if node != DRIVER:
        advice = "every node must write to the same folder: give --root s3://BUCKET/..., gs://..., or a shared mount"
    checks = [Check(node, "storage", not found.storage, found.storage or "written, read and deleted", advice)]
    lacking = [name for name in mine.secrets if name not in found.secrets]
    if (found.storage or found.data) and lacking:
        are = "are" if len(lacking) > 1 else "is"
        advice = "set them there before `ray start`, or give the machine a role; never write them into the experiment"
        checks.append(Check(node, "secrets", False, f"{', '.join(lacking)} {are} set for the driver, not here", advice))
    return checks


def _data(node: str, found: NodeAnswers, mine: NodeAnswers) -> list[Check]:
    if found.data:
        advice = "put the data at data.root on every node, or on a mount that all have"
        if "://" in found.data:
            advice = "see that this node reaches the store with its credentials, and has a disk for HETEROKD_DATA_CACHE"
        checks = [Check(node, "data", False, found.data, advice)]
    else:
        same = found.fingerprint == mine.fingerprint
        finding = "opens" if same else "differs from the driver's data set: other files, or another version"
        checks = [Check(node, "data", same, finding, "copy the driver's data set to this node")]
    for key, size in found.teachers.items():
        same = size is not None and size == mine.teachers[key]
        finding = "the teacher's file exists" if same else f"{key}: missing on this node, or another file"
        checks.append(Check(node, "teacher", same, finding, "copy it to the same path on every node"))
    return checks


def error_of(future: Future[T], seconds: float) -> str:
    """Return the error message of a call in a thread, or that it timed out; empty if it succeeded."""
    try:
        future.result(seconds)
    except TookTooLong:
        return f"no answer in {seconds:.0f} s"
    except Exception as error:  # noqa: BLE001  any error is a finding
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return ""


def now() -> float:
    """Return the time of this process's clock."""
    return time.time()


def _ask_tracking(uri: str) -> None:
    from heterokd.tracking.store import probe  # imports MLflow, which a trial's process does not

    probe(uri)


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
    found = {"python": platform.python_version(), "heterokd": package_version()}
    for name in ("ray", "torch"):
        try:
            number = str(getattr(importlib.import_module(name), "__version__", None) or version(name))
            # Builds of torch for CPUs and for GPUs (2.1.0+cpu, 2.1.0+cu126) are the same version.
            found[name] = number.partition("+")[0]
        except (ImportError, PackageNotFoundError):
            found[name] = "missing"
    return found
