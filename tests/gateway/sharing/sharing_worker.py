"""One worker as far as sharing goes: its own replicas and books, and the real service over a store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from gateway.sharing.service import Sharing
from gateway.store import Store
from routing.policies import make_policy
from routing.prefix import Prefix
from routing.router import PoolState, Router
from routing.types import InferenceRequest, Replica

PATIENCE_S = 15.0


@dataclass
class SmallPool:
    """A pool as `Sharing` sees one."""

    routing: PoolState
    replicas: tuple[Replica, ...]


class SharingWorker:
    """Leave it with `aclose`."""

    def __init__(self, store: Store, *names: str, replicas: int = 2, snapshot_s: float = 30.0) -> None:
        self.store = store
        self.pools = {name: self.pool(name, replicas) for name in names or ("pool",)}
        self.sharing = Sharing(store, lambda: self.pools, rng=Random(1), snapshot_s=snapshot_s)

    @staticmethod
    def pool(name: str, replicas: int = 2) -> SmallPool:
        made = tuple(Replica(f"r{n}", name, f"http://{name}-{n}:1", "vllm") for n in range(replicas))
        return SmallPool(PoolState(), made)

    async def start(self) -> SharingWorker:
        self.sharing.start()
        assert await self.sharing.first_look(PATIENCE_S)
        return self

    def router(self, pool: str = "pool") -> Router:
        return Router(make_policy("cost", Random(1)), self.pools[pool].routing)

    def dispatch(self, id: str, replica: int = 0, *, pool: str = "pool", seed: int = 0, tokens: int = 1000) -> None:
        """A request whose prompt is known by `seed`; 0: nobody needs to know it."""
        prompt = prefix(seed) if seed else None
        request = InferenceRequest(id, "m", True, 4 * tokens, prompt_tokens=tokens, prefix=prompt)
        self.router(pool).dispatched(request, self.pools[pool].replicas[replica], time.monotonic())

    def queued(self, pool: str = "pool") -> list[int]:
        return [replica.work.queued for replica in self.pools[pool].replicas]

    def knows(self, seed: int, pool: str = "pool") -> bool:
        return bool(self.pools[pool].routing.index.match(prefix(seed)))


def prefix(seed: int) -> Prefix:
    digests = [seed * 1000 + number for number in range(4)]
    return Prefix(digests, [512, 1024, 1536, 2048], 2100, [(seed * 1000 + 999, 2100)])


async def until(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> float:
    """Seconds until it was so."""
    begun = time.monotonic()
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what changes it comes over a socket
            await asyncio.sleep(0.001)
    return time.monotonic() - begun
