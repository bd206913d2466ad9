"""What workers tell each other about replicas, as facts in the store.

Keys are `<kind>/<pool>/<identity>`; an ejection has its observer at the end. Values are JSON. Times travel as seconds
from now or as wall-clock time, never as a monotonic clock, which means nothing to another process.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from backends.dialects.protocol import Adapter, EngineInfo, EngineLoad
from backends.gpus import Gpu
from gateway.store.protocol import Store
from routing.types import Replica

PROBE = "probe"
LOAD = "load"
INFO = "info"
ADAPTERS = "adapters"
LOADING = "loading"
GPUS = "gpus"
DRAIN = "drain"
CORDON = "cordon"
WARMED = "warmed"
EJECTED = "ejected"
RECOVERED = "recovered"


class ProbeNote(msgspec.Struct, frozen=True):
    """What a probe showed: an answer (a `Readiness`), or that there was none (a `Trouble`)."""

    readiness: str | None
    trouble: str | None
    detail: str = ""


class LoadNote(msgspec.Struct, frozen=True):
    """An engine's own report, and what follows from it and the one before."""

    load: EngineLoad
    prefill_us_per_token: float | None
    progressed: bool
    """The engine's own counters moved since the report before."""


class InfoNote(msgspec.Struct, frozen=True):
    info: EngineInfo
    epoch: str
    """The engine's own, or one that counts its returns where it has none."""


class AdaptersNote(msgspec.Struct, frozen=True):
    adapters: tuple[Adapter, ...]


class LoadingNote(msgspec.Struct, frozen=True):
    """What a replica is being told to load by one of the workers."""

    adapters: tuple[str, ...]


class GpusNote(msgspec.Struct, frozen=True):
    gpus: tuple[Gpu, ...]


class DrainNote(msgspec.Struct, frozen=True):
    since_unix_s: float


class CordonNote(msgspec.Struct, frozen=True):
    since_unix_s: float


class WarmedNote(msgspec.Struct, frozen=True):
    """A replica that was held back to be warmed has what it needs."""

    epoch: str
    """Of the life in which that was done; empty: not known."""


class EjectionNote(msgspec.Struct, frozen=True):
    until_unix_s: float


def replica_key(replica: Replica) -> str:
    """How a replica is called between workers: `<pool>/<identity>`.

    Not by its name, which is its position where the configuration gives none: a reload would have the drain of one
    engine fall on another.
    """
    return f"{replica.pool}/{replica.identity}"


async def forget_orders(store: Store, replicas: Iterable[Replica]) -> None:
    """End what was ordered about replicas that have left their pool for good, and what holds of their last moment:
    another engine may get the address of one, and must not be born drained, ready or warm. Raises `StoreError`."""
    for replica in replicas:
        for kind in (DRAIN, CORDON, PROBE, WARMED):
            await store.withdraw(key(kind, replica))


def key(kind: str, replica: Replica, observer: str = "") -> str:
    """The key of a fact about a replica."""
    return f"{kind}/{replica_key(replica)}" + (f"/{observer}" if observer else "")
