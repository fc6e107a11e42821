"""Check before launch that every node can reach what a search needs.

answers     the node runs this heterokd and its libraries
storage     the node writes, reads and deletes a file in the workspace, and sees the driver's file
secrets     where that fails: credentials that are set for the driver and not on the node
tracking    the MLflow server answers, and accepts the driver
data        the data set opens and is the same everywhere; so is the file of a given teacher
gpus        torch sees the GPUs that Ray counts on the node
versions    Python, Ray, torch and heterokd are the driver's
clock       within CLOCK_SECONDS of the driver's
disk        FREE_BYTES are free for working copies
resources   the GPUs and cores that the experiment asks for exist, or can be added

All nodes are checked at once; a check that does not finish in time fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

from heterokd.config.experiment import Experiment
from heterokd.errors import TrackingError, without_password
from heterokd.execution.check import check_experiment
from heterokd.execution.node_checks import (
    ANSWER_SECONDS,
    CHECK_SECONDS,
    DATA_SECONDS,
    DRIVER,
    Check,
    NodeAnswers,
    NodeProbe,
    error_of,
    evaluate,
    needed_files,
    now,
    probe_node,
)
from heterokd.execution.placement import future_nodes, plan_cluster
from heterokd.execution.ray_connection import check_address, connected
from heterokd.execution.ray_settings import only_on, ray
from heterokd.execution.threads import in_thread
from heterokd.storage.filesystem import open_folder
from heterokd.storage.machine_load import under_load
from heterokd.storage.workspace import Workspace

RESOURCE_SECONDS = 60.0
"""Timeout for the GPUs' memory: GPUs that another search holds do not answer."""


def examine(experiment: Experiment, root: Workspace, address: str | None = None) -> list[Check]:
    """Check the driver and every node of a Ray cluster.

    Args:
        experiment: experiment to be searched.
        root: workspace of the search.
        address: address of the Ray cluster; None checks a local Ray.

    Returns:
        All checks, the driver's first.

    Raises:
        UserError: the experiment is wrong, or no Ray answers.
    """
    checking = in_thread(lambda: check_experiment(experiment))
    wrong = error_of(checking, under_load(ANSWER_SECONDS))
    if not checking.done():
        return [Check(DRIVER, "data", False, wrong, "check that the mount of data.root answers on this machine")]
    checking.result()
    check_address(address)
    tracking, checks = _tracking(experiment, root)
    probe = f"doctor/{uuid4().hex}"
    folder = root.store or open_folder(root.path)
    # If this fails, so does the driver's storage check.
    error_of(in_thread(lambda: folder.write(probe, b"driver")), under_load(CHECK_SECONDS))
    questions = NodeProbe(
        root if root.url else root.on_node(),
        tracking,
        experiment.data.model_dump_json(),
        needed_files(experiment, root),
        probe,
    )
    try:
        with connected(address):
            mine = probe_node(questions)
            # The driver's tracking server has been checked above.
            checks += evaluate(DRIVER, replace(mine, tracking=None), mine)
            checks += _nodes(questions, mine)
            checks.append(_resources(experiment))
    finally:
        error_of(in_thread(lambda: folder.delete(probe)), under_load(CHECK_SECONDS))
        if folder.local is not None:
            with suppress(OSError):
                (folder.local / "doctor").rmdir()
    return checks


def _nodes(questions: NodeProbe, mine: NodeAnswers) -> list[Check]:
    """Check all nodes at once."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = [str(node["NodeManagerAddress"]) for node in nodes]
    names = [
        address if addresses.count(address) == 1 else f"{address} ({str(node['NodeID'])[-6:]})"
        for node, address in zip(nodes, addresses, strict=True)
    ]
    asking = [_on(node["NodeID"], probe_node).remote(questions) for node in nodes]
    most = under_load(ANSWER_SECONDS)
    done, _ = ray.wait(asking, num_returns=len(asking), timeout=most)
    checks = []
    for node, name, answer in zip(nodes, names, asking, strict=True):
        if answer in done:
            gpus = int(node["Resources"].get("GPU", 0))
            checks += _node_checks(node["NodeID"], name, answer, mine, gpus)
            continue
        ray.cancel(answer, force=True)
        finding = f"no answer in {most:.0f} s"
        checks.append(Check(name, "answers", False, finding, "see `ray status` and the node's logs"))
    return checks


def _node_checks(node_id: str, name: str, answer: ray.ObjectRef, mine: NodeAnswers, gpus: int) -> list[Check]:
    try:
        found: NodeAnswers = ray.get(answer)
        # A second call, now that everything is imported there: a fast answer dates the node's clock.
        began = time.time()
        theirs = ray.get(_on(node_id, now).remote(), timeout=under_load(CHECK_SECONDS))
        ended = time.time()
    except ray.exceptions.RayError as error:
        finding = str(error).strip().splitlines()[-1]
        advice = "install heterokd and its requirements-runtime.lock there, with this Python"
        return [Check(name, "answers", False, finding, advice)]
    offset = theirs - ended if theirs > ended else theirs - began if theirs < began else 0.0
    return evaluate(name, found, mine, offset, gpus)


def _on(node_id: str, function: Callable[..., object]) -> ray.remote_function.RemoteFunction:
    """Pin a function to a node, without taking a trial's resources."""
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=only_on(node_id), max_retries=0)


def _resources(experiment: Experiment) -> Check:
    planning = in_thread(lambda: plan_cluster(experiment))
    wrong = error_of(planning, under_load(RESOURCE_SECONDS))
    if wrong:
        return Check("cluster", "resources", False, wrong, "add nodes, wait for busy nodes, or ask for less")
    coming, plan = future_nodes(experiment.cluster.resources), planning.result()
    gpus = experiment.search.gpus_per_trial
    if gpus != "auto" and gpus > 0 and not plan.gpus:
        finding = f"search.gpus_per_trial asks for {gpus:g} GPU(s), and no node has or will have one"
        return Check("cluster", "resources", False, finding, "add GPU nodes, or set search.gpus_per_trial: auto")
    finding = f"{plan.parallel} trial(s) at a time, {plan.cpus:g} core(s) and {plan.gpus:g} GPU(s) each"
    if coming:
        finding += f"; up to {len(coming)} of the nodes do not exist yet, and cannot be checked"
    return Check("cluster", "resources", True, finding)


def _tracking(experiment: Experiment, root: Workspace) -> tuple[str | None, list[Check]]:
    """Return the tracking server that nodes must reach (None for a file or a database), and the driver's check."""
    from heterokd.tracking.store import check_access, open_store

    asked = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    server = asked.rstrip("/") if asked.startswith(("http://", "https://")) else None

    if not asked and not root.mlflow_database.exists():
        return None, [Check(DRIVER, "tracking", True, "a file on this machine, which the search creates")]

    def open_and_enter() -> None:
        opened = open_store(root, experiment.tracking.uri)
        if server is not None:
            check_access(opened)

    opening = in_thread(open_and_enter)
    # A database may have to be migrated first.
    wrong = error_of(opening, under_load(CHECK_SECONDS if server else DATA_SECONDS))
    finding = wrong or (without_password(server) if server else "a file on this machine")
    known = opening.done() and isinstance(opening.exception(), TrackingError)  # its message already says what to do
    advice = "" if known else "start the server, or correct its address"
    return server, [Check(DRIVER, "tracking", not wrong, finding, advice)]


def table(checks: list[Check]) -> list[str]:
    """Format checks as lines; under each failed check what to do."""
    width = max(len(check.node) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.passed else 'FAIL'}  {check.node:<{width}}  {check.name:<9}  {check.finding}")
        if not check.passed and check.advice:
            lines.append(f"      {'':<{width}}  {'':<9}  -> {check.advice}")
    return lines


def as_json(checks: list[Check]) -> dict[str, object]:
    """Convert checks to JSON values."""
    rows = [
        {"node": check.node, "name": check.name, "passed": check.passed, "told": check.finding, "advice": check.advice}
        for check in checks
    ]
    return {"ok": all(check.passed for check in checks), "checks": rows}
