"""Has the store know what one worker's pools are asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from contextlib import suppress

import msgspec

from gateway.notices import DEMAND
from gateway.runtime import Runtime
from gateway.scaling.demand import DemandBook
from gateway.store.protocol import StoreError

logger = logging.getLogger(__name__)

EVERY_S = 2.0
TTL_S = 10.0
"""Whoever is not heard of for so long is gone."""


class DemandTeller:
    """One worker's: `start`, `refresh` after each reload, `aclose`. While no pool has a scaling it does nothing, and
    `Runtime.demand` is None."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._holder = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._task: asyncio.Task[None] | None = None
        self._told: set[str] = set()
        self._failing = False

    def start(self) -> None:
        """Begin, where there is something to tell."""
        self.refresh()

    def refresh(self) -> None:
        """Go by the fleet as it is now."""
        runtime = self._runtime
        wanted = any(pool.settings.scaling is not None for pool in runtime.fleet.pools.values())
        if not wanted:
            runtime.demand = None
        elif runtime.demand is None:
            runtime.demand = DemandBook(runtime, time.monotonic())
        else:
            runtime.demand.refresh(time.monotonic())
        if self._task is None and wanted:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="demand")

    async def aclose(self) -> None:
        """End, and take back what was told: whoever leaves in order is not missed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(1.0):
                for pool in self._told:
                    await self._runtime.store.withdraw(self._key(pool))

    async def _run(self) -> None:
        while True:
            try:
                await self.tell()
                self._failing = False
            except StoreError as error:
                logger.debug("demand could not be told: %s", error)
            except Exception:
                if not self._failing:
                    logger.exception("demand could not be told; this is said once")
                self._failing = True
            await asyncio.sleep(EVERY_S)

    async def tell(self) -> None:
        """Tell everything once. Raises `StoreError`."""
        book = self._runtime.demand
        told = {} if book is None else book.told(time.monotonic())
        for pool in self._told - told.keys():
            await self._runtime.store.withdraw(self._key(pool))
        self._told &= told.keys()
        for pool, demand in told.items():
            self._told.add(pool)
            await self._runtime.store.post(self._key(pool), msgspec.json.encode(demand), TTL_S)

    def _key(self, pool: str) -> str:
        return f"{DEMAND}/{pool}/{self._holder}"
