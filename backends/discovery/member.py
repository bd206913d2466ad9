"""What a source of replicas tells: the members of one pool, as it knows them now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

State = Literal["starting", "ready", "draining"]


class Member(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One replica that was found. What is None or empty is as the pool's `discovery.defaults` say."""

    url: str
    """As `replicas[].url`: without /v1."""
    name: str = ""
    """In the pool. Empty: made from the address."""
    engine: str | None = None
    upstream_model: str | None = None
    region: str | None = None
    weight: float | None = None
    max_in_flight: int | None = None
    dp_rank: int | None = None
    kv_events: str | None = None
    """ZeroMQ address, or `auto`."""
    state: State = "ready"
    """`starting` ones are shown and get no requests; `draining` ones finish what they have."""
    phase: str = ""
    """Of a start: `downloading`, `loading`, `compiling`, `warming` (`backends.launch.progress`)."""
    progress: float | None = None
    """Of the phase, 0 to 1, where it is known."""
    detail: str = ""
    """For people: what it is at, or why it does not start."""
    started_in_s: float | None = None
    """Seconds from its process' start until it was ready, once it is."""
    restarts: int = 0
    """How often its process was started again."""
    agent: str = ""
    """Who launched it (`tidegate fleet up`); empty: nobody who says so."""


class Source(Protocol):
    """Where members come from. One event loop's."""

    async def run(self, tell: Callable[[Sequence[Member]], None], trouble: Callable[[str], None]) -> None:
        """Look for members until cancelled. `tell` gets all of them, at first and whenever they change; `trouble`,
        while there is no answer, why: what was told last holds then. Both are cheap and may be called again with the
        same. Never returns; raises nothing but cancellation and defects."""
        ...
