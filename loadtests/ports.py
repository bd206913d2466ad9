"""Ports for servers that start a moment from now, or start again on the port they had.

Below those that the kernel gives to outgoing connections (32768 and up on Linux): one of those can be taken by any
connection of any process between two starts of its server, for as long as that connection lasts, and a client that
tries a closed one can even be connected to itself.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

LOWEST = 10_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_random = random.SystemRandom()  # processes that were forked, or seeded alike by a test, do not choose alike


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at the moment."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of so many in a row. Raises `OSError` when there are none."""
    lowest, highest = _range()
    for _ in range(1000):
        first = _random.randrange(lowest, highest - count)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError(f"no {count} free ports in a row between {lowest} and {highest}")


def _range() -> tuple[int, int]:
    try:
        first_given = int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError):  # not Linux, or a sandbox without /proc/sys
        first_given = 32_768
    return (LOWEST, first_given) if first_given > LOWEST + 1000 else (first_given, 60_000)
