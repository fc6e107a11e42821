"""Before launch: would every node reach what a search needs? Each node is asked, and answers for itself.

answers     the node gives an answer at all, with this heterokd and its libraries
storage     write, read and delete a file where state lives, and see the driver's
secrets     where that fails: what lets the driver into the store, and is not set there
tracking    an MLflow server answers; it lets the driver in
data        the data set opens, and is the same everywhere; a given teacher's file too
gpus        torch sees the GPUs that Ray counts there
versions    Python, Ray, torch and heterokd are the driver's
clock       within CLOCK_SECONDS of the driver's
disk        FREE_BYTES are free for working copies
resources   the GPUs and cores that the experiment asks for exist, or can be added

Nothing here waits for ever: all nodes are asked at once, and what does not answer in time fails under its name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from heterokd.config.experiment import Experiment
from heterokd.errors import TrackingError
from heterokd.execution.check import check_experiment
from heterokd.execution.driver import check_workers_root
from heterokd.execution.node_checks import (
    CHECK_SECONDS,
    DATA_SECONDS,
    DRIVER,
    Check,
    NodeProbe,
    answers,
    judge,
    now,
    sentence,
    started,
)
from heterokd.execution.placement import coming_nodes, plan_cluster
from heterokd.execution.ray_connection import check_address, connected
from heterokd.execution.ray_settings import ray
from heterokd.storage.filesystem import open_folder
from heterokd.storage.workspace import Workspace

ANSWER_SECONDS = 120.0
"""A node that imports torch for the first time takes its time, and its answer up to DATA_SECONDS."""
RESOURCE_SECONDS = 60.0
"""GPUs are asked for their memory, and wait while another search has them."""


def examine(experiment: Experiment, root: Workspace, address: str | None = None) -> list[Check]:
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
    checking = started(lambda: check_experiment(experiment))
    wrong = sentence(checking, ANSWER_SECONDS)
    if not checking.done():
        return [Check(DRIVER, "data", False, str(wrong), "see whether the mount of data.root answers on this machine")]
    checking.result()
    check_workers_root(experiment, root, address)
    check_address(address)
    tracking, checks = _tracking(experiment, root)
    probe = f"doctor/{uuid4().hex}"
    folder = root.store or open_folder(root.path)
    # Where it cannot be written, the driver's own answer says so.
    sentence(started(lambda: folder.write(probe, b"driver")), CHECK_SECONDS)
    questions = NodeProbe(
        root if root.url else root.on_node(),
        tracking,
        experiment.data.model_dump_json(),
        _checkpoints(experiment),
        probe,
    )
    try:
        with connected(address):
            mine = answers(questions)
            # What is said of its tracking server has been said.
            checks += judge(DRIVER, {key: told for key, told in mine.items() if key != "tracking"}, mine)
            checks += _nodes(questions, mine)
            checks.append(_resources(experiment))
    finally:
        sentence(started(lambda: folder.delete(probe)), CHECK_SECONDS)
        if folder.local is not None:
            with suppress(OSError):
                (folder.local / "doctor").rmdir()
    return checks


def _checkpoints(experiment: Experiment) -> dict[str, Path]:
    """The files of given teachers, by key."""
    given = experiment.teacher.checkpoint
    if isinstance(given, Mapping):
        return {f"teacher.checkpoint.{network}": file for network, file in given.items()}
    return {} if given is None else {"teacher.checkpoint": given}


def _nodes(questions: NodeProbe, mine: dict[str, Any]) -> list[Check]:
    """Every node's checks; all are asked at once."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = [str(node["NodeManagerAddress"]) for node in nodes]
    names = [
        address if addresses.count(address) == 1 else f"{address} ({str(node['NodeID'])[-6:]})"
        for node, address in zip(nodes, addresses, strict=True)
    ]
    asked = [_on(node, answers).remote(questions) for node in nodes]
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)
    checks = []
    for node, name, answer in zip(nodes, names, asked, strict=True):
        if answer in done:
            checks += _judged(node, name, answer, mine)
            continue
        ray.cancel(answer, force=True)
        told = f"gives no answer in {ANSWER_SECONDS:.0f} s"
        checks.append(Check(name, "answers", False, told, "see `ray status` and the node's logs"))
    return checks


def _judged(node: dict[str, Any], name: str, answer: Any, mine: dict[str, Any]) -> list[Check]:
    try:
        found = ray.get(answer)
        # Again, now that everything is imported there: what passes between asking and answering blurs the clock.
        began = time.time()
        theirs = ray.get(_on(node, now).remote(), timeout=CHECK_SECONDS)
        ended = time.time()
    except ray.exceptions.RayError as error:
        told = str(error).strip().splitlines()[-1]
        advice = "install heterokd and its requirements.lock there, with this Python"
        return [Check(name, "answers", False, told, advice)]
    offset = theirs - ended if theirs > ended else theirs - began if theirs < began else 0.0
    return judge(name, found, mine, offset, int(node["Resources"].get("GPU", 0)))


def _on(node: dict[str, Any], function: Any) -> Any:
    """A function that runs on one node, and takes no trial's place there."""
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=affinity, max_retries=0)


def _resources(experiment: Experiment) -> Check:
    planning = started(lambda: plan_cluster(experiment))
    wrong = sentence(planning, RESOURCE_SECONDS)
    if wrong is not None:
        return Check("cluster", "resources", False, wrong, "add nodes, wait for those that are taken, or ask for less")
    coming, plan = coming_nodes(), planning.result()
    gpus = experiment.search.gpus_per_trial
    if gpus != "auto" and gpus > 0 and not plan.gpus:
        told = f"search.gpus_per_trial asks for {gpus:g} GPU(s), and no node has or will have one"
        return Check("cluster", "resources", False, told, "add GPU nodes, or set search.gpus_per_trial: auto")
    told = f"{plan.parallel} trial(s) at a time, {plan.cpus:g} core(s) and {plan.gpus:g} GPU(s) each"
    if coming:
        told += f"; up to {len(coming)} of the nodes are still to come, and cannot be asked yet"
    return Check("cluster", "resources", True, told)


def _tracking(experiment: Experiment, root: Workspace) -> tuple[str | None, list[Check]]:
    """The tracking server that nodes are asked for (None where it is a file or a database), and the driver's check."""
    from heterokd.tracking.store import check_access, open_store, shown

    asked = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    server = asked.rstrip("/") if asked.startswith(("http://", "https://")) else None

    if not asked and not root.mlflow_database.exists():
        return None, [Check(DRIVER, "tracking", True, "a file on this machine, which the search makes")]

    def open_and_enter() -> None:
        opened = open_store(root, experiment.tracking.uri)
        if server is not None:
            check_access(opened)

    opening = started(open_and_enter)
    # A database may have to be brought up to date first.
    wrong = sentence(opening, CHECK_SECONDS if server else DATA_SECONDS)
    told = wrong or (shown(server) if server else "a file on this machine")
    known = opening.done() and isinstance(opening.exception(), TrackingError)  # whose sentences say what to do
    advice = "" if known else "start the server, or correct its address"
    return server, [Check(DRIVER, "tracking", wrong is None, told, advice)]


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
