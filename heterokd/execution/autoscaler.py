"""Find which nodes Ray's autoscaler may add, from its launcher file on the head node.

Ray does not expose the autoscaler's node types to drivers. The launcher file is found by the autoscaler's command
line, which works only on the head node; elsewhere, and where Kubernetes runs the autoscaler in a separate container,
future nodes are unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

MONITOR = "monitor.py"
FILE = "--autoscaling-config="
ADDRESS = "--gcs-address="


def addable(gcs_address: str) -> list[Mapping[str, float]]:
    """Return the resources of each node that the autoscaler may add, preferred node types first.

    Args:
        gcs_address: HOST:PORT of the head node.
    """
    file = _file(gcs_address)
    return [] if file is None else list(addable_by(file))


def addable_by(file: Path) -> Iterator[Mapping[str, float]]:
    """Yield the resources of the nodes that a launcher file allows; none if it cannot be read."""
    try:
        config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return
    left = int(config.get("max_workers", 0))
    types: dict[str, dict[str, Any]] = config.get("available_node_types", {})
    by_priority = sorted(types.items(), key=lambda item: -float(item[1].get("priority", 0)))
    for name, node_type in by_priority:
        if name == config.get("head_node_type"):
            continue
        count = min(left, int(node_type.get("max_workers", left)))
        left -= count
        for _ in range(count):
            yield node_type.get("resources", {})


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
