"""What only the queue in Redis can get wrong: its clock, its keys, and losing some of them."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from gateway.store.places import Band, Entry, Room, State, Ticket
from gateway.store.redis.address import parse_address
from gateway.store.redis.client import RedisClient
from gateway.store.redis.places import KEYS, RedisPlaces, granted_channel
from gateway.store.redis.scripts import load
from tests.gateway.store.places.halves_of_places import (
    POOL,
    Clock,
    MemoryHalf,
    Pool,
    RedisHalf,
    ScriptRunner,
    drive,
    ticket,
)
from tests.support.redis_server import RedisServer

ROOM = Room(1, lease_us=10_000_000, grant_us=5_000_000)


def places_on(runner: Any) -> RedisPlaces:
    client: RedisClient = runner
    return RedisPlaces(client)


def test_time_is_that_of_redis(redis_server: RedisServer) -> None:
    runner = ScriptRunner(redis_server, clock=None)
    with runner.connection as connection:
        places = places_on(runner)
        assert drive(places.enter(POOL, ticket("a"), ROOM)).state is State.GRANTED
        ((_, ends_us),) = connection.zrange(f"tidegate:{{pool:{POOL}}}:ends", 0, -1, withscores=True)
        seconds, micros = connection.time()
        assert 0 <= seconds * 1_000_000 + micros + ROOM.lease_us - ends_us < 5_000_000
        deadline = time.monotonic() + 15
        short = Room(1, lease_us=1000)
        drive(places.renew(POOL, "g1", [ticket("a")], [], short))
        while sum(drive(places.standing(POOL)).running):
            assert time.monotonic() < deadline
        assert "redis.call('TIME')" in load("enter").text


@pytest.mark.parametrize("lost", [name for name in KEYS if name not in ("gone", "gone_before", "seen")])
def test_a_pool_that_lost_one_of_its_keys_begins_anew(redis_server: RedisServer, lost: str) -> None:
    half = RedisHalf(redis_server, Clock())
    pool = Pool(half)
    pool.room = Room(1)
    held = ticket("a")
    pool.enter(held)
    pool.enter(ticket("b"))
    half.connection.delete(half.key(lost))
    pool.renew(held=[held])
    if pool.renew(waiting=["b"]).lost:
        assert pool.enter(ticket("b")).state is State.WAITING
    assert pool.leave("a").ids == ("b",)
    pool.leave("b")
    assert pool.standing().running == (0, 0, 0, 0)
    assert pool.standing().waiting == (0, 0, 0, 0)
    half.close()


def test_every_key_of_a_pool_is_declared_and_in_one_slot(redis_server: RedisServer) -> None:
    half = RedisHalf(redis_server, Clock())
    pool = Pool(half)
    for n in range(4):
        pool.enter(ticket(f"r{n}"))
    pool.leave("r0")
    written = {key.decode() for key in half.connection.scan_iter()} - {"test:clock"}
    assert written <= {half.key(name) for name in KEYS}
    assert all("{pool:chat}" in key for key in written)
    half.close()


async def test_gateways_on_one_redis_take_turns(redis_server: RedisServer) -> None:
    clients = [RedisClient(parse_address(redis_server.url), timeout_s=10.0) for _ in range(2)]
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    try:
        first, second = (RedisPlaces(client) for client in clients)
        await clients[1].subscribe(granted_channel("tidegate", "g2"), heard.put_nowait)
        assert await first.enter(POOL, ticket("a"), ROOM) == Entry(State.GRANTED)
        waiting: Ticket = ticket("b", gateway="g2")
        assert (await second.enter(POOL, waiting, ROOM)).state is State.WAITING
        deadline = time.monotonic() + 15
        while redis_server.command("PUBSUB", "NUMSUB", granted_channel("tidegate", "g2"))[1] == 0:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await first.leave(POOL, "a", "g1", 90, ROOM)
        assert await asyncio.wait_for(heard.get(), 15) == b"chat\nb"
        assert (await second.renew(POOL, "g2", [waiting], [], ROOM)).lost == ()
        assert (await first.standing(POOL)).running == (0, 1, 0, 0)
    finally:
        for client in clients:
            await client.aclose()


def test_every_key_of_a_pool_runs_out_by_itself_whatever_was_done_last(redis_server: RedisServer) -> None:
    clock = Clock()
    half = RedisHalf(redis_server, clock)
    pool = Pool(half)
    pool.room = Room(2, gateway_us=10**12)
    rng = random.Random(5)
    seen: set[str] = set()
    tickets: dict[str, Ticket] = {}
    for number in range(600):
        clock.pass_(rng.choice([1000, 400_000, 61_000_000]))
        id = f"r{rng.randrange(30)}-{number // 60}"
        tickets.setdefault(
            id, ticket(id, rng.choice("abc"), gateway=rng.choice(["g1", "g2"]), band=rng.choice([*Band]))
        )
        act = rng.random() if number else 0.0  # the first must not be one that tidies
        if act < 0.5:
            pool.enter(tickets[id])
        elif act < 0.9:
            pool.leave(id, tickets[id].gateway, rng.choice([None, 10, 5000]))
        else:
            pool.renew(tickets[id].gateway, [tickets[id]])
        for key in half.connection.scan_iter("tidegate:*"):
            name = key.decode().rpartition(":")[2]
            seen.add(name)
            assert 0 < half.connection.ttl(key) <= 90_000, (number, name)
    assert seen == set(KEYS)
    half.close()


def test_a_renewal_keeps_what_is_in_use(redis_server: RedisServer) -> None:
    clock = Clock()
    half = RedisHalf(redis_server, clock)
    pool = Pool(half)
    pool.room = Room(1, lease_us=10**12)
    pool.enter(ticket("a"))
    pool.enter(ticket("b"))
    pool.renew(held=[ticket("a")], waiting=["b"])
    used = ("state", "held", "ends", "queued", "line", "siblings", "seen", "heads1", "finish1")
    for name in used:
        assert half.connection.expire(half.key(name), 100)
    clock.pass_(1_000_000)
    pool.renew(held=[ticket("a")], waiting=["b"])
    assert half.connection.ttl(half.key("held")) <= 100  # not with each of them, which would take its time
    clock.pass_(3_600_000_000)
    pool.renew(held=[ticket("a")], waiting=["b"])
    assert all(half.connection.ttl(half.key(name)) > 80_000 for name in used)
    half.close()


def test_gateways_of_the_past_are_forgotten(redis_server: RedisServer) -> None:
    clock = Clock()
    memory, redis = MemoryHalf(clock), RedisHalf(redis_server, clock)
    pool = Pool(memory, redis)
    for number in range(20):
        pool.renew(f"g{number}")
        clock.pass_(1_000_000_000)
    assert set(memory.inside()["seen"]) == set(redis.inside()["seen"])
    assert len(redis.inside()["seen"]) <= 8
    redis.close()
