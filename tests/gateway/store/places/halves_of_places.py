"""The queue in memory and in Redis behind one synchronous face, on one clock that the test moves."""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from gateway.store.band_queue import BandQueue
from gateway.store.memory_places import Line, MemoryPlaces
from gateway.store.places import Band, Entry, Granted, Places, Renewal, Room, Standing, State, Ticket
from gateway.store.redis.client import RedisClient
from gateway.store.redis.places import KEYS, RedisPlaces
from gateway.store.redis.scripts import Script, script
from tests.support.redis_server import RedisServer

POOL = "chat"
START_US = 1_790_000_000_000_000
CLOCK_KEY = "test:clock"
T = TypeVar("T")


class Clock:
    def __init__(self) -> None:
        self.now_us = START_US

    def __call__(self) -> int:
        return self.now_us

    def pass_(self, us: int) -> None:
        self.now_us += us


def drive(call: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never has to wait."""
    try:
        call.send(None)
    except StopIteration as done:
        answer: T = done.value
        return answer
    raise AssertionError("it waited")


class Ready:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self.value


class ScriptRunner:
    """Runs scripts at once, as `RedisClient.run` does with waiting; on the test's clock if there is one."""

    def __init__(self, server: RedisServer, clock: Clock | None) -> None:
        self.connection = server.client()
        self.clock = clock
        self.changed: dict[str, Script] = {}

    def run(self, what: Script, keys: Sequence[str], args: Sequence[str | int | bytes]) -> Ready:
        if self.clock is not None:
            seconds, micros = divmod(self.clock(), 1_000_000)
            self.connection.hset(CLOCK_KEY, mapping={"s": seconds, "us": micros})
            what = self.changed.get(what.name) or self._on_clock(what)
        try:
            answer = self.connection.evalsha(what.sha, len(keys), *keys, *args)
        except Exception as error:
            if "NOSCRIPT" not in repr(error) and type(error).__name__ != "NoScriptError":
                raise
            answer = self.connection.eval(what.text, len(keys), *keys, *args)
        return Ready(answer)

    def _on_clock(self, what: Script) -> Script:
        text = what.text.replace("redis.call('TIME')", f"redis.call('HMGET', '{CLOCK_KEY}', 's', 'us')")
        assert text != what.text
        self.changed[what.name] = script(what.name, text)
        return self.changed[what.name]


class Half(Protocol):
    places: Places
    clock: Clock
    told: list[tuple[str, str]]
    """Gateway and id of grants that no answer told, since the test emptied it."""

    def hear(self) -> None:
        """Until what was published has come."""

    def close(self) -> None: ...


class MemoryHalf:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.told: list[tuple[str, str]] = []
        self.memory = MemoryPlaces(clock, self._on_granted)
        self.places: Places = self.memory

    def _on_granted(self, gateway: str, pool: str, id: str) -> None:
        assert pool == POOL
        self.told.append((gateway, id))

    def hear(self) -> None:
        pass

    def close(self) -> None:
        pass

    def inside(self) -> dict[str, Any]:
        line: Line = self.memory._line(POOL)
        bands = line._bands
        return {
            "numbers": [getattr(band, name) for name in BY_BAND for band in bands]
            + [line._number, line._grants, line._interval_us, line._released_us, line._measured_us]
            + [band.passed for band in bands]
            + [line._tidied_us],
            "finish": [band.finish for band in bands],
            "heads": [[(head.start, head.number, head.tenant) for head in band.heads] for band in bands],
            "held": {id: place.ends_us for id, place in line._held.items()},
            "queued": {id: waiter.number for id, waiter in line._queued.items()},
            "seen": dict(line._seen),
        }


BY_BAND = ("virtual", "turn", "running", "tokens", "waiting")
assert set(BY_BAND) < set(BandQueue.__slots__)


class RedisHalf:
    def __init__(self, server: RedisServer, clock: Clock, prefix: str = "tidegate") -> None:
        self.clock = clock
        self.prefix = prefix
        self.told: list[tuple[str, str]] = []
        self.runner = ScriptRunner(server, clock)
        self.connection = self.runner.connection
        client: Any = self.runner
        typed: RedisClient = client
        self.places: Places = RedisPlaces(typed, prefix)
        self.pubsub = self.connection.pubsub(  # type: ignore[no-untyped-call]
            ignore_subscribe_messages=True
        )
        self.pubsub.psubscribe(f"{prefix}:granted:*")
        self.hear()

    def hear(self) -> None:
        self.pubsub.ping("heard")
        while True:
            message = self.pubsub.get_message(timeout=15.0)
            if message is None:
                continue
            if message["type"] == "pong":
                return
            pool, id = message["data"].decode().split("\n")
            assert pool == POOL
            self.told.append((message["channel"].decode().removeprefix(f"{self.prefix}:granted:"), id))

    def close(self) -> None:
        self.pubsub.close()
        self.connection.close()

    def key(self, name: str) -> str:
        assert name in KEYS
        return f"{self.prefix}:{{pool:{POOL}}}:{name}"

    def begin_anew(self) -> None:
        self.connection.flushall()
        self.told.clear()

    def inside(self) -> dict[str, Any]:
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.get(self.key("state"))
            for name in ("heads", "finish"):
                for band in range(4):
                    pipe.zrange(self.key(f"{name}{band}"), 0, -1, withscores=True)
            pipe.zrange(self.key("ends"), 0, -1, withscores=True)
            pipe.hgetall(self.key("queued"))
            pipe.zrange(self.key("seen"), 0, -1, withscores=True)
            answers: list[Any] = pipe.execute()
        state = msgspec.msgpack.decode(answers[0]) if answers[0] else [0] * 33
        assert all(isinstance(value, int) for value in state)
        return {
            "numbers": state[:25] + state[28:],
            "finish": [{name.decode(): int(score) for name, score in band} for band in answers[5:9]],
            "heads": [
                [(int(score), int(name[:16]), name[16:].decode()) for name, score in band] for band in answers[1:5]
            ],
            "held": {id.decode(): int(score) for id, score in answers[9]},
            "queued": {id.decode(): int(entry.split(b"\0")[2]) for id, entry in answers[10].items()},
            "seen": {gateway.decode(): int(score) for gateway, score in answers[11]},
        }


class Pool:
    """The operations on one pool of one half, or of several that have to answer the same."""

    def __init__(self, *halves: Half) -> None:
        self.halves = halves
        self.clock = halves[0].clock
        self.room = Room(2)

    def _each(self, call: Any) -> Any:
        answers = []
        for half in self.halves:
            answers.append(drive(call(half.places)))
            half.hear()
        assert all(answer == answers[0] for answer in answers), answers
        told = [half.told for half in self.halves]
        assert all(each == told[0] for each in told), told
        return answers[0]

    def take_told(self) -> list[tuple[str, str]]:
        told = list(self.halves[0].told)
        for half in self.halves:
            half.told.clear()
        return told

    def enter(self, ticket: Ticket) -> Entry:
        answer: Entry = self._each(lambda places: places.enter(POOL, ticket, self.room))
        return answer

    def leave(self, id: str, gateway: str = "g1", used: int | None = None) -> Granted:
        answer: Granted = self._each(lambda places: places.leave(POOL, id, gateway, used, self.room))
        return answer

    def renew(self, gateway: str = "g1", held: Sequence[Ticket] = (), waiting: Sequence[str] = ()) -> Renewal:
        answer: Renewal = self._each(lambda places: places.renew(POOL, gateway, held, waiting, self.room))
        return answer

    def standing(self) -> Standing:
        answer: Standing = self._each(lambda places: places.standing(POOL))
        return answer


def ticket(
    id: str,
    tenant: str = "acme",
    *,
    gateway: str = "g1",
    weight: float = 1.0,
    band: Band = Band.STANDARD,
    cost: int = 100,
    tokens: int = 10,
    max_wait_us: int = 10**12,
) -> Ticket:
    return Ticket(id, gateway, tenant, weight, band, cost, tokens, max_wait_us)


__all__ = ["POOL", "Clock", "Half", "MemoryHalf", "Pool", "RedisHalf", "ScriptRunner", "State", "drive", "ticket"]
