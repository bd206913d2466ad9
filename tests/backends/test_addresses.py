"""Names are asked for off the loop, remembered, and their last answer is kept while no new one comes."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from backends.addresses import AGAIN_S, DOUBT_S, FRESH_S, Address, Addresses, connect_first, resolved
from backends.errors import ConnectFailed, ConnectTimeout
from backends.origin import Origin
from backends.pool import ConnectionPool

ONE, TWO = ((socket.AF_INET, ("127.0.0.1", 7)),), ((socket.AF_INET, ("127.0.0.2", 7)),)


class Names:
    """A name server: says what it is told, or nothing for as long as `silent` is on."""

    def __init__(self, answer: Sequence[Address] | Exception = ONE) -> None:
        self.answer = answer
        self.asked = 0
        self.now = 1000.0
        self._speaks = threading.Event()
        self._speaks.set()
        self.addresses = Addresses("host.test", 7, look_up=self.look_up, clock=lambda: self.now)

    def look_up(self, host: str, port: int) -> Sequence[Address]:
        assert (host, port) == ("host.test", 7)
        self.asked += 1
        self._speaks.wait(20.0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @contextmanager
    def silent(self) -> Iterator[None]:
        self._speaks.clear()
        try:
            yield
        finally:
            self._speaks.set()


async def test_an_answer_is_remembered_for_its_time() -> None:
    names = Names()
    assert [await names.addresses.get() for _ in range(3)] == [ONE] * 3
    names.now += FRESH_S - 0.1
    names.answer = TWO
    assert await names.addresses.get() == ONE
    assert names.asked == 1
    names.now += 0.2
    assert await names.addresses.get() == TWO
    assert names.asked == 2


async def test_an_address_is_never_asked_for() -> None:
    def look_up(host: str, port: int) -> Sequence[Address]:
        raise AssertionError

    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        addresses = Addresses(host, 7, look_up=look_up)
        addresses.doubt()
        assert await addresses.get() == ((family, (host, 7)),)


async def test_the_last_good_answer_is_kept_when_the_name_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    names = Names()
    await names.addresses.get()
    names.answer = socket.gaierror(-2, "Name or service not known")
    for round_ in range(1, 4):
        names.now += FRESH_S
        assert [await names.addresses.get() for _ in range(3)] == [ONE] * 3
        assert names.asked == 1 + round_  # and not for each connection
    assert len(caplog.messages) == 1
    assert "does not resolve" in caplog.messages[0]
    names.now += AGAIN_S
    names.answer = TWO
    assert await names.addresses.get() == TWO
    assert caplog.messages[1:] == ["host.test resolves again"]


async def test_without_an_answer_there_is_an_error_and_another_question_each_time() -> None:
    names = Names(socket.gaierror(-2, "Name or service not known"))
    for count in (1, 2):
        with pytest.raises(socket.gaierror):
            await names.addresses.get()
        assert names.asked == count
    names.answer = ()
    with pytest.raises(OSError, match="no addresses"):
        await names.addresses.get()
    names.answer = ONE
    assert await names.addresses.get() == ONE


async def test_a_silent_name_server_is_waited_for_once_and_briefly() -> None:
    names = Names()
    loop = asyncio.get_running_loop()
    await names.addresses.get()
    names.now += FRESH_S
    names.answer = TWO
    with names.silent():
        assert await asyncio.gather(*(names.addresses.get() for _ in range(50))) == [ONE] * 50
        began = loop.time()
        assert await names.addresses.get() == ONE
        assert loop.time() - began < 0.25  # the patience is used up
        assert names.asked == 2
    async with asyncio.timeout(10):
        while await names.addresses.get() != TWO:  # noqa: ASYNC110 - the thread tells nobody else
            await asyncio.sleep(0.001)
    assert names.asked == 2


async def test_a_caller_who_gives_up_leaves_the_question_to_the_next() -> None:
    names = Names()
    with names.silent():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await names.addresses.get()
        waiting = asyncio.create_task(names.addresses.get())
        await asyncio.sleep(0)
    assert await waiting == ONE
    assert names.asked == 1


async def test_an_answer_that_led_nowhere_is_asked_for_again_soon_but_not_at_once() -> None:
    names = Names()
    await names.addresses.get()
    names.answer = TWO
    names.addresses.doubt()
    assert await names.addresses.get() == ONE
    names.now += DOUBT_S
    assert await names.addresses.get() == TWO
    assert names.asked == 2


async def test_silent_names_hold_up_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than any executor has threads for."""
    over = threading.Event()

    def look_up(host: str, port: int) -> Sequence[Address]:
        if host == "good.test":
            return resolved("127.0.0.1", port)
        over.wait(20.0)
        raise socket.gaierror(-2, host)

    monkeypatch.setattr("backends.addresses.resolved", look_up)
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as at_end:
        at_end.callback(over.set)
        port = server.getsockname()[1]
        pools = [ConnectionPool(Origin("http", f"slow-{n}.test", port), connect_timeout_s=5.0) for n in range(40)]
        slow = [asyncio.create_task(pool.acquire(1)) for pool in pools]
        await asyncio.sleep(0)
        good = ConnectionPool(Origin("http", "good.test", port))
        async with asyncio.timeout(2.0):
            (await good.acquire(1)).detach()
        over.set()
        assert {type(error) for error in await asyncio.gather(*slow, return_exceptions=True)} == {ConnectFailed}


async def test_a_name_server_that_is_silent_at_first_is_a_connect_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("backends.addresses.resolved", lambda host, port: over.wait(20.0))
    pool = ConnectionPool(Origin("http", "slow.test", 80), connect_timeout_s=0.1)
    try:
        with pytest.raises(ConnectTimeout):
            await pool.acquire(1)
    finally:
        over.set()


# -- several addresses


async def test_the_first_that_accepts_wins() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.2", 0)) as gone:
        refused = (socket.AF_INET, ("127.0.0.2", gone.getsockname()[1]))
        good = (socket.AF_INET, ("127.0.0.1", server.getsockname()[1]))
        gone.close()
        for addresses in ((refused, good), (good, refused), (good, good)):
            with await connect_first(addresses) as sock:
                assert sock.getpeername() == good[1]
        with pytest.raises(ConnectionRefusedError):
            await connect_first((refused, refused))


async def test_an_address_that_does_not_answer_is_overtaken() -> None:
    with socket.socket() as full, socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as fillers:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        silent = full.getsockname()
        for _ in range(4):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(silent)
        addresses = ((socket.AF_INET, silent), (socket.AF_INET, server.getsockname()))
        async with asyncio.timeout(10):
            with await connect_first(addresses, 0.05) as sock:
                assert sock.getpeername() == server.getsockname()


async def test_a_pool_connects_to_whichever_address_of_a_name_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        both = ((socket.AF_INET, ("127.0.0.9", port)), (socket.AF_INET, ("127.0.0.1", port)))
        monkeypatch.setattr("backends.addresses.resolved", lambda host, port: both)
        pool = ConnectionPool(Origin("http", "two.test", port))
        (await pool.acquire(1)).detach()
        await pool.aclose()


def test_the_system_answers_each_address_once_with_families_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    said = [
        (six, 1, 6, "", ("::1", 0, 0, 0)), (six, 1, 6, "", ("::2", 0, 0, 0)), (six, 1, 6, "", ("::3", 0, 0, 0)),
        (four, 1, 6, "", ("127.0.0.1", 0)), (four, 1, 6, "", ("127.0.0.1", 0)),
    ]  # fmt: skip
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: said)
    assert [where[0] for _, where in resolved("host.test", 7)] == ["::1", "127.0.0.1", "::2", "::3"]


async def test_a_thread_that_cannot_be_started_is_a_failed_question_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pids.max` of a container is reached now and then; the host has to resolve again afterwards."""
    names = Names()
    start = threading.Thread.start

    def no_thread(thread: threading.Thread) -> None:
        if thread.name.startswith("resolve "):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(OSError, match="no thread"):
        await names.addresses.get()
    pool = ConnectionPool(Origin.parse("http://host.test:7"))
    with pytest.raises(ConnectFailed):
        await pool.acquire(1.0)
    await pool.aclose()
    monkeypatch.undo()
    async with asyncio.timeout(10.0):
        assert await names.addresses.get() == ONE
    names.now += FRESH_S + 1.0
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert await names.addresses.get() == ONE  # the old answer


async def test_a_connection_that_nobody_waits_for_any_more_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's time ends while the addresses that were too slow are being given up."""
    made = socket.socket()

    async def connected(address: Address) -> socket.socket:
        if address == TWO[0]:
            return made
        try:
            never: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
            return await never
        except asyncio.CancelledError:
            caller.cancel()
            await asyncio.sleep(0)
            raise

    monkeypatch.setattr("backends.addresses._connected", connected)
    caller = asyncio.create_task(connect_first([*ONE, *TWO], stagger_s=0.01))
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert made.fileno() == -1
