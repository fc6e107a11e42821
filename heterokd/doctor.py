"""Before launch: would every node reach what a search needs? Each node is asked, and answers for itself.

storage     write, read and delete a file where state lives, and see the driver's
tracking    an MLflow server answers
data        the data set opens, and is the same everywhere; a given teacher's file too
versions    Python, Ray, torch and heterokd are the driver's
clock       within CLOCK_SECONDS of the driver's
disk        FREE_BYTES are free for working copies
resources   the GPUs and cores that the experiment asks for exist, or can be added
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from heterokd import __version__
from heterokd.cluster import coming_nodes, connected, plan_cluster, ray
from heterokd.config import DataSettings, Experiment
from heterokd.distillation import check_experiment, open_splits
from heterokd.errors import HeterokdError, TrackingError, UserError
from heterokd.root import Root
from heterokd.storage import Folder, open_folder

CLOCK_SECONDS = 5.0
"""Clocks that differ by more mix up what is newer; object stores refuse signatures at 15 minutes."""
FREE_BYTES = 2 * 10**9
"""Room for a few checkpoints and the copies of a small cache."""
ANSWER_SECONDS = 120.0
"""A node that imports torch for the first time takes its time."""
DRIVER = "driver"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        node: its address, or "driver".
        name: see the head of this file.
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
class Questions:
    """What a node is asked, as plain values.

    Attributes:
        root: as the driver sees it.
        tracking: the server's address; None where MLflow writes a file of the driver's.
        data: the experiment's, as JSON.
        teacher: a file that every node must have.
        probe: name of the driver's own file where state lives.
    """

    root: Root
    tracking: str | None
    data: str
    teacher: Path | None
    probe: str


def examine(experiment: Experiment, root: Root, address: str | None = None) -> list[Check]:
    """Ask the driver and every node of a Ray.

    Args:
        experiment: what would be searched.
        root: where its state would live.
        address: of the Ray cluster; None looks at a local one.

    Returns:
        All checks, the driver's first.

    Raises:
        UserError: the experiment itself is wrong, or no Ray answers.
    """
    check_experiment(experiment)
    checks, tracking = [], None
    try:
        tracking = _tracking(experiment, root)
        checks.append(Check(DRIVER, "tracking", True, _shown(tracking) if tracking else "a file on this machine"))
    except TrackingError as error:
        checks.append(Check(DRIVER, "tracking", False, str(error), "start the server, or correct its address"))
        uri = _asked_uri(experiment)
        tracking = uri if uri is not None and uri.startswith("http") else None
    probe = f"doctor/{uuid4().hex}"
    folder = _state_of(root)
    try:
        folder.write(probe, b"driver")
    except OSError as error:
        checks.append(_storage(DRIVER, root, error))
    questions = Questions(
        root if root.url else root.on_node(),
        tracking,
        experiment.data.model_dump_json(),
        experiment.teacher.checkpoint,
        probe,
    )
    try:
        with connected(address):
            mine = answers(questions)
            checks += judge(DRIVER, mine, mine, 0.0)
            checks += [check for node in _alive() for check in _of_node(node, questions, mine)]
            checks.append(_resources(experiment))
    finally:
        with suppress(OSError):
            folder.delete(probe)
            if folder.local is not None:
                (folder.local / "doctor").rmdir()
    return checks


def answers(questions: Questions) -> dict[str, Any]:
    """What this process finds; a sentence under a name is what went wrong, runs on every node."""
    found: dict[str, Any] = {"host": socket.gethostname(), "versions": _versions(), "time": time.time()}
    root = questions.root.on_node()
    found["storage"] = _tried(lambda: _write_and_read(_state_of(root), questions.probe))
    tracking = questions.tracking
    if tracking is not None:
        found["tracking"] = _tried(lambda: _ask(tracking))
    try:
        found["fingerprint"] = open_splits(DataSettings.model_validate_json(questions.data)).fingerprint
    except (HeterokdError, OSError) as error:
        found["data"] = str(error)
    if questions.teacher is not None:
        found["teacher"] = questions.teacher.stat().st_size if questions.teacher.is_file() else None
    place = root.path
    while not place.exists():
        place = place.parent
    found["free"] = shutil.disk_usage(place).free
    return found


def judge(node: str, found: Mapping[str, Any], mine: Mapping[str, Any], offset: float) -> list[Check]:
    """Checks of what a node answered.

    Args:
        node: its name.
        found: its answers.
        mine: the driver's.
        offset: seconds that its clock is ahead of the driver's.
    """
    checks = [
        Check(
            node,
            "storage",
            found["storage"] is None,
            found["storage"] or "written, read and deleted",
            "every node must see the same folder: give --root s3://BUCKET/..., gs://..., or a shared mount",
        )
    ]
    if "tracking" in found:
        told = found["tracking"]
        checks.append(
            Check(node, "tracking", told is None, told or "answers", "open the server's port to the nodes, or start it")
        )
    if "data" in found:
        advice = "put the data at data.root on every node, or on a mount that all have"
        checks.append(Check(node, "data", False, found["data"], advice))
    else:
        same = found["fingerprint"] == mine.get("fingerprint")
        told = "opens" if same else "is not the driver's data set: other files, or another version"
        checks.append(Check(node, "data", same, told, "copy the driver's data set to this node"))
    if "teacher" in found:
        same = found["teacher"] is not None and found["teacher"] == mine["teacher"]
        told = "the teacher's file is there" if same else "teacher.checkpoint: is missing here, or another file"
        checks.append(Check(node, "teacher", same, told, "copy it to the same path on every node"))
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


def _of_node(node: Mapping[str, Any], questions: Questions, mine: Mapping[str, Any]) -> list[Check]:
    name = str(node["NodeManagerAddress"])
    if len(_alive()) > 1 and [one["NodeManagerAddress"] for one in _alive()].count(name) > 1:
        name = f"{name} ({str(node['NodeID'])[:6]})"
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    asking = ray.remote(answers).options(num_cpus=0, scheduling_strategy=affinity, max_retries=0)
    answer = asking.remote(questions)
    done, _ = ray.wait([answer], timeout=ANSWER_SECONDS)
    if not done:
        ray.cancel(answer, force=True)
        told = f"gives no answer in {ANSWER_SECONDS:.0f} s"
        return [Check(name, "answers", False, told, "see `ray status` and the node's logs")]
    try:
        found = ray.get(answer)
        # Again, now that everything is imported there: what passes between asking and answering blurs the clock.
        began = time.time()
        theirs = ray.get(ray.remote(time.time).options(num_cpus=0, scheduling_strategy=affinity).remote(), timeout=60)
        ended = time.time()
    except ray.exceptions.RayError as error:
        told = str(error).strip().splitlines()[-1]
        return [
            Check(name, "answers", False, told, "install heterokd and its requirements.lock there, with this Python")
        ]
    offset = theirs - ended if theirs > ended else theirs - began if theirs < began else 0.0
    return judge(name, found, mine, offset)


def _resources(experiment: Experiment) -> Check:
    coming = coming_nodes()
    try:
        plan = plan_cluster(experiment)
    except UserError as error:
        return Check("cluster", "resources", False, str(error), "add nodes, or ask for less")
    gpus = experiment.search.gpus_per_trial
    if gpus != "auto" and gpus > 0 and not plan.gpus:
        told = f"search.gpus_per_trial asks for {gpus:g} GPU(s), and no node has or will have one"
        return Check("cluster", "resources", False, told, "add GPU nodes, or set search.gpus_per_trial: auto")
    told = f"{plan.parallel} trial(s) at a time, {plan.cpus:g} core(s) and {plan.gpus:g} GPU(s) each"
    if coming:
        told += f"; up to {len(coming)} of the nodes are still to come, and cannot be asked yet"
    return Check("cluster", "resources", True, told)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _state_of(root: Root) -> Folder:
    return root.store or open_folder(root.path)


def _storage(node: str, root: Root, error: OSError) -> Check:
    return Check(node, "storage", False, f"{root}: {error}", "check the address, the bucket and this machine's rights")


def _write_and_read(folder: Folder, probe: str) -> None:
    name = f"doctor/{socket.gethostname()}-{uuid4().hex}"
    folder.write(name, b"node")
    try:
        if folder.read(name) != b"node":
            raise OSError(f"{folder}/{name}: reads differently than it was written")
    finally:
        folder.delete(name)
    if not folder.exists(probe):
        raise OSError(f"{folder}: is not the folder that the driver sees (its file is not there)")


def _tried(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except (OSError, HeterokdError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "heterokd": __version__}
    for name in ("ray", "torch"):
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", None) or version(name))
        except (ImportError, PackageNotFoundError):
            found[name] = "missing"
    return found


def _asked_uri(experiment: Experiment) -> str | None:
    return experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")


def _tracking(experiment: Experiment, root: Root) -> str | None:
    """The tracking server's address, once it has answered; None where the store is a file or a database."""
    from heterokd.tracking import open_store

    uri = open_store(root, experiment.tracking.uri)
    return uri if uri.startswith("http") else None


def _shown(uri: str) -> str:
    from heterokd.tracking.store import shown

    return shown(uri)


def _ask(uri: str) -> None:
    from heterokd.tracking.store import probe

    probe(uri)


def table(checks: list[Check]) -> list[str]:
    """Checks in lines, and under each that failed what to do."""
    width = max(len(check.node) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.passed else 'FAIL'}  {check.node:<{width}}  {check.name:<9}  {check.told}")
        if not check.passed and check.advice:
            lines.append(f"      {'':<{width}}  {'':<9}  -> {check.advice}")
    return lines


def as_json(checks: list[Check]) -> dict[str, Any]:
    """Checks as JSON takes them."""
    return {"ok": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}
