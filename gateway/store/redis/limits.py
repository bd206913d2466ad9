"""The limiter in Redis: each operation is one script, and this module packs what it asks and reads what it answers.

A gateway that wants to send an admission together with something else calls `pack_admit`, runs the script itself in
the same turn of the event loop, and reads the reply with `unpack_admission`; `RedisLimits.admit` is just that.

Keys, all below the client's prefix: `<scope>` a scope's marks and money, `<scope>:leases` its leases, and
`<tag>:request:<id>` a request's record, under the tag of its first scope. All of them expire by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

import msgspec

from gateway.store.limit_state import burst_us
from gateway.store.limits import Admission, Cost, Held, Reading, Refusal, Scope
from gateway.store.memory_limits import MAX_PLANS
from gateway.store.redis.scripts import Script, load

HELD_PER_CALL = 32
"""Leases that one script renews, so that it keeps Redis from others for a fraction of a millisecond."""

READ_PER_CALL = 128
"""Scopes that one script reads, for the same reason."""

Packed = tuple[list[str], list[str | int | bytes]]
"""KEYS and ARGV of a script."""


class Runs(Protocol):
    """The part of `RedisClient` that is needed here."""

    def run(self, script: Script, keys: Sequence[str], args: Sequence[str | int | bytes]) -> Awaitable[Any]: ...


class _Plan(msgspec.Struct, frozen=True):
    """Scopes as the scripts take them."""

    scopes: Sequence[Scope]
    """Kept, since the plan is found by their identity."""
    record: str
    """The key of a request's record, without the id."""
    keys: tuple[str, ...]
    """All others."""
    rules: bytes


class RedisLimits:
    """`Limits` in Redis. `prefix` stands before every key. Not thread-safe, as the client is not."""

    def __init__(self, client: Runs, prefix: str = "tidegate") -> None:
        self._client = client
        self._prefix = prefix
        self._plans: dict[int, _Plan] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self.admit_script = load("admit")
        self.settle_script = load("settle")
        self.cancel_script = load("cancel")
        self.renew_script = load("renew")
        self.read_script = load("standing_of_limits")

    async def admit(self, id: str, scopes: Sequence[Scope], cost: Cost, lease_us: int) -> Admission:
        return unpack_admission(await self._client.run(self.admit_script, *self.pack_admit(id, scopes, cost, lease_us)))

    async def settle(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost) -> bool:
        keys, args = self.pack_settle(id, scopes, reserved, used)
        return unpack_outcome(await self._client.run(self.settle_script, keys, args))

    async def cancel(self, id: str, scopes: Sequence[Scope], reserved: Cost) -> bool:
        keys, args = self.pack_cancel(id, scopes, reserved)
        return unpack_outcome(await self._client.run(self.cancel_script, keys, args))

    async def renew(self, held: Sequence[Held], lease_us: int) -> None:
        """Several scripts in one pipeline when there are many; if one fails, the others may have been run."""
        asked = [
            self._client.run(self.renew_script, *self.pack_renew(held[first : first + HELD_PER_CALL], lease_us))
            for first in range(0, len(held), HELD_PER_CALL)
        ]
        failure: Exception | None = None
        for answer in asked:
            try:
                await answer
            except Exception as error:  # raised below: the other answers must be taken, too
                failure = error
        if failure is not None:
            raise failure

    async def read(self, scopes: Sequence[Scope]) -> list[Reading]:
        """Several scripts in one pipeline, each of them one moment."""
        parts = [scopes[first : first + READ_PER_CALL] for first in range(0, len(scopes), READ_PER_CALL)]
        asked = [self._client.run(self.read_script, *self.pack_read(part)) for part in parts]
        found: list[Reading] = []
        for reply in await asyncio.gather(*asked):
            found += unpack_readings(reply)
            await asyncio.sleep(0)  # requests come first
        return found

    def pack_admit(self, id: str, scopes: Sequence[Scope], cost: Cost, lease_us: int) -> Packed:
        plan = self._plan(scopes)
        return [plan.record + id, *plan.keys], [f"{id}\n{cost.micros}", lease_us, self._encode(cost), plan.rules]

    def pack_settle(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost) -> Packed:
        plan = self._plan(scopes)
        member = f"{id}\n{reserved.micros}"
        return [plan.record + id, *plan.keys], [member, self._encode(reserved), self._encode(used), plan.rules]

    def pack_cancel(self, id: str, scopes: Sequence[Scope], reserved: Cost) -> Packed:
        plan = self._plan(scopes)
        return [plan.record + id, *plan.keys], [f"{id}\n{reserved.micros}", self._encode(reserved), plan.rules]

    def pack_renew(self, held: Sequence[Held], lease_us: int) -> Packed:
        keys: list[str] = []
        args: list[str | int | bytes] = [lease_us]
        for one in held:
            plan = self._plan(one.scopes)
            keys.append(plan.record + one.id)
            keys += plan.keys
            args += (f"{one.id}\n{one.reserved.micros}", one.reserved.micros, plan.rules)
        return keys, args

    def pack_read(self, scopes: Sequence[Scope]) -> Packed:
        plan = self._made(scopes)
        return list(plan.keys), [plan.rules]

    def _plan(self, scopes: Sequence[Scope]) -> _Plan:
        """Found by identity: callers use the same tuple for many requests."""
        plan = self._plans.get(id(scopes))
        if plan is not None and plan.scopes is scopes:
            return plan
        plan = self._made(scopes)
        if isinstance(scopes, tuple):  # a list could change
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[id(scopes)] = plan
        return plan

    def _made(self, scopes: Sequence[Scope]) -> _Plan:
        names = [f"{self._prefix}:{scope.key}" for scope in scopes]
        leases: list[str] = []
        rules: list[list[Any]] = []
        for scope, name in zip(scopes, names, strict=True):
            position = 0
            if scope.concurrent is not None or scope.budgets:
                leases.append(f"{name}:leases")
                position = 1 + len(names) + len(leases)
            rates = [
                number
                for rate in scope.rates
                for number in (
                    rate.unit.value,
                    rate.per_minute,
                    rate.burst,
                    burst_us(rate.burst, rate.per_minute),
                    rate.largest,
                )
            ]
            budgets = [
                value
                for budget in scope.budgets
                for value in (
                    budget.period[:1],
                    budget.period,
                    budget.limit_micros,
                    budget.floor_micros,
                    budget.ends_at_us,
                )
            ]
            concurrent = -1 if scope.concurrent is None else scope.concurrent
            rules.append([rates, concurrent, budgets or False, int(scope.shadow), position])
        record = f"{self._prefix}:{_tag(scopes[0].key) if scopes else ''}:request:"
        return _Plan(scopes, record, (*names, *leases), self._encode(rules))


def unpack_admission(reply: Any) -> Admission:
    """What the admit script answered."""
    admitted, now_us, marks_us, in_use, spent_micros, *refusals = reply
    return Admission(
        admitted == 1,
        now_us,
        tuple(marks_us),
        tuple(in_use),
        tuple(spent_micros),
        tuple([Refusal(scope, limit.decode(), wait_us, shadow == 1) for scope, limit, wait_us, shadow in refusals])
        if refusals
        else (),
    )


def unpack_readings(reply: Any) -> list[Reading]:
    """What the script that reads answered."""
    now_us, *scopes = reply
    return [Reading(now_us, tuple(marks), in_use, reserved, tuple(spent)) for marks, in_use, reserved, spent in scopes]


def unpack_outcome(reply: Any) -> bool:
    """What the scripts of settle and cancel answered."""
    outcome: bool = reply == 1
    return outcome


def _tag(key: str) -> str:
    """The part in braces with which the keys of one tenant begin."""
    return key[: key.find("}") + 1]
