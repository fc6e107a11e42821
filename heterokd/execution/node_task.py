"""Tasks: heavy work of a driver in tasks on the nodes of a cluster, with the resources of a trial.

Fitting and verifying teachers, checking caches, the figures of a study and evaluations on the test split are computed
by tasks where the driver's node is not the only place for them (`tasks_on`), and otherwise by the driver's process. Ray
starts the task of a process or a node that died again, also on another node; what a task has left in the workspace (the
checkpoint of a fit) is where it continues. A task checks its node first, as a trial does; a node at fault is avoided.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar
from uuid import uuid4

import torch

from heterokd import errors
from heterokd.config.experiment import Experiment
from heterokd.errors import CheckpointError, HeterokdError, SearchError
from heterokd.execution.answers import answer_questions, open_channel
from heterokd.execution.failure_cause import first_line_of
from heterokd.execution.node_checks import NodeProbe, needed_files, probe_node
from heterokd.execution.node_faults import NodeFault, NodeFaults
from heterokd.execution.parallel import other_nodes
from heterokd.execution.placement import Cluster, future_nodes, plan_cluster
from heterokd.execution.ray_connection import connected
from heterokd.execution.ray_settings import ray
from heterokd.execution.this_node import NodeCheck, gpu_fault, nodes_with_room, suspicion, this_node
from heterokd.execution.worker_channel import Raised
from heterokd.storage.filesystem import open_folder
from heterokd.storage.workspace import Workspace
from heterokd.training.data import stored_data
from heterokd.training.train import Metrics, Report

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

RESTARTS = 3
"""Maximum restarts of a task whose process or node died."""
PATIENCE_SECONDS = 30.0
"""Time after which it is said that a task waits for a node: a process that loads PyTorch starts in less."""


@dataclass(frozen=True)
class TaskAnswer:
    """What a task returns.

    Attributes:
        value: of the function; None if it raised.
        warnings: logger, level and message of its warnings, which the driver repeats.
        fault: the fault of the node, found by a check or suspected because of an exception.
        raised: an error of heterokd.
    """

    value: object = None
    warnings: tuple[tuple[str, int, str], ...] = ()
    fault: NodeFault | None = None
    raised: Raised | None = None


@dataclass(frozen=True)
class Tasks:
    """Runs functions in tasks on the connected Ray.

    Attributes:
        place: plan of the experiment's trials, whose resources a task has.
        check: what a node is compared with.
        may_grow: whether nodes may be added.
        faults: nodes that are avoided.
    """

    place: Cluster
    check: NodeCheck
    may_grow: bool = False
    faults: NodeFaults = field(default_factory=NodeFaults)

    def run(
        self,
        what: str,
        report: Report | None,
        function: Callable[Concatenate[Report, P], T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> T:
        """Call a function on a node; return its value.

        Args:
            what: what it does, for messages.
            report: called here with what the function reports; its answer is returned there.
            function: function of a module, whose first parameter is `report`.
            arguments: its other arguments.
            named: its other arguments, by name.

        Raises:
            HeterokdError: raised by the function.
            SearchError: its process died too often, or no node can run it.
            ray.exceptions.RayTaskError: any other exception of the function.
        """
        while True:
            answer = self._answer(what, report or (lambda metrics: True), function, arguments, named)
            for name, level, message in answer.warnings:
                logging.getLogger(name).log(level, "%s", message)
            moves = answer.fault is not None and avoid_node(
                self.faults, answer.fault, self.place.needs, may_grow=self.may_grow
            )
            if moves:
                continue
            if answer.raised is not None:
                raise getattr(errors, answer.raised.kind, HeterokdError)(answer.raised.sentence)
            if answer.fault is not None:
                raise SearchError(f"{what}: {no_node(answer.fault)}")
            value: T = answer.value  # type: ignore[assignment]
            return value

    def _answer(
        self,
        what: str,
        report: Report,
        function: Callable[..., object],
        arguments: tuple[object, ...],
        named: Mapping[str, object],
    ) -> TaskAnswer:
        channel, began, is_told = open_channel(), time.monotonic(), False
        task = ray.remote(run_here).options(
            num_cpus=self.place.cpus,
            num_gpus=self.place.gpus,
            max_retries=RESTARTS,
            label_selector=other_nodes(self.faults.avoided),
        )
        threads = max(1, int(self.place.cpus))
        running = task.remote(function, arguments, named, threads, self.check, channel)

        def has_ended() -> bool:
            nonlocal is_told
            done, _ = ray.wait([running], timeout=0)
            if not done and not is_told and time.monotonic() - began > PATIENCE_SECONDS:
                is_told = True
                if not ray.get(channel.has_begun.remote()):
                    needs = f"{self.place.cpus:g} core(s) and {self.place.gpus:g} GPU(s)"
                    logger.warning("%s: waits for a node with %s to be free or to be added", what, needs)
            return bool(done)

        try:
            answer_questions(channel, report, has_ended)
            answer: TaskAnswer = ray.get(running)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise SearchError(
                f"{what}: its process or its node died {RESTARTS + 1} times ({first_line_of(error)}); what it has "
                "finished is kept, and the same command continues"
            ) from error
        finally:
            ray.cancel(running, force=True)  # of an interrupted driver; nothing happens to a task that has ended
            ray.kill(channel)
        return answer


# An argument for each thing that a task must be told.
def run_here(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    named: Mapping[str, object],
    threads: int,
    check: NodeCheck,
    channel: ray.actor.ActorHandle,
) -> TaskAnswer:
    """Check this node and call a function, see `Tasks.run`."""
    torch.set_num_threads(threads)
    ray.get(channel.begin.remote())
    fault = gpu_fault() or check.fault()
    if fault is not None:
        return TaskAnswer(fault=fault)

    def report(metrics: Metrics) -> bool:
        go_on: bool = ray.get(channel.ask.remote(metrics))
        return go_on

    with _collected() as warnings:
        try:
            return TaskAnswer(function(report, *arguments, **named), tuple(warnings))
        except Exception as error:
            # The files of given weights have been checked, so that a fault of weights is not the node's.
            fault = None if isinstance(error, CheckpointError) else suspicion(error, check)
            if isinstance(error, HeterokdError):
                raised = Raised(type(error).__name__, str(error), fault)
                return TaskAnswer(warnings=tuple(warnings), fault=fault, raised=raised)
            if fault is not None:
                return TaskAnswer(warnings=tuple(warnings), fault=fault)
            raise


class _Collecting(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.name, record.levelno, record.getMessage()))


@contextmanager
def _collected() -> Iterator[list[tuple[str, int, str]]]:
    """Collect the warnings of heterokd."""
    handler, package = _Collecting(), logging.getLogger("heterokd")
    package.addHandler(handler)
    try:
        yield handler.records
    finally:
        package.removeHandler(handler)


def avoid_node(faults: NodeFaults, fault: NodeFault, needs: Mapping[str, float], *, may_grow: bool) -> bool:
    """Avoid a node at fault; return False if the fault is not the node's, or no other node is left.

    Args:
        faults: nodes that are avoided.
        fault: the fault.
        needs: resources that are needed on a node.
        may_grow: whether nodes may be added.
    """
    candidates = nodes_with_room(needs)
    moves = faults.moves(0, fault, candidates)
    if moves and (may_grow or set(candidates) - set(faults.avoided)):
        logger.warning("node %s is avoided: %s", fault.address, fault.reason)
        return True
    return False


def no_node(fault: NodeFault) -> str:
    """Return the clause for work that no node can do."""
    return f"no node of the cluster can do it ({fault.address}: {fault.reason}); correct it, and run the command again"


@contextmanager
def tasks_on(experiment: Experiment, root: Workspace, address: str | None) -> Iterator[Tasks | None]:
    """Connect to a cluster; yield the tasks that do heavy work there, or None where the driver's process does it.

    The driver's process does it without an address, and on a cluster whose only node is the driver's, to which none may
    be added and which has no GPU: a second process would only take time. A GPU is Ray's to assign, so that with a GPU
    a task is used in any case.

    Args:
        experiment: the experiment.
        root: workspace.
        address: address of a Ray cluster, or None.

    Raises:
        ConfigError: no cluster answers, or no trial fits.
        OSError: the store of the workspace does not answer.
    """
    if address in (None, "local"):
        yield None
        return
    with connected(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        may_grow = bool(future_nodes(experiment.cluster.resources))
        has_gpu = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
        if not (may_grow or has_gpu or any(node["NodeID"] != this_node() for node in nodes)):
            yield None
            return
        place = plan_cluster(experiment)
        with _node_check(experiment, root) as check:
            yield Tasks(place, check, may_grow)


@contextmanager
def _node_check(experiment: Experiment, root: Workspace) -> Iterator[NodeCheck]:
    """Yield what nodes are compared with; a file in the workspace shows them that it is the driver's."""
    folder, probe = root.store or open_folder(root.path), f"doctor/{uuid4().hex}"
    folder.write(probe, b"driver")
    where = root if root.url else root.on_node()
    data = experiment.data.model_dump_json()
    stored = stored_data(experiment.data)
    fetched = 0 if stored is None else stored.total_bytes
    files = needed_files(experiment, root)
    questions = NodeProbe(where, tracking=None, data=data, teachers=files, probe=probe, fetched_bytes=fetched)
    try:
        yield NodeCheck(this_node(), questions, probe_node(questions))
    finally:
        with suppress(OSError):
            folder.delete(probe)
            if folder.local is not None:
                (folder.local / "doctor").rmdir()
