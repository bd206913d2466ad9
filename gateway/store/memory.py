"""The store of one process, and the specification of the others: everything is decided in plain synchronous code.

`Leases` and `FactLog` know no clock: every call is given `now`, in seconds, which never goes back. `MemoryStore` puts
a clock and waiting readers around them.
"""

from __future__ import annotations

import asyncio
import heapq
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gateway.store.memory_streams import Followers, KeptBlobs, MessageLog
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
from gateway.store.streams import Passage, check_blob, check_payload

MAX_LEASES = 100_000
MAX_FACTS_BYTES = 8 * 1024 * 1024
"""Keys and values of all facts that hold. A reset tells all of them at once, so they have to fit into one answer."""
FACT_BYTES = 100
"""What a fact is counted with on top of its key and value: about what this process spends on keeping one."""
MAX_TOMBSTONES = 10_000
"""Ends of facts that are remembered, so that readers hear of them. One that misses more of them starts anew."""
EXPIRY_STEP_S = 0.05
"""A reader that waits looks for expired facts at most this often."""


class Expiries:
    """Which names run out when: a heap whose overtaken entries are dropped once they outnumber the others."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, name: str, ends_at: float) -> None:
        self._ends[name] = ends_at
        heapq.heappush(self._heap, (ends_at, name))
        if len(self._heap) > 2 * len(self._ends) + 64:
            self._heap = [(ends_at, name) for name, ends_at in self._ends.items()]
            heapq.heapify(self._heap)

    def discard(self, name: str) -> None:
        self._ends.pop(name, None)

    def next_at(self) -> float | None:
        """When the next name runs out; None when none does."""
        while self._heap:
            ends_at, name = self._heap[0]
            if self._ends.get(name) == ends_at:
                return ends_at
            heapq.heappop(self._heap)
        return None

    def take_due(self, now: float) -> Iterator[str]:
        """The names whose end has come, in the order of their ends. They are forgotten here."""
        while (ends_at := self.next_at()) is not None and ends_at <= now:
            name = heapq.heappop(self._heap)[1]
            del self._ends[name]
            yield name


class Leases:
    """Who holds what; see `Store.claim` and `Store.release`."""

    def __init__(self, limit: int = MAX_LEASES) -> None:
        self._limit = limit
        self._holders: dict[str, str] = {}
        self._expiries = Expiries()

    def __len__(self) -> int:
        return len(self._holders)

    def claim(self, lease: str, holder: str, ttl_s: float, now: float) -> bool:
        self.expire(now)
        current = self._holders.get(lease)
        if current is None and len(self._holders) >= self._limit:
            raise StoreFull(f"there are {self._limit} leases already")
        if current is not None and current != holder:
            return False
        self._holders[lease] = holder
        self._expiries.set(lease, now + ttl_s)
        return True

    def release(self, lease: str, holder: str, now: float) -> None:
        self.expire(now)
        if self._holders.get(lease) == holder:
            del self._holders[lease]
            self._expiries.discard(lease)

    def expire(self, now: float) -> None:
        for lease in self._expiries.take_due(now):
            del self._holders[lease]


@dataclass(frozen=True, slots=True)
class _Entry:
    """The last change of one key."""

    number: int
    """Counts the changes of all keys. A cursor is the number of the last change that its reader has seen."""
    changed_at: float
    fact: Fact


@dataclass(frozen=True, slots=True)
class News:
    """What a reader would be told now, and since when it could have been."""

    facts: Facts
    oldest_at: float


class FactLog:
    """The last change of every key, in the order of the changes; see `Store.post`, `withdraw` and `read_since`."""

    def __init__(
        self, generation: str, *, max_bytes: int = MAX_FACTS_BYTES, max_tombstones: int = MAX_TOMBSTONES
    ) -> None:
        self._generation = generation
        self._max_bytes = max_bytes
        self._max_tombstones = max_tombstones
        self._size_bytes = 0
        self._number = 0
        self._forgotten = 0
        """The number of the last change that was dropped. Readers that have not seen it cannot go on."""
        self._live: OrderedDict[str, _Entry] = OrderedDict()
        self._ended: OrderedDict[str, _Entry] = OrderedDict()
        self._expiries = Expiries()

    def __len__(self) -> int:
        return len(self._live)

    def post(self, key: str, value: bytes, ttl_s: float | None, now: float) -> None:
        self.expire(now)
        before = self._live.get(key)
        size_bytes = self._size_bytes + _size_bytes(key, value) - (0 if before is None else _weight_bytes(before.fact))
        if size_bytes > self._max_bytes:
            raise StoreFull(f"all facts together may have {self._max_bytes} bytes")
        self._size_bytes = size_bytes
        self._ended.pop(key, None)
        self._live[key] = self._entry(key, value, now)
        self._live.move_to_end(key)
        if ttl_s is None:
            self._expiries.discard(key)
        else:
            self._expiries.set(key, now + ttl_s)

    def withdraw(self, key: str, now: float) -> bool:
        """Whether there was something to withdraw."""
        self.expire(now)
        self._expiries.discard(key)
        return self._end(key, now)

    def expire(self, now: float) -> None:
        for key in self._expiries.take_due(now):
            self._end(key, now)

    def next_expiry_at(self) -> float | None:
        return self._expiries.next_at()

    def read(self, cursor: str, now: float) -> News | None:
        """What is new since `cursor`; None when nothing is."""
        self.expire(now)
        seen = self._seen(cursor)
        if seen is None:
            facts = tuple(entry.fact for entry in self._live.values())
            return News(Facts(self._cursor(), facts, reset=True), now - GATHER_S)
        if seen == self._number:
            return None
        entries = [*_newer(self._live, seen), *_newer(self._ended, seen)]
        entries.sort(key=lambda entry: entry.number)
        return News(Facts(self._cursor(), tuple(entry.fact for entry in entries)), entries[0].changed_at)

    def _end(self, key: str, now: float) -> bool:
        entry = self._live.pop(key, None)
        if entry is None:
            return False
        self._size_bytes -= _weight_bytes(entry.fact)
        self._ended[key] = self._entry(key, None, now)
        if len(self._ended) > self._max_tombstones:
            self._forgotten = self._ended.popitem(last=False)[1].number
        return True

    def _entry(self, key: str, value: bytes | None, now: float) -> _Entry:
        self._number += 1
        return _Entry(self._number, now, Fact(key, value))

    def _cursor(self) -> str:
        return f"{self._generation}.{self._number}"

    def _seen(self, cursor: str) -> int | None:
        """The number of the last change seen; None when its reader has to start anew."""
        generation, _, number = cursor.rpartition(".")
        if generation != self._generation or not (number.isascii() and number.isdecimal() and len(number) < 20):
            return None
        return int(number) if self._forgotten <= int(number) <= self._number else None


def _newer(entries: OrderedDict[str, _Entry], seen: int) -> Iterator[_Entry]:
    """From the last change backwards, so that a reader pays for what it has missed and not for all there is."""
    for entry in reversed(entries.values()):
        if entry.number <= seen:
            return
        yield entry


def _size_bytes(key: str, value: bytes) -> int:
    return len(key.encode()) + len(value) + FACT_BYTES


def _weight_bytes(fact: Fact) -> int:
    return _size_bytes(fact.key, fact.value or b"")


class MemoryStore:
    """A `Store` in this process. `clock` gives seconds and never goes back.

    The `_now` methods are the same operations for whoever must not suspend between two of them.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_leases: int = MAX_LEASES,
        max_facts_bytes: int = MAX_FACTS_BYTES,
        max_tombstones: int = MAX_TOMBSTONES,
    ) -> None:
        self._clock = clock
        self._leases = Leases(max_leases)
        self._facts = FactLog(secrets.token_hex(8), max_bytes=max_facts_bytes, max_tombstones=max_tombstones)
        self._messages = MessageLog(secrets.token_hex(8))
        self._kept = KeptBlobs()
        self._followers = Followers()
        self._readers = Followers()
        self._closed = False

    def __repr__(self) -> str:
        return f"<MemoryStore leases={len(self._leases)} facts={len(self._facts)} waiting={len(self._readers)}>"

    def claim_now(self, lease: str, holder: str, ttl_s: float) -> bool:
        self._check_open()
        check_name("a lease", lease)
        check_name("a holder", holder)
        check_ttl(ttl_s)
        return self._leases.claim(lease, holder, ttl_s, self._clock())

    def release_now(self, lease: str, holder: str) -> None:
        self._check_open()
        check_name("a lease", lease)
        check_name("a holder", holder)
        self._leases.release(lease, holder, self._clock())

    def post_now(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        self._check_open()
        check_name("a key", key)
        check_value(value)
        check_ttl(ttl_s)
        self._facts.post(key, value, ttl_s, self._clock())
        self._readers.wake()

    def withdraw_now(self, key: str) -> None:
        self._check_open()
        check_name("a key", key)
        if self._facts.withdraw(key, self._clock()):
            self._readers.wake()

    def read_now(self, cursor: str) -> Facts:
        self._check_open()
        news = self._facts.read(cursor, self._clock())
        return Facts(cursor) if news is None else news.facts

    def publish_now(self, stream: str, payload: bytes) -> None:
        self._check_open()
        check_name("a stream", stream)
        check_payload(payload)
        self._messages.publish(stream, payload)
        self._followers.wake()

    def follow_now(self, cursors: Mapping[str, str]) -> tuple[Passage, ...]:
        self._check_open()
        return self._messages.read(cursors)

    def keep_now(self, name: str, blob: bytes, ttl_s: float) -> None:
        self._check_open()
        check_name("a kept blob's name", name)
        check_blob(blob)
        check_ttl(ttl_s)
        now = self._clock()
        self._kept.keep(name, blob, now + ttl_s, now)

    def kept_now(self, name: str) -> bytes | None:
        self._check_open()
        check_name("a kept blob's name", name)
        return self._kept.get(name, self._clock())

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        return self.claim_now(lease, holder, ttl_s)

    async def release(self, lease: str, holder: str) -> None:
        self.release_now(lease, holder)

    async def post(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        self.post_now(key, value, ttl_s)

    async def withdraw(self, key: str) -> None:
        self.withdraw_now(key)

    async def read_since(self, cursor: str = START, wait_s: float = 0.0) -> Facts:
        check_wait(wait_s)
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        gathered = False
        while True:
            self._check_open()
            now = self._clock()
            news = self._facts.read(cursor, now)
            left_s = end - loop.time()
            if news is not None:
                gather_s = min(news.oldest_at + GATHER_S - now, left_s)
                if gathered or gather_s <= 0:
                    return news.facts
                gathered = True
                await asyncio.sleep(gather_s)
            elif left_s <= 0:
                return Facts(cursor)
            else:
                await self._change(left_s, now)

    async def publish(self, stream: str, payload: bytes) -> None:
        self.publish_now(stream, payload)

    async def follow(self, cursors: Mapping[str, str], wait_s: float = 0.0) -> tuple[Passage, ...]:
        check_wait(wait_s)
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while True:
            passages = self.follow_now(cursors)
            left_s = end - loop.time()
            if passages or left_s <= 0:
                return passages
            await self._followers.wait(left_s)

    async def keep(self, name: str, blob: bytes, ttl_s: float) -> None:
        self.keep_now(name, blob, ttl_s)

    async def kept(self, name: str) -> bytes | None:
        return self.kept_now(name)

    async def aclose(self) -> None:
        self._closed = True
        self._readers.wake()
        self._followers.wake()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("memory", "it is closed")

    async def _change(self, within_s: float, now: float) -> None:
        """Returns when something changed, or may have expired, or the time is over."""
        expiry_at = self._facts.next_expiry_at()
        if expiry_at is not None:
            within_s = min(within_s, max(expiry_at - now, EXPIRY_STEP_S))
        await self._readers.wait(within_s)
