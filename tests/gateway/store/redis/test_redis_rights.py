"""The rights that a Redis user needs, as `docs/limits.md` has them: no more, and no fewer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from gateway.store import StoreUnavailable
from gateway.store.limits import Budget, Cost, Held, Rate, Scope, Unit
from gateway.store.places import Band, Room, State, Ticket
from gateway.store.redis.client import RedisClient
from gateway.store.redis.limits import RedisLimits
from gateway.store.redis.places import RedisPlaces, granted_channel
from gateway.store.redis.store import RedisStore
from tests.gateway.store.redis.asking import COUNT, until
from tests.support.redis_server import RedisServer

LOOPS = ("asyncio", "uvloop")
Make = Callable[..., RedisClient]

DOCUMENT = Path(__file__).parents[4] / "docs" / "limits.md"
ASKED_DIRECTLY = {"ping", "eval", "evalsha", "subscribe", "unsubscribe", "get", "set", "xread", "xrevrange"}


def documented() -> list[str]:
    """What follows `ACL SETUSER` in the document, which may go on over several lines."""
    found = re.search(r"ACL SETUSER ((?:.*\\\n)*.*)", DOCUMENT.read_text("utf-8"))
    assert found is not None
    return found.group(1).replace("\\\n", " ").split()


def test_what_is_documented_are_the_commands_of_all_scripts_and_those_that_are_asked_directly() -> None:
    called: set[str] = set()
    for path in resources.files("gateway.store.redis").joinpath("scripts").iterdir():
        text = path.read_text("utf-8")
        named = re.findall(r"\bp?call\('([A-Z]+)'", text)
        assert len(named) == len(re.findall(r"\bp?call\(", text)), (
            f"{path.name} has a call whose command is not a literal"
        )
        called |= {name.lower() for name in named}
    assert {word[1:] for word in documented() if word.startswith("+")} == called | ASKED_DIRECTLY


async def test_a_user_with_the_documented_rights_can_do_everything(make_client: Make) -> None:
    words = ["hunter2" if word == "PASSWORD" else word.replace(">PASSWORD", ">hunter2") for word in documented()]
    with RedisServer(("user", "default", "off"), ("user", *words)) as server:
        client = make_client(server.url, username=words[0], password="hunter2")
        await _leases_and_facts(RedisStore(client))
        await _streams(RedisStore(client))
        await _limits(RedisLimits(client, client.prefix))
        await _places(client)
        assert await client._answers(client._links[0])  # the breaker's probe
        with pytest.raises(StoreUnavailable, match=r"NOPERM|can't access|No permissions"):
            await client.run(COUNT, ("other:{x}",), ())


async def _leases_and_facts(store: RedisStore) -> None:
    assert await store.claim("job", "a", 10.0)
    await store.post("key", b"value", 5.0)
    await store.withdraw("key")
    await store.release("job", "a")
    assert (await store.beat("gateway 1", 5.0)).live == 1
    cursor = (await store.read_since()).cursor
    reading = asyncio.create_task(store.read_since(cursor, 10.0))
    await asyncio.sleep(0.05)
    await store.post("key", b"value")
    assert (await reading).changes


async def _streams(store: RedisStore) -> None:
    await store.publish("a", b"1")
    for _ in range(2):
        (passage,) = await store.follow({"a": ""}, 1.0)
        await store.publish("a", b"2")
        assert await store.follow({"a": passage.cursor}, 1.0)
    await store.keep("a", b"blob", 5.0)
    assert await store.kept("a") == b"blob"


async def _limits(limits: RedisLimits) -> None:
    scopes = (
        Scope("{acme}:key:a", (Rate(Unit.REQUESTS, 60, 10, 10), Rate(Unit.TOTAL, 6000, 500, 900)), concurrent=2),
        Scope("{acme}:tenant", budgets=(Budget("d20261122", 5_000_000),)),
    )
    cost = Cost(1, 10, 20, 30, 40)
    for id in ("one", "two"):
        assert (await limits.admit(id, scopes, cost, 60_000_000)).admitted
    refused = await limits.admit("three", scopes, cost, 60_000_000)
    assert [refusal.limit for refusal in refused.refusals] == ["concurrent"]
    await limits.renew((Held("one", scopes, cost), Held("lost", scopes, cost)), 60_000_000)
    assert await limits.settle("one", scopes, cost, Cost(1, 10, 10, 20, 30))
    assert await limits.cancel("two", scopes, cost)


async def _places(client: RedisClient) -> None:
    places = RedisPlaces(client, client.prefix)
    room = Room(requests=1, tokens=1000)
    told: list[bytes] = []
    give_up = await client.subscribe(granted_channel(client.prefix, "g2"), told.append)
    first, second, third = (Ticket(f"r{n}", f"g{n}", "acme", 1.0, Band.STANDARD, 10, 20, 60_000_000) for n in (1, 2, 3))
    assert (await places.enter("pool", first, room)).state is State.GRANTED
    assert (await places.enter("pool", second, room)).state is State.WAITING
    assert (await places.enter("pool", third, room)).state is State.WAITING
    assert not (await places.renew("pool", "g1", (first,), (), room)).lost
    await places.leave("pool", "r1", "g1", 15, room)
    await until(lambda: told == [b"pool\nr2"])
    assert (await places.renew("pool", "g2", (), ("r2", "unknown"), room)).lost == ("unknown",)
    assert sum((await places.standing("pool")).running) == 1
    await places.leave("pool", "r3", "g3", None, room)
    await places.leave("pool", "r2", "g2", None, room)
    give_up()
