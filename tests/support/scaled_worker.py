"""The store of a gateway's one worker, as the loop that decides on scaling sees it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from gateway.notices import DEMAND
from gateway.scaling.notes import PoolDemand, ReplicaRow


class ScaledWorker:
    """Tells of a pool `pool` with replicas `a` and `b`, and keeps what is announced. Tests add leases, and what else
    they look at."""

    def __init__(self) -> None:
        self.facts: dict[str, bytes] = {}
        rows = [ReplicaRow(name, name, 1) for name in ("a", "b")]
        self.facts[f"{DEMAND}/pool/w0"] = msgspec.json.encode(PoolDemand("life", 5.0, replicas=rows))

    async def notices(self, kind: str) -> Mapping[str, bytes]:
        return {key: value for key, value in self.facts.items() if key.startswith(f"{kind}/")}

    async def announce(self, key: str, value: bytes, ttl_s: float | None) -> None:
        self.facts[key] = value

    async def retract(self, key: str) -> None:
        self.facts.pop(key, None)
