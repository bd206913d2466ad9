"""Any sequence of operations, on every implementation, beside a model that is too simple to be wrong."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from gateway.store import START, Store
from tests.gateway.store.halves import HALVES, TOMBSTONES, Half, LastingRedis
from tests.support.redis_server import RedisServer

KEYS = st.sampled_from([f"key {number}" for number in range(7)])
LEASES = st.sampled_from(["job 1", "job 2"])
HOLDERS = st.sampled_from(["a", "b", "c"])
VALUES = st.binary(max_size=3)
TTLS = st.sampled_from([0.5, 1.0, 2.5, 8.0])  # sums are exact
READERS = st.integers(0, 2)


class Reader:
    """What one worker believes, and how many facts have ended since it last looked."""

    def __init__(self) -> None:
        self.cursor = START
        self.view: dict[str, bytes] = {}
        self.missed_ends = 0
        self.other_life = True


class StoreBesideModel(RuleBasedStateMachine):
    make_half: Callable[[Path], Half]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.half = type(self).make_half(Path(self.folder.name))
        self.do(self.half.start())
        self.store: Store = self.half.open()
        self.now = 0.0
        self.leases: dict[str, tuple[str, float]] = {}
        self.facts: dict[str, tuple[bytes, float]] = {}
        self.readers = [Reader() for _ in range(3)]

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.do(self.half.stop())
        self.runner.close()
        self.folder.cleanup()

    @rule(lease=LEASES, holder=HOLDERS, ttl_s=TTLS)
    def claim(self, lease: str, holder: str, ttl_s: float) -> None:
        free = lease not in self.leases or self.leases[lease][0] == holder
        assert self.do(self.store.claim(lease, holder, ttl_s)) == free
        if free:
            self.leases[lease] = (holder, self.now + ttl_s)

    @rule(lease=LEASES, holder=HOLDERS)
    def release(self, lease: str, holder: str) -> None:
        self.do(self.store.release(lease, holder))
        if lease in self.leases and self.leases[lease][0] == holder:
            del self.leases[lease]

    @rule(key=KEYS, value=VALUES, ttl_s=TTLS | st.none())
    def post(self, key: str, value: bytes, ttl_s: float | None) -> None:
        self.do(self.store.post(key, value, ttl_s))
        self.facts[key] = (value, float("inf") if ttl_s is None else self.now + ttl_s)

    @rule(key=KEYS)
    def withdraw(self, key: str) -> None:
        self.do(self.store.withdraw(key))
        if self.facts.pop(key, None) is not None:
            self.count_ends(1)

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def pass_time(self, seconds: float) -> None:
        self.do(self.half.pass_time(seconds))
        self.now += seconds
        self.leases = {lease: held for lease, held in self.leases.items() if held[1] > self.now}
        before = len(self.facts)
        self.facts = {key: fact for key, fact in self.facts.items() if fact[1] > self.now}
        self.count_ends(before - len(self.facts))

    def count_ends(self, count: int) -> None:
        for reader in self.readers:
            reader.missed_ends += count

    @rule(number=READERS)
    def read(self, number: int) -> None:
        reader = self.readers[number]
        facts = self.do(self.store.read_since(reader.cursor))
        assert facts.reset or not reader.other_life
        assert not facts.reset or reader.other_life or reader.missed_ends > TOMBSTONES
        assert len({fact.key for fact in facts.changes}) == len(facts.changes)
        if facts.reset:
            reader.view.clear()
            assert all(fact.value is not None for fact in facts.changes)
        for fact in facts.changes:
            if fact.value is None:
                reader.view.pop(fact.key, None)
            else:
                reader.view[fact.key] = fact.value
        assert reader.view == {key: value for key, (value, _) in self.facts.items()}
        reader.cursor, reader.missed_ends, reader.other_life = facts.cursor, 0, False

    @rule(number=READERS)
    def start_a_reader_anew(self, number: int) -> None:
        self.readers[number] = Reader()

    @rule()
    def restart(self) -> None:
        self.do(self.half.restart())
        self.store = self.half.open()
        self.leases.clear()
        self.facts.clear()
        for reader in self.readers:
            reader.other_life = True


@pytest.mark.parametrize(("name", "examples"), [("memory", 200), ("remote", 40), ("redis", 40)])
def test_any_sequence_of_operations_agrees_with_the_model(
    name: str, examples: int, request: pytest.FixtureRequest
) -> None:
    make = HALVES[name]
    if name == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")

        def make(folder: Path) -> Half:
            return LastingRedis(server)

    machine = type("Machine", (StoreBesideModel,), {"make_half": staticmethod(make)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
