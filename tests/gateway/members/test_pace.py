from __future__ import annotations

import time

import pytest

from backends.discovery.member import Member
from gateway.config import Settings
from gateway.members.drains import Drains
from gateway.members.pace import GATHER_S, LONGEST_GATHER_S, Pace
from gateway.members.registering import Registrations
from gateway.members.service import Members
from tests.support.serving import settings_for


def reloads(pace: Pace, took_s: float, count: int, now_s: float = 100.0) -> list[float]:
    """Something changes all the time: the pause before each reload."""
    pauses = []
    for _ in range(count):
        pauses.append(pause_s := pace.pause_s(now_s))
        now_s += pause_s + took_s
        pace.reloaded(now_s, took_s)
    return [round(each, 3) for each in pauses]


def test_cheap_reloads_are_never_held_back() -> None:
    pace = Pace()
    assert reloads(pace, 0.02, 20) == [GATHER_S] * 20
    pace.reloaded(1000.0, 0.02)
    assert not pace.storming(1000.0)


def test_one_or_two_wait_as_long_as_the_last_reload_took_at_most() -> None:
    assert reloads(Pace(), 0.2, 2) == [GATHER_S, 0.2]


def test_dear_reloads_one_upon_the_other_leave_four_fifths_of_the_time_for_the_rest() -> None:
    assert reloads(Pace(), 0.2, 6) == [GATHER_S, 0.2, 0.4, 0.6, 0.8, 0.8]


def test_no_change_waits_for_longer_than_one_that_registers_is_ready_to() -> None:
    assert reloads(Pace(), 0.5, 6)[-1] == 1.0
    assert reloads(Pace(), 1.5, 6)[-1] == 1.5
    assert reloads(Pace(), 9.0, 6)[-1] == LONGEST_GATHER_S


def test_after_a_quiet_moment_the_next_one_is_the_first_again() -> None:
    pace = Pace()
    reloads(pace, 0.2, 10, now_s=0.0)
    assert pace.pause_s(100.0) == GATHER_S
    pace.reloaded(100.3, 0.2)
    assert pace.pause_s(100.3) == pytest.approx(0.2)


def test_it_is_a_storm_from_the_third_reload_in_a_row_until_a_quiet_moment() -> None:
    pace, found = Pace(), []
    now_s = 0.0
    for _ in range(4):
        now_s += pace.pause_s(now_s) + 0.2
        pace.reloaded(now_s, 0.2)
        found.append(pace.storming(now_s))
    assert found == [False, False, True, True]
    assert pace.storming(now_s + 2.5)
    assert not pace.storming(now_s + 3.0)


class Waiting(Members):
    """Notes who has waited until it was in force."""

    waited = 0

    async def settled(self, within_s: float) -> None:
        self.waited += 1


async def test_a_new_replica_does_not_wait_in_a_storm_and_one_that_was_known_does() -> None:
    settings = settings_for([], backend={"discovery": {"registration": {}}})

    async def reload(*_: object) -> Settings:
        return settings

    members = Waiting(lambda: settings, None, reload, Drains((), lambda: settings), None)
    registrations = Registrations(members, (), lambda: settings)

    async def waits(name: str, port: int) -> bool:
        before = members.waited
        member = Member(url=f"http://127.0.0.1:{port}", name=name)
        await registrations.take("pool", registrations.checked("pool", name, member))
        return members.waited > before

    assert await waits("first", 1)
    reloads(members._pace, 0.2, 5, now_s=time.monotonic() - 5 * 0.8)
    assert members.storming
    assert not await waits("second", 2)
    assert await waits("first", 3), "a rolling restart goes on once it is in force"
    assert not await waits("second", 2), "a renewal"
