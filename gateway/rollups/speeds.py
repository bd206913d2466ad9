"""Which replicas are slow, compared with the others of their pool.

Of each replica a moving average is kept of the logarithm of how long it took: ALPHA of it is the newest answer, so
that it is about the last six. It is slow when that is `SLOWER` times what is usual among its peers (their median),
and `AT_LEAST_S` more: or when a stream has been waiting there for its first content for so long already, since a
replica that takes a minute shows in no average before the minute is over.

Worked example: peers take 0.2 s, one 2 s. After four answers its average is 0.2 * 10 ** (1 - 0.85**4) = 0.6 s: slow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp

from gateway.rollups.pulse import PoolPulse, Pulse, ReplicaPulse

ALPHA = 0.15
"""With times that vary by a factor of e (one standard deviation), the average varies by a third: three times as slow
is four of its deviations."""
SLOWER = 3.0
AT_LEAST_S = 0.25
JUDGED_FROM = 5
"""Answers; before, one odd one is all that is known."""
FORGOTTEN_S = 300.0
"""A replica that nobody has used for so long may be as quick as ever."""
MAX_KNOWN = 10_000

At = tuple[str, str]


@dataclass(slots=True)
class _Pace:
    count: int
    log_s: float
    at: float


@dataclass(frozen=True, slots=True)
class Slow:
    """A replica that takes longer than its peers."""

    pool: str
    replica: str
    usual_s: float
    """Of itself."""
    peers_s: float
    streams: bool
    """Whether it is the time to first content, or that of a whole answer."""
    waiting: bool = False
    """It is the wait of a stream that has no content yet."""


class Speeds:
    """Of all replicas, as all workers see them."""

    def __init__(self) -> None:
        self._paces: dict[tuple[str, str, bool], _Pace] = {}

    def take(self, before: Pulse | None, after: Pulse, now: float) -> None:
        """Learn from what one worker has seen since `before`. `now`: seconds of any clock that does not go back."""
        known: dict[At, ReplicaPulse] = {}
        if before is not None and (before.pid, before.started_unix_s) == (after.pid, after.started_unix_s):
            known = {(pool.name, each.name): each for pool in before.pools for each in pool.replicas}
        for pool in after.pools:
            for each in pool.replicas:
                old = known.get((pool.name, each.name))
                streams, wholes = each.streams, each.wholes
                if old is not None:
                    streams, wholes = streams - old.streams, wholes - old.wholes
                if streams > 0:
                    log_s = each.streams_log_s - (0.0 if old is None else old.streams_log_s)
                    self._learn((pool.name, each.name, True), streams, log_s / streams, now)
                if wholes > 0:
                    log_s = each.wholes_log_s - (0.0 if old is None else old.wholes_log_s)
                    self._learn((pool.name, each.name, False), wholes, log_s / wholes, now)

    def _learn(self, key: tuple[str, str, bool], count: int, log_s: float, now: float) -> None:
        pace = self._paces.get(key)
        if pace is None:
            if len(self._paces) < MAX_KNOWN:
                self._paces[key] = _Pace(count, log_s, now)
            return
        pace.log_s += (log_s - pace.log_s) * (1.0 - (1.0 - ALPHA) ** count)
        pace.count += count
        pace.at = now

    def slow(self, pools: Iterable[PoolPulse], now: float) -> list[Slow]:
        """Those of these pools; `pools` says what waits now, of every worker."""
        self._paces = {key: pace for key, pace in self._paces.items() if now - pace.at < FORGOTTEN_S}
        found: dict[At, Slow] = {}
        peers: dict[tuple[str, bool], _Peers] = {}
        for (pool, replica, streams), pace in self._paces.items():
            if pace.count >= JUDGED_FROM:
                peers.setdefault((pool, streams), _Peers()).own[replica] = pace.log_s
        for (pool, streams), known in peers.items():
            known.order = sorted(known.own.values())
            for replica, log_s in known.own.items():
                peers_s = known.usual_s(replica)
                if peers_s is not None and _is_slow(exp(log_s), peers_s):
                    found.setdefault((pool, replica), Slow(pool, replica, exp(log_s), peers_s, streams))
        for state in pools:
            known = peers.get((state.name, True), _Peers())
            for each in state.replicas:
                if each.oldest_s > AT_LEAST_S and (state.name, each.name) not in found:
                    peers_s = known.usual_s(each.name)
                    # Twice as long as an average would have to be: it is the longest of all that wait.
                    if peers_s is not None and _is_slow(each.oldest_s / 2, peers_s):
                        at = (state.name, each.name)
                        found[at] = Slow(*at, each.oldest_s, peers_s, streams=True, waiting=True)
        return list(found.values())


class _Peers:
    """How long the replicas of one pool take, as logarithms."""

    __slots__ = ("order", "own")

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self.order: list[float] = []
        """The same, the quickest first."""

    def usual_s(self, replica: str) -> float | None:
        """What is usual among the others (their median, seconds); None without any."""
        order, own = self.order, self.own.get(replica)
        count, skipped = len(order), len(order)
        if own is not None:
            count, skipped = count - 1, bisect_left(order, own)
        if not count:
            return None
        low, high = ((count - 1) // 2, count // 2)
        return exp(sum(order[place + (place >= skipped)] for place in (low, high)) / 2)


def _is_slow(own_s: float, peers_s: float) -> bool:
    return own_s >= SLOWER * peers_s and own_s - peers_s >= AT_LEAST_S
