"""EndpointSlices, as far as a gateway is concerned with them, and the members of a pool that they amount to.

Pure: bytes and settings in, members out. The fields and their meaning are those of the API reference
(https://kubernetes.io/docs/reference/kubernetes-api/service-resources/endpoint-slice-v1/). Everything else that a slice
carries, such as hints and managedFields, is skipped while reading.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from backends.discovery.member import Member, State

SERVICE_LABEL = "kubernetes.io/service-name"
LONGEST_NAME = 80
"""Characters of a replica's name in a pool; a pod's may have 253."""

_REGION = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_FAMILIES = ("IPv4", "IPv6", "FQDN")
"""Best first: of an endpoint that has several, one address is used."""
_STATES: tuple[State, ...] = ("ready", "starting", "draining")
"""Best first: while an endpoint moves from one slice to another, it may be in both. kube-proxy prefers the ready one
too (https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/#duplicate-endpoints)."""


class Conditions(msgspec.Struct, frozen=True):
    """What is not said of an endpoint: ready and serving it is, terminating it is not."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Target(msgspec.Struct, frozen=True):
    """What is behind an endpoint: a pod, mostly."""

    kind: str = ""
    name: str = ""
    namespace: str = ""
    uid: str = ""


class Endpoint(msgspec.Struct, frozen=True, rename="camel"):
    """One endpoint. Only the first address counts: what several would mean is not defined."""

    addresses: tuple[str, ...]
    conditions: Conditions = Conditions()
    target_ref: Target | None = None
    node_name: str | None = None
    zone: str | None = None

    @property
    def state(self) -> State:
        """`serving` is asked as well as `ready`: with publishNotReadyAddresses (headless services of StatefulSets and
        LeaderWorkerSets) every endpoint is said to be ready."""
        if self.conditions.terminating:
            return "draining"
        if self.conditions.ready is False or self.conditions.serving is False:
            return "starting"
        return "ready"


class Port(msgspec.Struct, frozen=True):
    """A port that all endpoints of a slice have."""

    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class Metadata(msgspec.Struct, frozen=True, rename="camel"):
    """Of a slice."""

    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    labels: Mapping[str, str] | None = None


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel"):
    """Some of the endpoints of one service, of one address family. A service without any has a slice with null."""

    metadata: Metadata
    address_type: str = ""
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[Port, ...] | None = None


class ListMetadata(msgspec.Struct, frozen=True, rename={"resource_version": "resourceVersion", "token": "continue"}):
    """Of a list: the version that a watch goes on from, and what to ask for the next page with."""

    resource_version: str = ""
    token: str | None = None


class EndpointSliceList(msgspec.Struct, frozen=True):
    """One page of a list."""

    metadata: ListMetadata
    items: tuple[EndpointSlice, ...] | None = None


class Event(msgspec.Struct, frozen=True):
    """One line of a watch. `object` is an EndpointSlice, of a BOOKMARK its metadata only, of an ERROR a Status."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: msgspec.Raw


class Status(msgspec.Struct, frozen=True):
    """What the API server says of an error."""

    message: str = ""
    reason: str = ""
    code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which slices are meant, and what becomes of their endpoints (`discovery.kubernetes`)."""

    service: str | None = None
    labels: Mapping[str, str]
    port: int | str | None = None
    """Number or name. None: the only one there is."""
    scheme: str = "http"
    zones_as_regions: bool = False

    def __post_init__(self) -> None:
        if self.service is None and not self.labels:
            # Else every pod of the namespace would be sent prompts.
            raise ValueError("discovery.kubernetes needs `service` or `labels`: which slices are meant?")

    def selector(self) -> str:
        """The label selector, for the API server."""
        terms = {**({SERVICE_LABEL: self.service} if self.service else {}), **self.labels}
        return ",".join(f"{key}={value}" for key, value in sorted(terms.items()))

    def means(self, found: EndpointSlice) -> bool:
        """Whether a slice is one of these. The API server has selected already; this is in case that it did not."""
        labels = found.metadata.labels or {}
        if self.service is not None and labels.get(SERVICE_LABEL) != self.service:
            return False
        return all(labels.get(key) == value for key, value in self.labels.items())


@dataclass(frozen=True, slots=True)
class Found:
    """What the slices amount to."""

    members: tuple[Member, ...]
    """Sorted by name and address: the same slices in another order make no difference."""
    problems: tuple[str, ...]
    """Sentences about slices that could not be used."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    endpoint: Endpoint
    rank: tuple[int, int]
    url: str


def members_of(slices: Iterable[EndpointSlice], wanted: Wanted) -> Found:
    """Every endpoint once, whichever slices and address families it is in."""
    problems: list[str] = []
    best: dict[str, _Candidate] = {}
    for found in slices:
        if not wanted.means(found) or not found.endpoints:
            continue
        port = _port(found, wanted.port)
        if isinstance(port, str):
            problems.append(port)
            continue
        for candidate in _candidates(found, port, wanted.scheme):
            key = _identity(candidate.endpoint)
            held = best.get(key)
            if held is None or (candidate.rank, candidate.url) < (held.rank, held.url):
                best[key] = candidate
    members = _named(best.values(), wanted.zones_as_regions)
    return Found(tuple(sorted(members, key=lambda one: (one.name, one.url))), tuple(sorted(set(problems))))


def _candidates(found: EndpointSlice, port: int, scheme: str) -> Iterator[_Candidate]:
    family = _FAMILIES.index(found.address_type) if found.address_type in _FAMILIES else len(_FAMILIES)
    for endpoint in found.endpoints or ():
        if endpoint.addresses:
            address = endpoint.addresses[0]
            host = f"[{address}]" if ":" in address else address
            # The family first, or an address would change for the moment that one family's slice is behind the other's.
            rank = (family, _STATES.index(endpoint.state))
            yield _Candidate(endpoint, rank, f"{scheme}://{host}:{port}")


def _identity(endpoint: Endpoint) -> str:
    target = endpoint.target_ref
    if target is None:
        return endpoint.addresses[0]
    return target.uid or f"{target.kind}/{target.namespace}/{target.name}"


def _port(found: EndpointSlice, wanted: int | str | None) -> int | str:
    """The port's number, or a sentence that says why there is none."""
    where = f"EndpointSlice {found.metadata.name}"
    ports = [one for one in found.ports or () if one.port is not None and (one.protocol or "TCP") == "TCP"]
    if wanted is None:
        numbers = {one.port for one in ports if one.port is not None}
        if len(numbers) == 1:
            return numbers.pop()
        if not numbers:
            return f"{where} has no TCP port; give the service one, or `discovery.kubernetes.port` a number"
        return f"{where} has the ports {_listed(ports)}; say with `discovery.kubernetes.port` which one is meant"
    for one in ports:
        if wanted in (one.port, one.name) and one.port is not None:
            return one.port
    if isinstance(wanted, int) and not ports:
        return wanted  # a headless service needs no ports
    return f"{where} has no port {wanted}, it has {_listed(ports) or 'none'}; see `discovery.kubernetes.port`"


def _listed(ports: Iterable[Port]) -> str:
    return ", ".join(f"{one.name} ({one.port})" if one.name else str(one.port) for one in ports)


def _named(candidates: Iterable[_Candidate], zones_as_regions: bool) -> Iterator[Member]:
    """Members with names that no two of them share: a StatefulSet's new pod has the name of the old one."""
    taken: set[str] = set()
    for candidate in sorted(candidates, key=lambda one: (one.rank[::-1], one.url)):
        target = candidate.endpoint.target_ref
        name = _short(target.name) if target is not None and target.name else ""
        if name and name in taken:
            continue
        taken.add(name)
        yield _member(candidate, name, zones_as_regions)


def _member(candidate: _Candidate, name: str, zones_as_regions: bool) -> Member:
    endpoint, state = candidate.endpoint, candidate.endpoint.state
    zone = endpoint.zone or ""
    said = {"starting": "not ready, says Kubernetes", "draining": "terminating, says Kubernetes", "ready": ""}[state]
    place = " ".join(
        part
        for part in (f"on {endpoint.node_name}" if endpoint.node_name else "", f"in {zone}" if zone else "")
        if part
    )
    return Member(
        url=candidate.url,
        name=name,
        region=zone if zones_as_regions and _REGION.fullmatch(zone) else None,
        state=state,
        detail="; ".join(part for part in (said, place) if part),
    )


def _short(name: str) -> str:
    """A pod's name, where it is too long with a digest instead of its end, which alone would make it unique."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
