"""Which sockets processes listen on, and whether others than this machine reach them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from contextlib import suppress

import psutil


def listening(processes: Iterable[psutil.Process]) -> dict[str, str]:
    """HOST:PORT of every listening TCP and every bound UDP socket, and whose it is."""
    found = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for socket in process.net_connections("inet"):
                if socket.laddr and (socket.status == psutil.CONN_LISTEN or (socket.type.name == "SOCK_DGRAM")):
                    found[f"{socket.laddr.ip}:{socket.laddr.port}"] = " ".join(process.cmdline())
    return found


def reached_from_outside(sockets: dict[str, str]) -> dict[str, str]:
    """Those that are not on the loopback interface."""
    return {place: name for place, name in sockets.items() if not _is_loopback(place.rpartition(":")[0])}


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
