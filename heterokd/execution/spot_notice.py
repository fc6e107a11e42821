"""Drain this machine's Ray node when AWS announces that it takes the spot instance back.

    python -m heterokd.execution.spot_notice --address HEAD:6379

Ray's autoscaler does not watch for the announcement. ray_cluster.yaml starts this program next to each GPU node. After
a notice, Ray starts nothing more on the node, and its trials save a checkpoint at the end of their epoch. The program
ends after a notice, and at once on an instance that is not a spot instance.

The notice is two minutes long. Source: "Spot Instance interruption notices" and "Use the Instance Metadata Service" in
the EC2 user guide.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

METADATA = "http://169.254.169.254"
POLL_SECONDS = 5.0
"""AWS recommends to ask every five seconds."""

TOKEN_SECONDS = 6 * 3600
REQUEST_SECONDS = 2.0


@dataclass
class Metadata:
    """An EC2 instance's metadata service, version 2.

    Attributes:
        url: the service's address.
    """

    url: str = METADATA
    _token: str | None = field(default=None, repr=False)

    def get(self, name: str) -> str | None:
        """Return an entry of `latest/meta-data`; None if it does not exist.

        Raises:
            OSError: if the service does not answer, or answers with another error.
        """
        for renewed in (False, True):
            if self._token is None or renewed:
                self._token = self._ask(
                    "api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                )
            try:
                return self._ask(f"meta-data/{name}", "GET", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or renewed:
                    raise
        return None

    def _ask(self, path: str, method: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"{self.url}/latest/{path}", method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            return str(answer.read().decode())


def seconds_left(action: str, now: datetime) -> int:
    """Return how long an instance still runs, in seconds and at least 0, by its `spot/instance-action`.

    Raises:
        ValueError: if the text is no such action.
    """
    try:
        end = datetime.fromisoformat(json.loads(action)["time"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a spot notice without a time: {action}") from error
    return max(0, int((end - now).total_seconds()))


def wait_for_notice(metadata: Metadata, pause: Callable[[], None]) -> int | None:
    """Wait until the instance is announced to end.

    Args:
        metadata: the instance's service.
        pause: called between two requests.

    Returns:
        The seconds that are left; None if this is not a spot instance.
    """
    is_spot: bool | None = None
    while True:
        try:
            if is_spot is None:
                is_spot = metadata.get("instance-life-cycle") == "spot"
            if not is_spot:
                return None
            action = metadata.get("spot/instance-action")
            if action is not None:
                return seconds_left(action, datetime.now(UTC))
        except (OSError, ValueError) as error:
            print(f"the metadata service: {error}", file=sys.stderr, flush=True)
        pause()


def drain(address: str, node_ip: str, seconds: int) -> list[str]:
    """Drain the worker nodes of this machine, as `ray drain-node` does.

    Args:
        address: HOST:PORT of the cluster's head.
        node_ip: by which Ray knows the machine.
        seconds: after which it ends.

    Returns:
        The IDs of the drained nodes.

    Raises:
        RuntimeError: if Ray refuses, with its reason.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub is incomplete
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    client = GcsClient(address=address)
    nodes = client.get_all_node_info(timeout=seconds or None, state_filter=gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE)
    here = [(node_id, node) for node_id, node in nodes.items() if node.node_manager_address == node_ip]
    drained = [node_id.hex() for node_id, node in here if not node.is_head_node]  # Ray cannot do without its head
    for node_id in drained:
        accepted, refusal = client.drain_node(
            node_id,
            autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,
            "the spot instance is taken back",
            int((time.time() + seconds) * 1000),
        )
        if not accepted:
            raise RuntimeError(f"Ray refuses to drain node {node_id}: {refusal}")
    return drained


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description="Drain this machine's Ray node after a spot notice of AWS.")
    parser.add_argument("--address", required=True, help="HOST:PORT of the cluster's head")
    parser.add_argument("--node-ip", help="by which Ray knows this machine; found by Ray if not given")
    parser.add_argument("--metadata", default=METADATA, help="the address of the metadata service")
    parser.add_argument("--poll", type=float, default=POLL_SECONDS, help="seconds between two requests")
    given = parser.parse_args(arguments)

    left = wait_for_notice(Metadata(given.metadata), lambda: time.sleep(given.poll))
    if left is None:
        print("not a spot instance: nothing to watch")
        return 0
    from ray.util import get_node_ip_address

    drained = drain(given.address, given.node_ip or get_node_ip_address(), left)
    print(f"the spot instance ends in {left} s; drained: {', '.join(drained) or 'no node of this machine'}")
    return 0 if drained else 1


if __name__ == "__main__":
    sys.exit(main())
