"""What DNS records say about replicas, decided without asking anybody: which SRV records count, and for how much; when
an empty answer is believed.

SRV: RFC 2782 (https://www.rfc-editor.org/rfc/rfc2782).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from backends.discovery.member import Member
from backends.discovery.naming import name_of, url_of

MAX_MEMBERS: Final = 4096
EMPTY_BELIEVED_AFTER: Final = 3
"""Empty answers in a row. The name of a headless service has no addresses for the moments between its last pod's end
and the next one's readiness, and a name server that has just started denies names of zones it is still loading: a pool
that is emptied for that refuses everything. Replicas that are really gone are found by their health checks meanwhile.
"""
LEAST_WEIGHT: Final = 0.01
"""For SRV weight 0 beside others: "a very small chance of being selected"."""
_MOST_WEIGHT: Final = 1000.0


@dataclass(frozen=True, slots=True, order=True)
class Srv:
    """One SRV record. `target` is without its last dot."""

    target: str
    port: int
    priority: int
    weight: int


def chosen(records: Iterable[Srv]) -> list[Srv]:
    """Those of the best (lowest) priority, each target and port once, in a stable order.

    A target of "." says that the service is not offered there.
    """
    there = [each for each in records if each.target]
    best = min((each.priority for each in there), default=0)
    once: dict[tuple[str, int], Srv] = {}
    for each in there:
        key = (each.target.lower(), each.port)
        if each.priority == best and (key not in once or each.weight > once[key].weight):
            once[key] = each
    return [once[key] for key in sorted(once)]


def shares(weights: Sequence[float]) -> list[float | None]:
    """Weights relative to their mean, so that the usual one is 1. None for all where they are equal: that says nothing.

    >>> shares([30, 10, 20]), shares([5, 5]), shares([0, 100])
    ([1.5, 0.5, 1.0], [None, None], [0.01, 2.0])
    """
    if len(set(weights)) <= 1:
        return [None] * len(weights)
    mean = sum(weights) / len(weights)
    return [round(min(max(each / mean, LEAST_WEIGHT), _MOST_WEIGHT), 4) for each in weights]


def members_at(pool: str, scheme: str, places: Mapping[tuple[str, int], float]) -> list[Member]:
    """A member for each host and port, with the weight that is its own; IP addresses in the order of their numbers."""
    ordered = sorted(places, key=_order)[:MAX_MEMBERS]
    weights = shares([places[place] for place in ordered])
    return [
        Member(name=name_of(pool, host, port), url=url_of(scheme, host, port), weight=weight)
        for (host, port), weight in zip(ordered, weights, strict=True)
    ]


def _order(place: tuple[str, int]) -> tuple[int, int, str, int]:
    host, port = place
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return 0, 0, host, port
    return address.version, int(address), "", port


def usable(host: str) -> str | None:
    """The address in its shortest form; None for one that no replica has: of a link, of a group, of nobody.

    Clouds keep their metadata services at link-local addresses, which also mean nothing without an interface.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_link_local or address.is_multicast or address.is_unspecified or str(address) == "255.255.255.255":
        return None
    return str(address)


_Found = TypeVar("_Found")


class Held(Generic[_Found]):
    """The last answer that was not empty, kept until it was empty `EMPTY_BELIEVED_AFTER` times in a row."""

    def __init__(self) -> None:
        self.last: _Found | None = None
        """None: nothing that would hold."""
        self.empty_answers = 0
        """In a row."""

    def take(self, found: _Found) -> _Found | None:
        """What holds now. Trouble is no answer: it is not taken in, and changes nothing."""
        if found:
            self.last, self.empty_answers = found, 0
            return found
        self.empty_answers += 1
        if self.empty_answers >= EMPTY_BELIEVED_AFTER:
            self.last = None
        return self.last

    @property
    def doubted(self) -> bool:
        """The last answer was empty, and is not believed yet."""
        return 0 < self.empty_answers < EMPTY_BELIEVED_AFTER
