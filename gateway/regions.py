"""Where replicas are, as this worker sees it: configured latencies, and what opening connections shows."""

from __future__ import annotations

import logging
from functools import partial

from backends.upstream import Upstream
from gateway.config import Settings
from gateway.fleet import Fleet
from routing.geo import UNKNOWN_MS, Distances, is_given
from routing.types import Replica

logger = logging.getLogger(__name__)

TLS_ROUND_TRIPS = 2
"""One for TCP, one for TLS 1.3. Of TLS 1.2, which takes another, the estimate is half too long."""


class Regions:
    """One worker's. What is measured outlasts a reload."""

    def __init__(self, settings: Settings) -> None:
        self.distances = Distances(settings.region, settings.latency_ms)
        self._said = ""

    def watch(self, settings: Settings, fleet: Fleet) -> None:
        """Give the fleet's replicas their distances, and measure every connection that is opened to them."""
        self.distances.configure(settings.region, settings.latency_ms)
        for pool in fleet.pools.values():
            self.distances.place(pool.replicas)
        for upstream in fleet.upstreams():
            upstream.pool.on_connect = partial(self._connected, upstream.replica, _round_trips(upstream))
        problem = _unsaid(settings, fleet)
        if problem and problem != self._said:
            logger.warning("%s", problem)
        self._said = problem

    def leave(self, fleet: Fleet, kept: Fleet) -> None:
        """Forget replicas that only the first of these fleets has."""
        stay = {upstream.replica.identity for upstream in kept.upstreams()}
        gone = [upstream.replica for upstream in fleet.upstreams() if upstream.replica.identity not in stay]
        self.distances.forget(gone)

    def _connected(self, replica: Replica, round_trips: int, duration_s: float) -> None:
        self.distances.observe(replica, duration_s * 1000.0 / round_trips)


def _unsaid(settings: Settings, fleet: Fleet) -> str:
    """What looks like a region that is written in two ways; empty where nothing does."""
    here, matrix = settings.region, settings.latency_ms
    if not matrix:
        return ""
    if here is None:
        return "latency_ms is not used, since region does not say where this gateway is"
    regions = {replica.region for pool in fleet.pools.values() for replica in pool.replicas}
    unsaid = sorted(each for each in regions if each is not None and not is_given(matrix, here, each))
    if not unsaid:
        return ""
    return f"latency_ms has nothing between {here} and {', '.join(unsaid)}: {UNKNOWN_MS:g} ms until it is measured"


def _round_trips(upstream: Upstream) -> int:
    return TLS_ROUND_TRIPS if upstream.pool.origin.tls else 1
