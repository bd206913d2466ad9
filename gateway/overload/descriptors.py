"""Open files and sockets: how many there are, how many there may be, and how many of those clients may have.

A process without a free descriptor can neither answer nor ask, and an event loop that cannot accept tries again at
once: asyncio's wrote 63,000 lines to its log in 7 s. So there are never more clients than leave room for the rest.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

SPARE = 32
"""Descriptors for what comes and goes besides connections of requests: files, probes, the database, side channels."""
PER_REPLICA = 3
"""A probe, a side channel and KV-cache events."""

Clock = Callable[[], float]


class Descriptors:
    """How many files and sockets are open, of how many.

    Linux says the number as the size of `/proc/self/fd` since 6.2 (1 us, 50 us with 10,000 of them). Before that they
    have to be listed, which takes 10 ms with 10,000: so they are counted again only after a hundred times as long as
    the last count took.
    """

    def __init__(self, limit: int, clock: Clock, folder: str = "/proc/self/fd") -> None:
        self.limit = limit
        """RLIMIT_NOFILE, the soft one."""
        self._clock = clock
        self._folder = folder
        self._open = 0
        self._again_at = float("-inf")

    def count(self) -> int:
        """0 where it is not known."""
        try:
            known = os.stat(self._folder).st_size
        except OSError:
            return 0
        if known:
            return known
        began = self._clock()
        if began >= self._again_at:
            try:
                self._open = len(os.listdir(self._folder))
            except OSError:  # the list needs a descriptor, too
                self._open = self.limit
            took_s = self._clock() - began
            self._again_at = began + 100 * took_s
        return self._open

    @property
    def share(self) -> float:
        return self.count() / self.limit if self.limit > 0 else 0.0


def open_now() -> int:
    """How many are open; 0 where it is not known."""
    return Descriptors(0, time.perf_counter).count()


@dataclass(frozen=True, slots=True)
class Plan:
    """How the descriptors of one worker are shared out."""

    limit: int
    """RLIMIT_NOFILE to set, the soft one."""
    max_connections: int
    """Client connections at once, 1 or more."""


def plan(*, soft: int, hard: int, wanted: int, upstream: int, other: int) -> Plan:
    """Raise the soft limit as far as is needed and allowed, then lower the ceiling on clients to what is left.

    `wanted`: `server.max_connections`; `upstream`: connections that all replicas may have together; `other`: what is
    open for other reasons. A client's connection has one request under way at most, and so one upstream connection:
    more than twice the clients are never needed.

    >>> plan(soft=1024, hard=524_288, wanted=10_000, upstream=4096, other=60)
    Plan(limit=14156, max_connections=10000)
    >>> plan(soft=128, hard=128, wanted=10_000, upstream=1024, other=60)
    Plan(limit=128, max_connections=34)
    """
    needed = wanted + min(wanted, upstream) + other
    limit = max(soft, min(needed, hard))
    if needed <= limit:
        return Plan(limit, wanted)
    room = limit - other
    return Plan(limit, max(1, room - min(room // 2, upstream)))


def make_room(*, wanted: int, upstream: int, other: int, asked_for: bool) -> Plan:
    """Raise the limit on open files if need be, and say in the log what clients have to do without.

    `asked_for`: the operator has written `server.max_connections`, and does not get it.
    """
    soft, hard = (
        each if each != resource.RLIM_INFINITY else 2**31 for each in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    found = plan(soft=soft, hard=hard, wanted=wanted, upstream=upstream, other=other)
    if found.limit > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (found.limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        except (OSError, ValueError) as error:
            logger.info("the limit on open files stays at %d: %s", soft, error)
            found = plan(soft=soft, hard=soft, wanted=wanted, upstream=upstream, other=other)
    if found.max_connections < wanted:
        logger.log(
            logging.WARNING if asked_for else logging.INFO,
            "this worker takes %d connections of clients at once, not %d (server.max_connections): it may have %d "
            "files open (RLIMIT_NOFILE), and replicas may need %d of them. Raise that limit (ulimit -n, LimitNOFILE=).",
            found.max_connections,
            wanted,
            found.limit,
            min(found.max_connections, upstream),
        )
    return found
