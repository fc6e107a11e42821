"""Ray's calls in this process, for tests without a Ray: nodes are names, actors are plain objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from heterokd.execution.ray_settings import ray, tune


class Here:
    """An actor in this process, called as Ray's handles are."""

    def __init__(self, actor: object) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.actor, name))


@dataclass
class FakeRay:
    """What Ray answers.

    Attributes:
        node: id of the node of this process.
        nodes: ids of the living nodes.
        reports: what this process reported to Ray Tune.
    """

    node: str = "here"
    nodes: Sequence[str] = ("here",)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def listed(self) -> list[dict[str, Any]]:
        """Return the nodes as `ray.nodes` does."""
        return [{"NodeID": node, "Alive": True, "Resources": {"CPU": 4.0}} for node in self.nodes]

    def answers(self) -> list[tuple[Any, str, Callable[..., object]]]:
        """Return the functions that replace Ray's: module, name, function."""
        return [
            (ray, "get", lambda answer: answer),
            (ray, "is_initialized", lambda: False),
            (ray, "nodes", self.listed),
            (ray, "get_gpu_ids", list),
            (ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: self.node)),
            (ray.util, "get_node_ip_address", lambda: f"address of {self.node}"),
            (tune, "report", self.reports.append),
        ]
