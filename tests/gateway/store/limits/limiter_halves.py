"""Both limiters behind one synchronous interface, on a clock that the test moves.

`Lua` runs the scripts that production runs, in a real Redis, but for two replacements in their text, which must both be
found: where they ask Redis for the time, they read a key that the test has set, and how many leases they prune in one
call may be another number. `test_redis_limits` proves that the scripts as they are go by Redis' own clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import redis

from gateway.store.limits import Admission, Cost, Held, Reading, Scope
from gateway.store.memory_limits import PRUNE
from gateway.store.redis.limits import Packed, RedisLimits, unpack_admission, unpack_outcome, unpack_readings
from gateway.store.redis.scripts import Script, script

START_US = 1_795_000_000_000_000
CLOCK_KEY = "clock-of-the-test"


class Half(Protocol):
    """`Limiter`, or what behaves like it."""

    def admit(self, id: str, scopes: Sequence[Scope], cost: Cost, lease_us: int, now_us: int) -> Admission: ...

    def settle(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost, now_us: int) -> bool: ...

    def cancel(self, id: str, scopes: Sequence[Scope], reserved: Cost, now_us: int) -> bool: ...

    def renew(self, held: Sequence[Held], lease_us: int, now_us: int) -> None: ...

    def read(self, scopes: Sequence[Scope], now_us: int) -> list[Reading]: ...


def with_clock(original: Script, prune: int = PRUNE) -> Script:
    """The same script, on the clock of the test."""
    text = original.text
    replacements = {
        "redis.call('TIME')": f"cjson.decode(redis.call('GET', '{CLOCK_KEY}'))",
        f"local PRUNE = {PRUNE}\n": f"local PRUNE = {prune}\n",
    }
    for old, new in replacements.items():
        assert text.count(old) == 1, f"{old} is not once in {original.name}"
        text = text.replace(old, new)
    return script(original.name, text)


class Unused:
    """In the place of the client: these tests pack, run and unpack themselves."""

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str | int | bytes]) -> object:
        raise AssertionError("not for these tests")


class Lua:
    """The scripts in a real Redis, whose data is dropped first."""

    def __init__(self, client: redis.Redis, *, prune: int = PRUNE) -> None:
        self._client = client
        client.flushdb()
        self.limits = RedisLimits(Unused(), "test")
        self._admit, self._settle, self._cancel, self._renew, self._read = (
            with_clock(original, prune)
            for original in (
                self.limits.admit_script,
                self.limits.settle_script,
                self.limits.cancel_script,
                self.limits.renew_script,
                self.limits.read_script,
            )
        )

    def admit(self, id: str, scopes: Sequence[Scope], cost: Cost, lease_us: int, now_us: int) -> Admission:
        return unpack_admission(self._run(self._admit, self.limits.pack_admit(id, scopes, cost, lease_us), now_us))

    def settle(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost, now_us: int) -> bool:
        return unpack_outcome(self._run(self._settle, self.limits.pack_settle(id, scopes, reserved, used), now_us))

    def cancel(self, id: str, scopes: Sequence[Scope], reserved: Cost, now_us: int) -> bool:
        return unpack_outcome(self._run(self._cancel, self.limits.pack_cancel(id, scopes, reserved), now_us))

    def renew(self, held: Sequence[Held], lease_us: int, now_us: int) -> None:
        self._run(self._renew, self.limits.pack_renew(held, lease_us), now_us)

    def read(self, scopes: Sequence[Scope], now_us: int) -> list[Reading]:
        return unpack_readings(self._run(self._read, self.limits.pack_read(scopes), now_us))

    def _run(self, script: Script, packed: Packed, now_us: int) -> object:
        keys, args = packed
        clock = f"[{now_us // 1_000_000},{now_us % 1_000_000}]"
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(CLOCK_KEY, clock)
        pipeline.evalsha(script.sha, len(keys), *keys, *args)
        try:
            return pipeline.execute()[1]
        except redis.exceptions.NoScriptError:
            self._client.script_load(script.text)
            return self._run(script, packed, now_us)
