"""The limiter's load: tasks that ask for admission over and over, as a worker process of the gateway would."""

from __future__ import annotations

import asyncio
import math
import os
import time
from random import Random

from gateway.store.limits import Admission, Cost, Limits
from gateway.store.protocol import StoreUnavailable
from loadtests.hammer_jobs import (
    ADMITTED,
    LOCAL,
    LOCAL_REFUSED,
    REFUSED,
    UNAVAILABLE,
    Admitted,
    Call,
    LimitJob,
    LimitResult,
    Tokens,
)
from loadtests.hammer_stores import Opened, local_limits, open_store

AFTER_AWAY_S = 0.005
"""A call that fails at once would otherwise be repeated at once, and the process do nothing else."""
CONNECT_S = 10.0
"""Before the load begins."""


def monotonic_us() -> int:
    return time.monotonic_ns() // 1000


def drawn(tokens: Tokens, rng: Random) -> int:
    return max(tokens.low, min(tokens.high, round(tokens.median * math.exp(rng.gauss(0.0, tokens.sigma)))))


async def wait_to_begin(begin_at_s: float) -> None:
    await asyncio.sleep(max(0.0, begin_at_s - time.monotonic()))


class _Hammer:
    def __init__(self, job: LimitJob, opened: Opened) -> None:
        self.job = job
        self.limits = opened.limits
        self.local: Limits | None = None if job.local is None else local_limits()
        self.reserved = Cost(requests=1, input=job.prompt, output=job.reserve, total=job.prompt + job.reserve)
        self.end_s = time.monotonic() + job.seconds
        self.result = LimitResult(calls=[], admitted=[])
        self.unknown: list[str] = []

    async def caller(self, number: int) -> None:
        job, turn = self.job, 0
        rng = Random(f"{os.getpid()} {number} {job.begin_at_s}")
        while time.monotonic() < self.end_s and not (job.calls and turn >= job.calls):
            turn += 1
            id = f"{os.getpid()}-{number}-{turn}-{rng.getrandbits(32):x}"
            outcome = await self._ask(id, rng)
            if outcome == ADMITTED and job.keep:
                return
            if outcome == REFUSED:
                await asyncio.sleep(job.pause_ms / 1000)
            elif outcome in (UNAVAILABLE, LOCAL_REFUSED):
                await asyncio.sleep(max(AFTER_AWAY_S, job.pause_ms / 1000))

    async def _ask(self, id: str, rng: Random) -> int:
        job = self.job
        began_us = monotonic_us()
        try:
            answer = await self.limits.admit(id, job.scopes, self.reserved, job.lease_us)
        except StoreUnavailable:
            self.unknown.append(id)
            outcome = await self._ask_locally(id, began_us)
            if outcome == LOCAL:
                await asyncio.sleep(rng.uniform(*job.hold_ms) / 1000)
                await self._settle_locally(id)
            return outcome
        here_us = monotonic_us()
        outcome = ADMITTED if answer.admitted else REFUSED
        self.result.calls.append(Call(began_us, here_us - began_us, outcome))
        if answer.admitted:
            await self._run(id, answer, here_us, rng)
        elif not answer.refusals:
            self.result.errors.append(f"{id} was refused as an echo, but nobody had settled it")
        return outcome

    async def _run(self, id: str, answer: Admission, here_us: int, rng: Random) -> None:
        """What an admitted request does: takes its time, then settles."""
        job = self.job
        output = job.reserve if job.output is None else drawn(job.output, rng)
        used = Cost(requests=1, input=job.prompt, output=output, total=job.prompt + output)
        in_use = answer.in_use[0] if answer.in_use else 0
        tokens = self.reserved.total > 0
        event = Admitted(
            answer.now_us, self.reserved.total if tokens else 1, used.total if tokens else 1, in_use, here_us, 0
        )
        self.result.admitted.append(event)
        if job.keep:
            return
        if job.hold_ms[1]:
            await asyncio.sleep(rng.uniform(*job.hold_ms) / 1000)
        event.to_us = monotonic_us()
        try:
            if not await self.limits.settle(id, job.scopes, self.reserved, used):
                self.result.not_found += 1
        except StoreUnavailable:
            self.result.unsettled += 1

    async def _ask_locally(self, id: str, began_us: int) -> int:
        outcome = UNAVAILABLE
        if self.local is not None and self.job.local is not None:
            answer = await self.local.admit(id, self.job.local, self.reserved, self.job.lease_us)
            outcome = LOCAL if answer.admitted else LOCAL_REFUSED
            self.result.local += answer.admitted
        self.result.calls.append(Call(began_us, monotonic_us() - began_us, outcome))
        return outcome

    async def _settle_locally(self, id: str) -> None:
        if self.local is not None and self.job.local is not None:
            await self.local.settle(id, self.job.local, self.reserved, self.reserved)

    async def cancel_unknown(self) -> None:
        """As the gateway does once Redis is back: what may have been reserved is given back."""
        self.result.unknown = len(self.unknown)
        for id in self.unknown:
            try:
                await self.limits.cancel(id, self.job.scopes, self.reserved)
            except StoreUnavailable:
                return


async def hammer_limits(job: LimitJob) -> LimitResult:
    """Run the job to its end; with `keep`, until the process is killed."""
    opened = open_store(job.reach)
    try:
        await opened.client.connect(CONNECT_S)
        await wait_to_begin(job.begin_at_s)
        hammer = _Hammer(job, opened)
        async with asyncio.TaskGroup() as tasks:
            for number in range(job.tasks):
                tasks.create_task(hammer.caller(number))
        if job.keep:
            await asyncio.Event().wait()
        await hammer.cancel_unknown()
        return hammer.result
    finally:
        await opened.client.aclose()
