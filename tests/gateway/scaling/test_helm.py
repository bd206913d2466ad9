"""Who goes when there are to be fewer, and what becomes of those that are drained when something comes in between."""

from __future__ import annotations

import time
from typing import Any

import pytest

from backends.discovery.member import Member
from gateway.config.scaling import Scaling, WebhookScale
from gateway.scaling.agents import PoolReport
from gateway.scaling.helm import Heard, Helm
from gateway.scaling.notes import PoolDemand, ReplicaRow
from gateway.scaling.providers import Nobody, Order
from gateway.scaling.standing import Hold, KeptPool, Standing
from gateway.sources import Silent


class Fleet:
    """Carries out what is ordered, and is told what was decided."""

    def __init__(self, *names: str) -> None:
        self.in_flight = dict.fromkeys(names, 0)
        self.draining: set[str] = set()
        self.told: list[Standing] = []
        self.store_away = False

    async def drain(self, pool: str, replica: str) -> None:
        self.draining.add(replica)

    async def release(self, pool: str, identity: str) -> None:
        self.draining.discard(identity)

    async def tell(self, pool: str, standing: Standing) -> None:
        if self.store_away:
            raise Silent("the store does not answer")
        self.told.append(standing)

    def notes(self, age_s: float, *, workers: int = 1) -> dict[str, PoolDemand]:
        rows = [
            ReplicaRow(name, name, count, "draining" if name in self.draining else "", name in self.draining)
            for name, count in self.in_flight.items()
        ]
        return {f"w{number}": PoolDemand(f"life {number}", age_s, replicas=rows) for number in range(workers)}


class Taker(Nobody):
    """A provider that does what it is told."""

    acts = True
    chooses = True

    def __init__(self) -> None:
        self.orders: list[Order] = []

    async def apply(self, order: Order) -> None:
        self.orders.append(order)


class Rounds:
    """One gateway's, five seconds apart."""

    def __init__(self, fleet: Fleet, scaling: Scaling, *, expected: int = 1) -> None:
        self.fleet = fleet
        self.helm = Helm("pool", scaling, KeptPool(), fleet)
        self.expected = expected
        self.now = 0.0
        self.members: list[Member] = []
        self.reports: dict[str, PoolReport] = {}

    def hold(self, count: int) -> None:
        self.helm.hold = Hold(count, time.time() + 3600.0, "ann")

    async def __call__(self, before: Standing | None = None, *, workers: int = 1) -> Standing:
        self.now += 5.0
        heard = Heard(self.members, self.reports, self.expected)
        found = self.helm.look(self.fleet.notes(self.now, workers=workers), heard, self.now)
        assert found is not None
        return await self.helm.act(found, heard, before, self.now)


def webhook(**more: Any) -> Scaling:
    return Scaling(max=6, provider="webhook", webhook=WebhookScale(url="http://127.0.0.1:1/"), **more)


def held(count: int, *names: str, expected: int = 1, **more: Any) -> tuple[Rounds, Taker]:
    """Rounds of a pool that is to have so many."""
    rounds, taker = Rounds(Fleet(*names), webhook(**more), expected=expected), Taker()
    rounds.helm.provider = taker
    rounds.hold(count)
    return rounds, taker


async def test_one_that_is_drained_to_go_is_told_of_before_it_is_drained() -> None:
    """Should the gateway end in between, the next one knows of it; otherwise it would stay drained for ever."""
    rounds, _ = held(1, "a", "b")
    rounds.fleet.store_away = True
    with pytest.raises(Silent):
        await rounds()
    assert not rounds.fleet.draining
    rounds.fleet.store_away = False
    rounds.helm.away("the store does not answer")
    await rounds(Standing(wanted=2))
    assert rounds.fleet.draining == {"a"}
    assert [*rounds.fleet.told[0].leaving] == ["a"]


async def test_the_order_to_drain_is_given_again_where_it_was_lost_and_nothing_is_cut_for_that() -> None:
    rounds, taker = held(1, "a", "b", drain_s=600)
    rounds.fleet.in_flight["a"] = rounds.fleet.in_flight["b"] = 1
    await rounds()
    standing = await rounds()
    standing.leaving["a"].since_unix_s -= 601.0
    rounds.fleet.draining.clear()  # the store has forgotten, or somebody has undrained it
    standing = await rounds()
    assert rounds.fleet.draining == {"a"}
    assert not standing.leave
    rounds.fleet.in_flight["a"] = 0
    assert (await rounds()).leave == ["a"]
    assert taker.orders[-1].leave == ("a",)


async def test_one_is_not_empty_while_a_worker_that_may_have_sent_it_something_does_not_tell() -> None:
    rounds, _ = held(1, "a", "b", expected=2)
    await rounds(workers=2)
    assert not (await rounds(workers=1)).leave
    assert not (await rounds(workers=1)).leave
    assert (await rounds(workers=2)).leave == ["a"]


async def test_the_last_one_that_went_is_released_so_that_the_next_one_at_its_address_gets_work() -> None:
    rounds, _ = held(0, "a", min=0)
    await rounds()
    assert (await rounds()).leave == ["a"]
    rounds.fleet.in_flight.clear()
    rounds.members = [Member(url="http://127.0.0.1:9", name="a", state="starting")]
    rounds.hold(1)
    assert not (await rounds()).leaving
    assert not rounds.fleet.draining


async def test_those_that_were_to_go_stay_when_nobody_sees_to_it_any_more() -> None:
    rounds, _ = held(1, "a", "b")
    rounds.fleet.in_flight["a"] = rounds.fleet.in_flight["b"] = 1
    await rounds()
    assert rounds.fleet.draining == {"a"}
    await rounds.helm.configure(Scaling(max=6))
    standing = await rounds()
    assert (standing.leaving, rounds.fleet.draining) == ({}, set())


async def test_those_that_are_not_told_to_go_yet_get_work_again_when_they_are_wanted_again() -> None:
    rounds, _ = held(1, "a", "b")
    rounds.fleet.in_flight["a"] = rounds.fleet.in_flight["b"] = 1
    await rounds()
    rounds.hold(2)
    assert not (await rounds()).leaving
    assert not rounds.fleet.draining


async def test_one_that_an_operator_has_drained_is_no_capacity_and_one_more_is_ordered_up_to_the_most() -> None:
    rounds, taker = held(3, "a", "b", "c")
    rounds.fleet.draining.add("b")
    await rounds()
    assert [(order.count, order.leave) for order in taker.orders] == [(4, ())]
    rounds.hold(6)
    await rounds()
    assert taker.orders[-1].count == 6
    rounds.fleet.draining.clear()
    rounds.hold(3)
    standing = await rounds()
    assert (taker.orders[-1].count, [*standing.leaving]) == (3, [])
