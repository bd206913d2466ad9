"""Leases and facts in Redis, and its `streams`: the `Store` of several gateway processes and nodes.

Readers that wait are woken by a message on a channel, and look by themselves now and then: a message may be lost, and
facts expire without one.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gateway.store.memory import EXPIRY_STEP_S, MAX_FACTS_BYTES, MAX_TOMBSTONES
from gateway.store.protocol import (
    GATHER_S,
    START,
    Fact,
    Facts,
    StoreFull,
    StoreUnavailable,
    check_name,
    check_ttl,
    check_value,
    check_wait,
)
from gateway.store.redis.client import RedisClient
from gateway.store.redis.link import Argument
from gateway.store.redis.scripts import Script, load
from gateway.store.redis.streams import RedisStreams
from gateway.store.streams import Passage, check_blob, check_payload

POLL_S = 0.5
"""A reader that waits looks at least this often."""
PAGE_CHANGES = 500
PAGE_BYTES = 131_072
"""About how much one reply may have: no other call waits long behind it."""


class Beat(NamedTuple):
    """The answer to a sign of life."""

    live: int
    """Processes that live, this one included."""
    known: bool
    """Whether Redis knew this one; else it has lost its memory, or this process was silent for too long."""


class RedisStore:
    """A `Store` in Redis. Closing it closes the client. `load` is for tests that bring a clock of their own."""

    def __init__(
        self,
        client: RedisClient,
        prefix: str = "",
        *,
        max_facts_bytes: int = MAX_FACTS_BYTES,
        max_tombstones: int = MAX_TOMBSTONES,
        load: Callable[[str], Script] = load,
    ) -> None:
        prefix = prefix or client.prefix
        self._client = client
        self._max_facts_bytes = max_facts_bytes
        self._max_tombstones = max_tombstones
        self._claim, self._release = load("claim"), load("release")
        self._post, self._withdraw, self._read = load("post"), load("withdraw"), load("read")
        self._beat = load("beat")
        self._streams = RedisStreams(client, prefix, load=load)
        self._lease_prefix = f"{prefix}:{{leases}}:"
        self._gateways = f"{prefix}:{{gateways}}"
        self._fact_keys = tuple(f"{prefix}:{{facts}}:{name}" for name in ("values", "log", "ended", "ends", "meta"))
        self._channel = f"{prefix}:facts"
        self._generation = secrets.token_hex(8)
        """For a Redis that has none."""
        self._subscribing: asyncio.Task[object] | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._next_read_at = 0.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<RedisStore {self._client.address.shown} waiting={len(self._waiting)}>"

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        check_name("a lease", lease)
        check_name("a holder", holder)
        check_ttl(ttl_s)
        return bool(await self._run(self._claim, (self._lease_prefix + lease,), (holder, _us(ttl_s))))

    async def release(self, lease: str, holder: str) -> None:
        check_name("a lease", lease)
        check_name("a holder", holder)
        await self._run(self._release, (self._lease_prefix + lease,), (holder,))

    async def post(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        check_name("a key", key)
        check_value(value)
        check_ttl(ttl_s)
        ttl_us = 0 if ttl_s is None else _us(ttl_s)
        if not await self._change(self._post, key, value, ttl_us, self._max_facts_bytes, self._channel):
            raise StoreFull(f"all facts together may have {self._max_facts_bytes} bytes")

    async def withdraw(self, key: str) -> None:
        check_name("a key", key)
        await self._change(self._withdraw, key, self._channel)

    async def read_since(self, cursor: str = START, wait_s: float = 0.0) -> Facts:
        check_wait(wait_s)
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        if wait_s and cursor:
            self._subscribe()
            if (gather_s := min(self._next_read_at, end) - loop.time()) > 0:
                await asyncio.sleep(gather_s)
        woken: asyncio.Future[None] = loop.create_future()
        while True:
            self._waiting.add(woken)  # before looking, so that nothing is posted unseen in between
            try:
                facts, expiry_s = await self._news(cursor)
                left_s = end - loop.time()
                if facts.reset or facts.changes or left_s <= 0:
                    self._next_read_at = loop.time() + GATHER_S
                    return facts
                await asyncio.wait((woken,), timeout=min(left_s, POLL_S, max(expiry_s, EXPIRY_STEP_S)))
            finally:
                self._waiting.discard(woken)
            self._check_open()
            if woken.done():
                woken = loop.create_future()
                await asyncio.sleep(min(GATHER_S, max(0.0, end - loop.time())))

    async def beat(self, gateway: str, ttl_s: float) -> Beat:
        """Note that this process lives, for `ttl_s` seconds. 0 seconds: it ends."""
        check_name("a gateway", gateway)
        live, known = await self._run(self._beat, (self._gateways,), (gateway, _us(ttl_s) if ttl_s > 0 else 0))
        return Beat(live, known == 1)

    async def publish(self, stream: str, payload: bytes) -> None:
        self._check_open()
        check_name("a stream", stream)
        check_payload(payload)
        await self._streams.publish(stream, payload)

    async def follow(self, cursors: Mapping[str, str], wait_s: float = 0.0) -> tuple[Passage, ...]:
        self._check_open()
        check_wait(wait_s)
        return await self._streams.follow(cursors, wait_s)

    async def keep(self, name: str, blob: bytes, ttl_s: float) -> None:
        self._check_open()
        check_name("a kept blob's name", name)
        check_blob(blob)
        check_ttl(ttl_s)
        await self._streams.keep(name, blob, ttl_s)

    async def kept(self, name: str) -> bytes | None:
        self._check_open()
        check_name("a kept blob's name", name)
        return await self._streams.kept(name)

    async def aclose(self) -> None:
        self._closed = True
        self._wake(b"")
        self._streams.close()
        if self._subscribing is not None:
            self._subscribing.cancel()
            await asyncio.gather(self._subscribing, return_exceptions=True)
        await self._client.aclose()

    async def _run(self, script: Script, keys: tuple[str, ...], args: tuple[Argument, ...]) -> Any:
        self._check_open()
        return await self._client.run(script, keys, args)

    async def _change(self, script: Script, *args: Argument) -> Any:
        return await self._run(script, self._fact_keys, (self._generation, self._max_tombstones, *args))

    async def _news(self, cursor: str) -> tuple[Facts, float]:
        """What is new to the reader, and in how many seconds the next fact ends."""
        epoch = self._client.epoch
        generation, since = self._seen(cursor)
        position, reset = since, False
        changes: dict[str, bytes | None] = {}
        while True:
            reply = await self._change(self._read, generation, since, position, str(PAGE_CHANGES), str(PAGE_BYTES))
            generation, number, anew, since, position, more, expiry_us = reply[:7]
            if anew:
                changes.clear()
                reset = True
            for key, value in zip(reply[7::2], reply[8::2], strict=True):
                name = key.decode()
                changes.pop(name, None)
                changes[name] = value
            if not more:
                break
        facts = tuple(Fact(key, value) for key, value in changes.items() if not (reset and value is None))
        now = f"{generation.decode()}.{number.decode()}.{epoch}"
        return Facts(now if facts or reset else cursor, facts, reset), math.inf if expiry_us < 0 else expiry_us / 1e6

    def _seen(self, cursor: str) -> tuple[str, str]:
        """Generation and number, both empty-like when the reader has to begin anew.

        A cursor of an earlier connection is one of these: the Redis at the other end may be another one, which never
        heard of the last changes.
        """
        generation, _, rest = cursor.partition(".")
        number, _, epoch = rest.partition(".")
        known = cursor.isascii() and number.isdecimal() and len(number) < 20 and generation.isalnum()
        return (generation, number) if known and epoch == str(self._client.epoch) else ("-", "0")

    def _subscribe(self) -> None:
        if self._subscribing is None and not self._closed:
            work = self._client.subscribe(self._channel, self._wake)
            self._subscribing = asyncio.get_running_loop().create_task(work)

    def _wake(self, _: bytes) -> None:
        for woken in self._waiting:
            if not woken.done():
                woken.set_result(None)
        self._waiting.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(self._client.address.shown, "it is closed")


def _us(seconds: float) -> int:
    """Whole microseconds, at least one."""
    return math.ceil(seconds * 1_000_000)
