"""The queue's load: callers of several tenants that want a place at one pool, as worker processes of the gateway do.

A grant may come three ways, and a worker must listen to all of them: in the answer to its own `enter` or `leave`, as a
message, and, if the message is lost, in the answer to the next `renew`.
"""

from __future__ import annotations

import asyncio
import os
import time
from random import Random

from gateway.store.places import Band, State, Ticket
from gateway.store.protocol import StoreUnavailable
from loadtests.hammer_jobs import PlaceJob, PlaceResult, Served, Tenant
from loadtests.hammer_limits import CONNECT_S, drawn, monotonic_us, wait_to_begin
from loadtests.hammer_stores import Opened, open_store

RENEW_EVERY_S = 1.0


class _Queue:
    def __init__(self, job: PlaceJob, opened: Opened) -> None:
        self.job = job
        self.places = opened.places
        self.waiting: dict[str, asyncio.Future[None]] = {}
        self.held: dict[str, Ticket] = {}
        self.result = PlaceResult(served=[])
        self.end_s = time.monotonic() + job.seconds

    # -- grants

    def on_message(self, message: bytes) -> None:
        pool, _, id = message.decode().partition("\n")
        if pool == self.job.pool:
            self.result.by_message += self.grant(id)

    def grant(self, id: str) -> bool:
        """True if this is news."""
        future = self.waiting.get(id)
        if future is None or future.done():
            return False
        future.set_result(None)
        return True

    async def renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            waiting = [id for id, future in self.waiting.items() if not future.done()]
            try:
                renewal = await self.places.renew(
                    self.job.pool, self.job.gateway, list(self.held.values()), waiting, self.job.room
                )
            except StoreUnavailable:
                self.result.unavailable += 1
                continue
            for id in renewal.granted:
                self.result.by_renewal += self.grant(id)
            still = [id for id in renewal.lost if id in self.waiting and not self.waiting[id].done()]
            if still:
                self.result.errors.append(f"the store knows nothing of {len(still)} waiting requests: {still[:3]}")

    # -- callers

    async def caller(self, index: int, tenant: Tenant, number: int) -> None:
        rng = Random(f"{os.getpid()} {tenant.name} {number} {self.job.begin_at_s}")
        turn = 0
        while time.monotonic() < self.end_s:
            turn += 1
            cost = drawn(tenant.cost, rng)
            told = max(1, round(cost * self.job.estimate))
            id = f"{self.job.gateway}-{tenant.name}-{number}-{turn}"
            # The longest wait that is predicted is of no interest here: everybody waits.
            ticket = Ticket(id, self.job.gateway, tenant.name, tenant.weight, Band.STANDARD, told, told, 600_000_000)
            try:
                await self._one(index, ticket, cost)
            except StoreUnavailable:
                self.result.unavailable += 1
                await asyncio.sleep(0.01)
            if tenant.think_ms:
                await asyncio.sleep(tenant.think_ms / 1000 * rng.uniform(0.5, 1.5))

    async def _one(self, index: int, ticket: Ticket, cost: int) -> None:
        job = self.job
        entered_us = monotonic_us()
        self.waiting[ticket.id] = future = asyncio.get_running_loop().create_future()
        granted = False
        try:
            entry = await self.places.enter(job.pool, ticket, job.room)
            if entry.state is State.REFUSED:
                self.result.refused += 1
                await asyncio.sleep(0.005)
                return
            if entry.state is State.WAITING:
                async with asyncio.timeout(max(0.01, self.end_s + 0.2 - time.monotonic())):
                    await future
            granted = True
            self.held[ticket.id] = ticket
        except TimeoutError:
            pass  # the run is over
        finally:
            del self.waiting[ticket.id]
            if not granted:
                await self._leave(ticket.id, 0)
        if not granted:
            return
        granted_us = monotonic_us()
        await asyncio.sleep(cost * job.hold_us_per_cost / 1e6)
        left_us = monotonic_us()
        self.held.pop(ticket.id, None)
        self.result.served.append(Served(index, cost, entered_us, granted_us, left_us))
        await self._leave(ticket.id, cost)

    async def _leave(self, id: str, used: int | None) -> None:
        for other in (await self.places.leave(self.job.pool, id, self.job.gateway, used, self.job.room)).ids:
            self.grant(other)


async def hammer_places(job: PlaceJob) -> PlaceResult:
    """Run the job to its end; everything it asked for has been given back then."""
    opened = open_store(job.reach)
    try:
        await opened.client.connect(CONNECT_S)
        queue = _Queue(job, opened)
        unsubscribe = await opened.client.subscribe(f"{job.reach.prefix}:granted:{job.gateway}", queue.on_message)
        await wait_to_begin(job.begin_at_s)
        queue.end_s = time.monotonic() + job.seconds
        renewing = asyncio.create_task(queue.renew_for_ever())
        try:
            async with asyncio.TaskGroup() as tasks:
                for index, tenant in enumerate(job.tenants):
                    if tenant.only_in in (None, job.number):
                        for number in range(tenant.callers):
                            tasks.create_task(queue.caller(index, tenant, number))
        finally:
            renewing.cancel()
            unsubscribe()
        return queue.result
    finally:
        await opened.client.aclose()
