"""Check every node of a cluster once, also nodes that join later; name faulty nodes; stop where most are faulty."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from heterokd.config.experiment import Experiment
from heterokd.execution.failure_limit import FailureLimit
from heterokd.execution.node_checks import (
    NodeAnswers,
    NodeProbe,
    evaluate,
    needed_files,
    probe_node,
)
from heterokd.execution.node_faults import NodeFault
from heterokd.execution.parallel import Parallelism
from heterokd.execution.placement import future_nodes, node_resources
from heterokd.execution.ray_settings import only_on, ray
from heterokd.execution.this_node import NodeCheck, fault_reason, nodes_with_room, this_node
from heterokd.formatting import format_size
from heterokd.storage.machine_load import under_load
from heterokd.storage.workspace import Workspace
from heterokd.training.data import stored_data

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2


def node_check(experiment: Experiment, workspace: Workspace) -> NodeCheck:
    """Return what the nodes of a cluster are compared with: the answers of the driver's node.

    The study's folder holds its experiment.yaml already, by which nodes recognize the driver's workspace.
    """
    study = workspace.study(experiment.name)
    probe = study.experiment_file.relative_to(workspace.path).as_posix()
    workspace.mirror(study.path).push(skip=("trials",))
    root = workspace if workspace.url else workspace.on_node()
    data = experiment.data.model_dump_json()
    questions = NodeProbe(root, tracking=None, data=data, teachers=needed_files(experiment, workspace), probe=probe)
    # Nodes fetch a data set in a store before their first trial; the driver needs no copy.
    stored = stored_data(experiment.data)
    fetched = 0 if stored is None else stored.total_bytes
    if fetched:
        logger.info("each node fetches %s of %s before its first trial", format_size(fetched), stored)
    return NodeCheck(this_node(), replace(questions, fetched_bytes=fetched), probe_node(questions))


class NodeWatch:
    """Watches the nodes of a search; the study's actor collects their faults.

    Attributes:
        failures: stops the search.
    """

    def __init__(
        self,
        actor: ray.actor.ActorHandle,
        check: NodeCheck | None,
        plan: Parallelism,
        failures: FailureLimit,
    ) -> None:
        """Watch the connected Ray.

        Args:
            actor: handle of the `StudyActor`.
            check: what nodes are compared with; None on a local Ray, whose only node is the driver's.
            plan: how many trials run at a time, which follows the nodes.
            failures: stops the search.
        """
        self.failures = failures
        self._actor, self._check, self._plan = actor, check, plan
        self._known = set() if check is None else {check.driver}
        self._asked: dict[str, tuple[str, float, ray.ObjectRef]] = {}
        self._named: dict[str, str] = {}
        self._usable = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}

    def wait(self) -> None:
        """Check the nodes that exist, before the first trial."""
        self.look()
        while self._asked:
            time.sleep(POLL_SECONDS)
            self.look()

    def look(self) -> None:
        """Start checks of new nodes, collect finished ones, and stop the search if its nodes are at fault."""
        if self._check is not None:
            self._follow()
            self._ask()
            for node in list(self._asked):
                self._collect(node, self._check)
        reasons: Mapping[str, str] = ray.get(self._actor.node_reasons.remote())
        for address, reason in reasons.items():
            if self._named.get(address) != reason:
                logger.warning("node %s is avoided: %s", address, reason)
        self._named = dict(reasons)
        if reasons:
            may_grow = bool(future_nodes(self._plan.experiment.cluster.resources))
            candidates = nodes_with_room(self._plan.cluster.needs)
            sentence: str | None = ray.get(self._actor.node_limit.remote(candidates, may_grow))
            if sentence is not None:
                self.failures.stop(sentence)

    def _follow(self) -> None:
        """Let the number of parallel trials follow the nodes, if these have changed."""
        avoided: list[str] = ray.get(self._actor.avoided.remote())
        usable = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]} - set(avoided)
        if usable != self._usable:
            self._usable = usable
            self._plan.follow(node_resources(self._plan.experiment, avoided))

    def _ask(self) -> None:
        assert self._check is not None
        for node in ray.nodes():
            identity = str(node["NodeID"])
            if node["Alive"] and identity not in self._known:
                self._known.add(identity)
                asking = ray.remote(probe_node).options(
                    num_cpus=0, scheduling_strategy=only_on(identity), max_retries=0
                )
                answer = asking.remote(self._check.questions)
                self._asked[identity] = str(node["NodeManagerAddress"]), time.monotonic(), answer

    def _collect(self, node: str, check: NodeCheck) -> None:
        address, began, answer = self._asked[node]
        done, _ = ray.wait([answer], timeout=0)
        seconds = under_load(check.questions.answer_seconds)
        if not done and time.monotonic() - began < seconds:
            return
        del self._asked[node]
        if not done:
            ray.cancel(answer, force=True)
            reason: str | None = f"answers: no answer in {seconds:.0f} s (see `ray status` and the node's logs)"
        else:
            reason = _reason(answer, address, check)
        if node not in {each["NodeID"] for each in ray.nodes() if each["Alive"]}:
            return  # it has died, which is no fault of a living node
        if reason is None:
            self._actor.node_passed.remote(node)
        else:
            ray.get(self._actor.node_failed.remote(NodeFault(node, address, reason)))


def _reason(answer: ray.ObjectRef, address: str, check: NodeCheck) -> str | None:
    """Return the fault that a node's answers show, or None. A trial's process there checks its GPUs."""
    try:
        found: NodeAnswers = ray.get(answer)
    except ray.exceptions.RayError as error:
        finding = str(error).strip().splitlines()[-1]
        return f"answers: {finding} (install heterokd and its requirements-runtime.lock there, with this Python)"
    return fault_reason(evaluate(address, found, check.mine), has_own_disk=check.questions.root.url is not None)
