"""Nodes at fault: which nodes a search avoids, which trials run again on another node, and when the search stops.

The decisions read plain values, no Ray. A fault that a check of the node finds (`heterokd.execution.node_checks`) is
certain. An exception of a training is a suspicion: it may be the method's fault. The trial then runs again on another
node; if it fails there for the same reason, the trial is at fault and the nodes are used again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from heterokd.study.failures import REASON_LENGTH, failure_kind

FEWEST_NODES = 3
"""Minimum number of avoided nodes at which a search stops although other nodes can train."""

MOST_MOVES = 3
"""Maximum number of nodes that a trial leaves because its process could not even start there."""


@dataclass(frozen=True)
class NodeFault:
    """Why trainings fail on a node, whatever their method.

    Attributes:
        node: Ray's id of the node.
        address: its address.
        reason: what failed, and what to do.
        is_certain: whether a check of the node found it; otherwise it is the exception of a training.
    """

    node: str
    address: str
    reason: str
    is_certain: bool = True


class NodeFaults:
    """Faults of the nodes of a search."""

    def __init__(self) -> None:
        self._faults: dict[str, NodeFault] = {}
        self._suspected: dict[int, list[NodeFault]] = {}  # by trial
        self._starts: dict[int, int] = {}  # processes of a trial that could not start
        self._checked: set[str] = set()
        self._proven: set[str] = set()

    @property
    def avoided(self) -> list[str]:
        """Ids of the nodes that trials avoid, in a fixed order."""
        return sorted(self._faults)

    @property
    def reasons(self) -> Mapping[str, str]:
        """Reasons by the nodes' addresses."""
        found: dict[str, list[str]] = {}
        for fault in self._faults.values():
            known = found.setdefault(fault.address, [])
            if (reason := _short(fault.reason)) not in known:
                known.append(reason)
        return {address: "; ".join(reasons) for address, reasons in found.items()}

    def is_checked(self, node: str) -> bool:
        """Whether a node has passed its checks."""
        return node in self._checked and node not in self._faults

    def passed(self, node: str) -> None:
        """Record that a node has passed its checks."""
        self._checked.add(node)

    def proved(self, node: str) -> None:
        """Record that a training has reported a rung from a node."""
        self._proven.add(node)

    def add(self, fault: NodeFault) -> None:
        """Avoid a node."""
        known = self._faults.get(fault.node)
        if known is None or (fault.is_certain and not known.is_certain):
            self._faults[fault.node] = fault

    def moves(self, number: int, fault: NodeFault, candidates: Collection[str]) -> bool:
        """Decide whether a trial that met a fault runs again on another node; False if the trial has failed.

        Args:
            number: number of the trial.
            fault: the fault.
            candidates: ids of the nodes on which a trial has room.
        """
        if fault.is_certain:
            self.add(fault)
            return True
        kind = failure_kind(fault.reason)
        earlier = [known for known in self._suspected.get(number, ()) if failure_kind(known.reason) == kind]
        if any(known.node != fault.node for known in earlier):
            # The same on two nodes: the nodes are not at fault, unless a check found something.
            for known in earlier:
                if self._faults.get(known.node) == known:
                    del self._faults[known.node]
            return False
        if not set(candidates) - self._faults.keys() - {fault.node}:
            return False  # there is no other node that could tell
        self._suspected.setdefault(number, []).append(fault)
        self.add(fault)
        return True

    def starts_again(self, number: int) -> bool:
        """Whether a trial whose process died before it began runs again: it is not at fault, and may find a node."""
        self._starts[number] = self._starts.get(number, 0) + 1
        return self._starts[number] <= MOST_MOVES

    def limit(self, candidates: Collection[str], *, may_grow: bool) -> str | None:
        """Return why the search stops, or None.

        It stops if no node is left on which a trial can run, or if most of at least `FEWEST_NODES` nodes are at fault.

        Args:
            candidates: ids of the nodes on which a trial has room.
            may_grow: whether nodes may be added.
        """
        faulty = len(self._faults)
        usable = (set(candidates) | self._proven) - self._faults.keys()
        none_left = not usable and not may_grow
        if not faulty or not (none_left or (faulty >= FEWEST_NODES and faulty > len(usable))):
            return None
        named = "; ".join(f"{address}: {reason}" for address, reason in self.reasons.items())
        return (
            f"{faulty} of {faulty + len(usable)} nodes cannot train, so the search has stopped and no trial is lost: "
            f"{named}; correct them, and continue with --resume"
        )


def _short(reason: str) -> str:
    return reason if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]}..."
