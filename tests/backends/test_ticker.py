from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

import pytest

from backends.ticker import Ticker

EVERY_LOOP = True


class Member:
    def __init__(self, action: Callable[[], None] = lambda: None) -> None:
        self.times: list[float] = []
        self.ticked = asyncio.Event()
        self._action = action

    def tick(self, now: float) -> None:
        self.times.append(now)
        self.ticked.set()
        self._action()

    async def next(self) -> None:
        self.ticked.clear()
        async with asyncio.timeout(5):
            await self.ticked.wait()


async def test_members_are_called_with_the_loop_time_once_per_interval() -> None:
    ticker, member = Ticker(interval_s=0.02), Member()
    ticker.add(member)
    ticker.add(member)
    for _ in range(3):
        await member.next()
    loop = asyncio.get_running_loop()
    assert member.times[-1] <= loop.time()
    # uvloop counts in whole milliseconds
    assert all(later - earlier >= 0.018 for earlier, later in zip(member.times, member.times[1:], strict=False))
    ticker.close()


async def test_timer_runs_only_while_there_are_members() -> None:
    ticker, member = Ticker(interval_s=0.01), Member()
    assert repr(ticker) == "<Ticker members=0 running=False>"
    ticker.add(member)
    assert repr(ticker) == "<Ticker members=1 running=True>"
    await member.next()
    ticker.discard(member)
    ticker.discard(member)
    calls = len(member.times)
    await asyncio.sleep(0.05)
    assert len(member.times) == calls
    assert repr(ticker) == "<Ticker members=0 running=False>"
    ticker.add(member)
    await member.next()
    ticker.close()
    assert len(ticker) == 0


async def test_member_that_raises_is_logged_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("broken tick")

    ticker, broken, healthy = Ticker(interval_s=0.01), Member(fail), Member()
    with caplog.at_level(logging.ERROR):
        ticker.add(broken)
        ticker.add(healthy)
        await healthy.next()
        await healthy.next()
    assert "broken tick" in caplog.text
    assert len(broken.times) >= 2
    ticker.close()


async def test_member_discarded_during_a_round_is_not_called_in_it() -> None:
    ticker = Ticker(interval_s=0.01)
    victim = Member()
    killer = Member(lambda: ticker.discard(victim))
    ticker.add(killer)
    ticker.add(victim)
    await killer.next()
    assert victim.times == []
    ticker.close()


async def test_member_added_during_a_round_does_not_start_a_second_timer() -> None:
    ticker = Ticker(interval_s=0.02)
    late = Member()

    def swap() -> None:
        ticker.discard(early)
        ticker.add(late)

    early = Member(swap)
    ticker.add(early)
    await late.next()
    await late.next()
    await late.next()
    assert all(b - a >= 0.018 for a, b in zip(late.times, late.times[1:], strict=False))
    ticker.close()
    calls = len(late.times)
    await asyncio.sleep(0.05)
    assert len(late.times) == calls


async def test_after_the_loop_was_held_up_sockets_come_first() -> None:
    """What arrived during the hold-up is read before anybody is timed out for not having sent it."""
    loop = asyncio.get_running_loop()
    order: list[str] = []
    ticker, member = Ticker(interval_s=0.02), Member(lambda: order.append("tick"))

    def read() -> None:
        order.append("read")
        loop.remove_reader(left)

    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        loop.add_reader(left, read)
        ticker.add(member)
        right.send(b"x")
        time.sleep(0.1)  # noqa: ASYNC251  holding the loop up is the point
        await member.next()
    assert order[:2] == ["read", "tick"]
    ticker.close()
