"""Where replicas may register from: what registers gets prompts, and the keys that the pool is called with."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

from backends.discovery.member import Member
from gateway.config import Backend
from gateway.config.discovery import Registration
from gateway.config.urls import normal_url

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def accepting(backend: Backend) -> Registration | None:
    """How a pool takes registrations; None: it takes none. One that has its servers launched does."""
    given = None if backend.discovery is None else backend.discovery.registration
    return given or (Registration() if backend.launch is not None else None)


def ttl_of(backend: Backend) -> float:
    """How long a registration of this pool holds, in seconds."""
    return (accepting(backend) or Registration()).ttl_s


def not_here(member: Member, registration: Registration) -> str:
    """Why a replica may not register with these addresses; empty: it may. Its url is in the normal form."""
    if not may_be_at(member.url, registration):
        return f"{member.url} is not in the networks that replicas may register from"
    events = member.kv_events
    if events not in (None, "auto") and not _may_publish_at(events, registration):
        return f"kv_events: {events[:300]!r} is no tcp address in the networks that replicas may register from"
    return ""


def may_be_at(url: str, registration: Registration) -> bool:
    """Whether a replica may register with this address, which is in its normal form."""
    return _may_be_at(url, registration.networks, registration.hosts)


@lru_cache(maxsize=8192)
def _may_be_at(url: str, networks: tuple[str, ...], hosts: tuple[str, ...]) -> bool:
    """Kept, since all that have registered are looked at whenever one changes."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme not in ("http", "https") or not host:
        return False
    if host == "localhost":
        host = "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return any(host == name.lower() or (name.startswith(".") and host.endswith(name.lower())) for name in hosts)
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in _networks(networks))


def _may_publish_at(endpoint: str, registration: Registration) -> bool:
    """Whether the gateway may be had to connect there for cache events. Not to sockets of its own machine (`ipc`)."""
    scheme, _, place = endpoint.partition("://")
    try:
        url = normal_url(f"http://{place}")
    except PydanticCustomError:
        return False
    return scheme == "tcp" and "/" not in place and may_be_at(url, registration)


@lru_cache(maxsize=64)
def _networks(networks: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(each) for each in networks)
