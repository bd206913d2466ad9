"""Who is known to start a replica, how long that takes, and how wide a pool is opened: decided without a socket."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from backends.discovery.member import Member
from backends.ticker import Ticker
from gateway.admission.doors import BETWEEN_S, DOUBLES_IN_S, FIRST, OPENING_S, Doors
from gateway.admission.rooms import Rooms
from gateway.config import Settings
from gateway.fleet import Pool, build_fleet
from gateway.notices import AGENT, HOLD, START, Notices
from gateway.scaling.agents import LOST_AFTER_S, PoolReport, Report
from gateway.scaling.standing import Hold
from gateway.starting.note import StartNote
from gateway.starting.prospects import AGAIN_S, Starts
from gateway.starting.telling import PoolStarts

NOW = 1_000_000.0
LAUNCH: dict[str, Any] = {"launch": {"model": "/models/a.gguf"}, "engine": "llamacpp"}
COMMAND: dict[str, Any] = {"provider": "command", "command": {"words": ["true"]}}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def a_pool(replicas: int = 0, **backend: Any) -> Pool:
    given: dict[str, Any] = {
        "engine": "openai",
        "discovery": {"registration": {}},
        "replicas": [{"url": f"http://127.0.0.1:{at + 1}", "name": f"r{at}"} for at in range(replicas)],
        **backend,
    }
    data: dict[str, Any] = {"models": {"m": {"backend": "pool"}}, "backends": {"pool": given}}
    settings = Settings(**data)
    ticker = Ticker()
    try:
        return build_fleet(settings, ticker, time.time()).pools["pool"]
    finally:
        ticker.close()


def starts(notices: Notices, clock: Clock) -> Starts:
    return Starts(notices, unix_s=lambda: NOW + clock.now, monotonic=clock)


def post(notices: Notices, kind: str, rest: str, what: msgspec.Struct) -> None:
    notices.apply(kind, f"{kind}/{rest}", msgspec.json.encode(what))


async def test_only_a_pool_that_somebody_fills_is_waited_for() -> None:
    notices, clock = Notices(), Clock()
    known = starts(notices, clock)
    clock.now = 100.0
    scaled = await a_pool(scaling={"min": 0, "max": 2, **COMMAND})
    published = await a_pool(scaling={"min": 0, "max": 2})
    acted_on = await a_pool(scaling={"min": 0, "max": 2}, queue={"start_wait_s": 60})
    found = await a_pool()
    assert known.of(scaled) is not None
    assert known.of(acted_on) is not None
    assert known.of(published) is None
    assert known.of(found) is None
    assert known.of(await a_pool(scaling={"min": 0, "max": 2, **COMMAND}, queue={"start_wait_s": 0})) is None
    post(notices, START, "other/1", StartNote(1, NOW))
    assert known.of(found) is None
    post(notices, START, "pool/1", StartNote(0, NOW))  # ordered, which says nothing of one that nobody acts on
    assert known.of(found) is None
    notices.apply(START, f"{START}/pool/2", b"not one of ours")
    post(notices, START, "pool/3", StartNote(1, NOW, "loading"))
    assert [known.of(each) is not None for each in (found, published)] == [True, True]
    notices.apply(START, f"{START}/pool/3", None)
    assert known.of(found) is None


async def test_what_an_operator_holds_at_none_is_not_waited_for_unless_one_starts_all_the_same() -> None:
    notices, clock = Notices(), Clock()
    known, pool = starts(notices, clock), await a_pool(scaling={"min": 0, "max": 2, **COMMAND})
    post(notices, HOLD, "pool", Hold(0, NOW + 60, "ann"))
    assert known.of(pool) is None
    post(notices, START, "pool/1", StartNote(1, NOW))
    assert known.of(pool) is not None
    notices.apply(START, f"{START}/pool/1", None)
    clock.now = 61.0
    assert known.of(pool) is not None
    post(notices, HOLD, "pool", Hold(1, NOW + 600, "ann"))
    assert known.of(pool) is not None


async def test_servers_that_no_agent_can_launch_are_not_waited_for() -> None:
    notices, clock = Notices(), Clock()
    known = starts(notices, clock)
    pool = await a_pool(**LAUNCH, scaling={"min": 0, "max": 2, "provider": "local"})
    assert known.of(pool) is not None  # a worker that has just begun has heard of nobody yet
    clock.now = LOST_AFTER_S
    assert known.of(pool) is None
    post(notices, AGENT, "box", Report({"other": PoolReport(max=2)}))
    assert known.of(pool) is None
    post(notices, AGENT, "box", Report({"pool": PoolReport(max=2)}))
    assert known.of(pool) is not None


async def test_when_to_come_back_is_what_most_starts_take_less_what_has_passed() -> None:
    notices, clock = Notices(), Clock()
    known, pool = starts(notices, clock), await a_pool()
    post(notices, START, "pool/1", StartNote(1, NOW - 5, "downloading", 0.1, lead_s=80.0, learned=True))
    post(notices, START, "pool/2", StartNote(2, NOW - 30, "loading", 0.4, "shard 3 of 7", 80.0, True))
    prospect = known.of(pool)
    assert prospect is not None
    assert (prospect.passed_s, prospect.left_s) == (30.0, 50.0)
    assert prospect.said == "one has been starting for 30 s, loading (40%); most starts take up to 80 s"
    clock.now = 60.0
    prospect = known.of(pool)
    assert prospect is not None
    assert prospect.left_s == AGAIN_S  # longer than most; nobody knows
    notices.apply(START, f"{START}/pool/2", None)
    post(notices, START, "pool/1", StartNote(1, NOW, detail="no file /var/lib/models/secret/weights.gguf"))
    prospect = known.of(pool)
    assert prospect is not None
    assert (prospect.left_s, "secret" in prospect.said) == (AGAIN_S, False)


def member(state: Any = "starting", **fields: Any) -> Member:
    return Member(url="http://127.0.0.1:1", name=fields.pop("name", "r0"), state=state, **fields)


def test_a_start_is_told_from_its_beginning_and_a_server_that_is_started_again_begins_anew() -> None:
    told = PoolStarts()
    assert told.note([], None, NOW) is None
    first = told.note([member(phase="loading", progress=0.123)], None, NOW)
    assert first == StartNote(1, NOW, "loading", 0.12)
    later = told.note([member(), member(name="r1", phase="compiling")], None, NOW + 10)
    assert later == StartNote(2, NOW)
    again = told.note([member(restarts=1, detail="it ended with code 1")], None, NOW + 20)
    assert again == StartNote(1, NOW + 20, detail="it ended with code 1")
    for at, took in enumerate((9.0, 30.0, 10.0)):
        ready = [member("ready", name=f"r{at}", started_in_s=took)]
        assert told.note(ready, None, NOW + 30) is None
    assert told.note([member()], None, NOW + 40) == StartNote(1, NOW + 40, lead_s=30.0, learned=True)
    assert told.note([member("draining")], None, NOW + 50) is None


async def test_a_pool_is_shut_while_nobody_is_there_and_opened_by_and_by() -> None:
    notices, clock = Notices(), Clock()
    doors = Doors(starts(notices, clock))
    pool = await a_pool(2)
    for each in pool.replicas:
        each.draining = True
    assert doors.width(pool, 0.0) is None  # and nobody to come: as ever
    post(notices, START, "pool/1", StartNote(1, NOW))
    assert (doors.width(pool, 1.0), doors.some_shut, doors.moving) == (0, True, False)
    notices.apply(START, f"{START}/pool/1", None)
    pool.replicas[0].draining = False
    assert (doors.width(pool, 10.0), doors.some_shut, doors.moving) == (FIRST, False, True)
    assert doors.width(pool, 10.0 + DOUBLES_IN_S) == 2 * FIRST
    pool.replicas[1].draining = False
    assert doors.width(pool, 10.0 + DOUBLES_IN_S) == 4 * FIRST
    assert doors.width(pool, 10.0 + OPENING_S) is None
    assert (doors.some_shut, doors.moving) == (False, False)
    assert doors.width(pool, 11.0) is None


async def test_one_refused_connection_at_a_replica_that_is_at_work_does_not_shut_its_pool() -> None:
    notices, clock = Notices(), Clock()
    doors, pool = Doors(starts(notices, clock)), await a_pool(1)
    (replica,) = pool.replicas
    post(notices, START, "pool/1", StartNote(1, NOW))
    replica.in_flight = 200
    replica.health.cooldown.failed(0.0)
    assert doors.width(pool, 0.1) is None  # as ever: routing tries it, and 200 streams go on there
    replica.in_flight = 0
    assert doors.width(pool, 0.2) == 0
    replica.in_flight = 1  # what is tried at one that is not there is no work
    assert doors.width(pool, 0.3) == 0
    assert doors.width(pool, 0.6) == FIRST


async def test_a_replica_that_was_not_seen_to_work_yet_is_as_good_as_none_and_a_pool_stays_shut_until_it_was() -> None:
    notices, clock = Notices(), Clock()
    doors, pool = Doors(starts(notices, clock)), await a_pool(1)
    (replica,) = pool.replicas
    replica.health.join(0.0, until_ready=True, warm_s=0.0)
    assert doors.width(pool, 0.0) is None  # nobody is known to come: routing tries it
    post(notices, START, "pool/1", StartNote(1, NOW))
    assert doors.width(pool, 1.0) == 0
    notices.apply(START, f"{START}/pool/1", None)
    assert doors.width(pool, 1.0 + BETWEEN_S - 0.1) == 0
    assert doors.width(pool, 1.0 + BETWEEN_S) is None


async def test_the_room_of_an_opened_pool_is_never_more_than_it_has_and_workers_share_those_that_may_wait() -> None:
    notices, clock = Notices(), Clock()
    pool = await a_pool(1, queue={"max_waiting": 100, "max_waiting_per_tenant": 9})
    (replica,) = pool.replicas
    rooms = Rooms(queues=True, shared=False)
    rooms.doors = Doors(starts(notices, clock))
    alone = Rooms(queues=False, shared=False, workers=4)
    alone.doors = Doors(starts(notices, clock))
    replica.draining = True
    post(notices, START, "pool/1", StartNote(1, NOW))
    for each in (rooms, alone):
        room = each.room(pool, 0.0)
        assert room is not None
        assert room.requests == 0
    room = alone.room(pool, 0.0)
    assert room is not None
    assert (room.max_waiting, room.max_waiting_per_tenant) == (25, 2)
    replica.draining = False
    replica.meter.configure(3, None)
    room = rooms.room(pool, 1.0)
    assert room is not None
    assert room.requests == 3
    room = alone.room(pool, 1.0)
    assert room is not None
    assert room.requests == FIRST
    assert alone.room(pool, 1.0 + OPENING_S) is None
