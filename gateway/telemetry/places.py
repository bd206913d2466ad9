"""Where replicas are, for the attributes of spans and metrics."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from gateway.fleet import Fleet
from gateway.telemetry.names import provider_of
from routing.types import Replica


class Place(msgspec.Struct, frozen=True, gc=False):
    """A replica's address, and the word that the conventions have for what it is."""

    provider: str
    host: str = ""
    port: int | None = None


UNKNOWN = Place("")


class Places:
    """Looks replicas up by pool and name; made anew when a reload has brought another fleet."""

    def __init__(self, fleet: Callable[[], Fleet]) -> None:
        self._fleet = fleet
        self._of: Fleet | None = None
        self._places: dict[tuple[str, str], Place] = {}

    def of(self, pool: str, replica: str) -> Place:
        """`UNKNOWN` for one that is gone."""
        fleet = self._fleet()
        if fleet is not self._of:
            self._of = fleet
            self._places = {
                (each.replica.pool, each.replica.name): place_of(each.replica) for each in fleet.upstreams()
            }
        return self._places.get((pool, replica), UNKNOWN)


def place_of(replica: Replica) -> Place:
    """What can be said of this replica."""
    provider, parts = provider_of(replica.engine), urlsplit(replica.url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return Place(provider)  # a socket has no address that anybody could look up
    return Place(provider, parts.hostname, parts.port)
