"""Faults of the node on which a trial's process or a worker runs, distinguished from those of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from heterokd.errors import CheckpointError, DataError, HeterokdError
from heterokd.execution.node_checks import Check, NodeAnswers, NodeProbe, evaluate, probe_node
from heterokd.execution.node_faults import NodeFault
from heterokd.execution.ray_settings import ray

OF_A_NODE = ("answers", "storage", "secrets", "data", "teacher", "gpus", "versions")
"""Names of the checks whose failure makes every training on a node fail."""

GPU_MESSAGES = (
    "no cuda gpus are available",
    "found no nvidia driver",
    "driver version is insufficient",
    "no kernel image is available",
    "busy or unavailable",
    "initialization error",
    "ecc error",
    "fallen off the bus",
    "device is lost",
)
"""Parts of messages of CUDA and torch, in lower case, that name a GPU or its driver and no operation of a method."""


class NodeError(HeterokdError):
    """A worker met a fault of its node."""

    def __init__(self, fault: NodeFault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


@dataclass(frozen=True)
class NodeCheck:
    """What a node is compared with.

    Attributes:
        driver: id of the driver's node, where everything was opened before the search.
        questions: questions to a node.
        mine: the answers of the driver's node.
    """

    driver: str
    questions: NodeProbe
    mine: NodeAnswers

    def fault(self) -> NodeFault | None:
        """Check this node; return its fault, or None."""
        if this_node() == self.driver:
            return None
        checks = evaluate(_address(), probe_node(self.questions), self.mine)
        reason = fault_reason(checks, has_own_disk=self.questions.root.url is not None)
        return None if reason is None else here(reason)


def this_node() -> str:
    """Return Ray's id of this node."""
    return str(ray.get_runtime_context().get_node_id())


def gpu_fault() -> NodeFault | None:
    """Return a fault if torch does not see a GPU that Ray assigned to this process; it would train on the CPU."""
    promised, seen = len(ray.get_gpu_ids()), torch.cuda.device_count()
    if seen >= promised:
        return None
    return here(
        f"gpus: torch sees {seen} GPU(s), and Ray promised {promised}; install the GPU's driver and a torch build for "
        "it there, or start that node with --num-gpus=0"
    )


def fault_reason(checks: list[Check], *, has_own_disk: bool) -> str | None:
    """Return the failed checks of a node that make every training on it fail as a sentence, or None.

    `has_own_disk`: whether working copies lie on the node's disk, and not in a folder that all nodes share.
    """
    names = (*OF_A_NODE, "disk") if has_own_disk else OF_A_NODE
    failed = [check for check in checks if check.name in names and not check.passed]
    return "; ".join(f"{check.name}: {check.finding} ({check.advice})" for check in failed) or None


def suspicion(error: BaseException, check: NodeCheck | None) -> NodeFault | None:
    """Return the suspicion that a training's exception is this node's fault, or None.

    Data, files and modules were opened on the driver's node, so that their absence elsewhere is not the method's
    fault. On the driver's node, and on a local Ray, only a GPU can be at fault.
    """
    if isinstance(error, NodeError):
        return error.fault
    is_elsewhere = check is not None and this_node() != check.driver
    if _is_of_gpu(error) or (is_elsewhere and _is_of_files(error)):
        return here(f"{type(error).__name__}: {error}", is_certain=False)
    return None


def here(reason: str, *, is_certain: bool = True) -> NodeFault:
    """Return a fault of this node."""
    return NodeFault(this_node(), _address(), reason, is_certain)


def nodes_with_room(needs: Mapping[str, float]) -> list[str]:
    """Return the ids of the nodes that have the resources of a trial, or of one of its workers, free or not."""
    return [
        str(node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0.0) >= amount for name, amount in needs.items())
    ]


def _address() -> str:
    return str(ray.util.get_node_ip_address())


def _is_of_files(error: BaseException) -> bool:
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (DataError, CheckpointError, ImportError, OSError)):
            return True
        found = found.__cause__ or found.__context__
    return False


def _is_of_gpu(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in GPU_MESSAGES)
