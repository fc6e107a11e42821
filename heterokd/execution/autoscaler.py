"""Read from the launcher file on the head node which nodes Ray's autoscaler may add.

Ray does not tell drivers the autoscaler's node types. The launcher file is found by the autoscaler's command line,
which works only on the head node; elsewhere, and where Kubernetes runs the autoscaler in a separate container, future
nodes are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from heterokd.storage.typed_json import parse

MONITOR = "monitor.py"
FILE = "--autoscaling-config="
ADDRESS = "--gcs-address="


@dataclass(frozen=True)
class _NodeType:
    resources: Mapping[str, float] = field(default_factory=dict)
    max_workers: int | None = None
    priority: float = 0.0


@dataclass(frozen=True)
class _Launcher:
    max_workers: int = 0
    head_node_type: str = ""
    available_node_types: Mapping[str, _NodeType] = field(default_factory=dict)


def addable(gcs_address: str) -> list[Mapping[str, float]]:
    """Return the resources of each node that the autoscaler may add, preferred node types first.

    Args:
        gcs_address: HOST:PORT of the head node.
    """
    file = _file(gcs_address)
    return [] if file is None else addable_by(file)


def addable_by(file: Path) -> list[Mapping[str, float]]:
    """Return the resources of the nodes that a launcher file allows; none if it cannot be read."""
    try:
        launcher = parse(_Launcher, yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    nodes: list[Mapping[str, float]] = []
    types = [kind for name, kind in launcher.available_node_types.items() if name != launcher.head_node_type]
    for kind in sorted(types, key=lambda kind: -kind.priority):
        left = launcher.max_workers - len(nodes)
        nodes += [kind.resources] * min(left, left if kind.max_workers is None else kind.max_workers)
    return nodes


def _file(gcs_address: str) -> Path | None:
    port = gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        command: list[str] = process.info["cmdline"] or []
        if not any(part.endswith(MONITOR) for part in command):
            continue
        given = {key: part.removeprefix(key) for part in command for key in (FILE, ADDRESS) if part.startswith(key)}
        if given.get(FILE) and given.get(ADDRESS, "").rpartition(":")[2] == port:
            return Path(given[FILE]).expanduser()
    return None
