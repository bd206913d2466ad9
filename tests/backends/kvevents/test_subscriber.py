from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import uvloop
import zmq

from backends.dialects.protocol import KvEventsEndpoint
from backends.kvevents import subscriber
from backends.kvevents.decode import BlockRemoved, BlockStored
from backends.kvevents.endpoint import EndpointRefused
from backends.kvevents.subscriber import KvSubscriber, Timing
from tests.backends.kvevents.publisher import CLEARED, Diary, Publisher, packed, removed, stored

Run: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]
FAST = Timing(replay_s=5, first_check_s=0.02, check_s=0.02, retry_s=0.01, max_retry_s=0.05)
NO_CHECKS = Timing(replay_s=5, first_check_s=100, check_s=100, retry_s=0.01, max_retry_s=0.05)


class Watched(Diary):
    """A diary that somebody can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._news = asyncio.Event()

    def stored(self, event: BlockStored) -> None:
        super().stored(event)
        self._news.set()

    def removed(self, event: BlockRemoved) -> None:
        super().removed(event)
        self._news.set()

    def cleared(self) -> None:
        super().cleared()
        self._news.set()

    def trust(self, trusted: bool, reason: str) -> None:
        super().trust(trusted, reason)
        self._news.set()

    async def when(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._news.clear()
                await self._news.wait()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine on one of the two loops, and sees that nothing stays open behind it."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as first:
        first.run(asyncio.sleep(0))  # the first uvloop of a process opens what it keeps for all
    gc.collect()
    before, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())

    def run(scenario: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scenario)

    yield run
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
    assert not set(threading.enumerate()) - threads


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "k")


@asynccontextmanager
async def listening(
    path: str, sink: Diary, *, replay: str | None = "r", timing: Timing = FAST
) -> AsyncIterator[KvSubscriber]:
    where = KvEventsEndpoint(f"ipc://{path}", None if replay is None else f"ipc://{path}{replay}")
    with zmq.Context() as context:
        subscriber = KvSubscriber(where, host=None, sink=sink, context=context, timing=timing)
        task = asyncio.create_task(subscriber.run())
        try:
            yield subscriber
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert not sink.trusted  # who stops listening knows nothing any more


def test_history_and_live_batches_come_in_order(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        with Publisher(path) as publisher:
            for n in range(5):
                publisher.publish(stored(n))
            async with listening(path, sink):
                await sink.when(lambda: sink.trusted)
                assert sink.told == [0, 1, 2, 3, 4]
                publisher.publish(stored(5), removed(1), CLEARED, stored(6))
                await sink.when(lambda: sink.blocks[-1:] == [6])
                assert sink.told[5:] == [5, "-1", "cleared", 6]
                assert sink.reasons == ["complete"]

    run(scenario())


@pytest.mark.parametrize("old_frames", [False, True])
def test_a_gap_is_replayed_from_the_last_batch_that_came(run: Run, path: str, old_frames: bool) -> None:
    async def scenario() -> None:
        sink = Watched()
        with Publisher(path, old_frames=old_frames) as publisher:
            publisher.publish(stored(0))
            async with listening(path, sink, timing=NO_CHECKS) as subscriber:
                await _subscribed(publisher, sink)
                before = publisher.sequence
                for n in range(100, 110):
                    publisher.publish(stored(n), lost=n < 109)
                await sink.when(lambda: sink.trusted and sink.told[-1] == 109)
                assert sink.told[-10:] == list(range(100, 110))
                assert sink.reasons[-2:] == ["gap", "complete"]
                assert publisher.asked[-1] == before - 1
                assert subscriber.report().counters.lost_batches == 0

    run(scenario())


def test_a_lost_last_batch_is_found_by_asking(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        with Publisher(path) as publisher:
            publisher.publish(stored(0))
            async with listening(path, sink):
                await sink.when(lambda: sink.trusted)
                publisher.publish(stored(1), lost=True)
                await sink.when(lambda: sink.told == [0, 1])
                assert sink.reasons == ["complete"]

    run(scenario())


def test_restarted_publisher_is_read_from_its_beginning(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        async with listening(path, sink) as subscriber:
            with Publisher(path) as publisher:
                for n in range(3):
                    publisher.publish(stored(n))
                await sink.when(lambda: sink.trusted and len(sink.told) == 3)
            await sink.when(lambda: not sink.trusted)
            assert sink.reasons[-1] == "disconnected"
            assert sink.told == [0, 1, 2]  # a lost connection empties no cache
            with Publisher(path) as publisher:
                for n in range(100, 105):  # its numbers pass those of the first
                    publisher.publish(stored(n))
                await sink.when(lambda: sink.trusted and sink.told[-1] == 104)
            assert sink.told == [0, 1, 2, "cleared", 100, 101, 102, 103, 104]
            assert subscriber.report().counters.restarts == 1

    run(scenario())


def test_lost_connection_to_a_living_publisher_is_made_up_for(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        open_now: list[asyncio.StreamWriter] = []
        relays: list[asyncio.Task[Any] | None] = []

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
            writer.close()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            relays.append(asyncio.current_task())
            far_reader, far_writer = await asyncio.open_unix_connection(path)
            open_now.extend((writer, far_writer))
            with suppress(ConnectionError):
                await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))
            for end in (writer, far_writer):
                end.transport.abort()
                with suppress(ConnectionError):
                    await end.wait_closed()

        with Publisher(path) as publisher:
            server = await asyncio.start_unix_server(relay, path + "relay")
            os.symlink(path + "r", path + "relayr")
            async with listening(path + "relay", sink, timing=NO_CHECKS) as subscriber:
                await _subscribed(publisher, sink)
                seen = len(sink.told)
                for round_ in range(1, 4):
                    for writer in open_now:
                        writer.transport.abort()
                    open_now.clear()
                    publisher.publish(stored(100 * round_))
                    await sink.when(lambda: not sink.trusted)
                    publisher.publish(stored(100 * round_ + 1))
                    await sink.when(lambda: sink.trusted)
                    # Nothing on the other side tells when the subscription has come through again.
                    await _subscribed(publisher, sink)
                told = [entry for entry in sink.told[seen:] if entry != -1]
                assert told == [100, 101, 200, 201, 300, 301]
                assert subscriber.report().counters.disconnects == 3
            server.close()
            await asyncio.gather(*filter(None, relays))

    run(scenario())


def test_without_replay_a_gap_stays_until_the_cache_is_cleared(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        with Publisher(path, replay=False) as publisher:
            async with listening(path, sink, replay=None):
                await _subscribed(publisher, sink)
                publisher.publish(stored(1), lost=True)
                publisher.publish(stored(2))
                await sink.when(lambda: sink.told[-1:] == [2])
                assert (sink.trusted, sink.reasons[-1]) == (False, "gap")
                publisher.publish(CLEARED)
                await sink.when(lambda: sink.trusted)

    run(scenario())


def test_no_wake_up_is_lost_under_load(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        with Publisher(path) as publisher:
            async with listening(path, sink, timing=NO_CHECKS) as subscriber:
                await _subscribed(publisher, sink)

                def burst(first: int, count: int) -> None:
                    for n in range(first, first + count):
                        publisher.publish(stored(n))

                # Single batches, where each must wake the sleeping loop by itself, then bursts, where few do.
                for n in range(100, 300):
                    publisher.publish(stored(n))
                    await sink.when(lambda n=n: sink.told[-1] == n)  # type: ignore[misc]
                for first in range(300, 6300, 2000):
                    await asyncio.to_thread(burst, first, 2000)
                    await sink.when(lambda last=first + 1999: sink.told[-1] == last)  # type: ignore[misc]
                assert sink.told[-6200:] == list(range(100, 6300))
                assert (sink.trusted, subscriber.report().counters.gaps) == (True, 0)

    run(scenario())


def test_slow_subscriber_catches_up_completely(run: Run, path: str) -> None:
    """More is to be replayed than the queues on the way take: the publisher's ROUTER drops parts, its end mark too."""

    async def scenario() -> None:
        sink = Watched()
        with Publisher(path, memory=20_000) as publisher:
            async with listening(path, sink, timing=NO_CHECKS):
                await _subscribed(publisher, sink)
                for n in range(100, 6_100):
                    publisher.publish(stored(n), lost=n % 2000 != 99)  # blocks this loop
                publisher.publish(stored(6_100))
                await sink.when(lambda: sink.trusted and sink.told[-1] == 6_100)
                assert sink.told[-6_001:] == list(range(100, 6_101))

    run(scenario())


def test_silent_replay_endpoint_leaves_a_late_join(run: Run, path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        sink = Watched()
        timing = Timing(replay_s=0.05, first_check_s=0.02, check_s=0.02, retry_s=0.01)
        with Publisher(path, replay=False) as publisher:
            publisher.publish(stored(0))
            async with listening(path, sink, timing=timing):
                while "late_join" not in sink.reasons:
                    publisher.publish(stored(publisher.sequence))
                    await asyncio.sleep(0.01)  # the publisher's pace
                assert sink.told == sink.blocks
                assert not sink.trusted

    run(scenario())
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["no answer to a replay request"]


def test_an_engine_that_is_not_there_is_logged_and_waited_for(
    run: Run, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        sink = Watched()
        logged = asyncio.Event()
        handler = logging.Handler()
        handler.emit = lambda record: logged.set()  # type: ignore[method-assign]
        logger = logging.getLogger("backends.kvevents.subscriber")
        logger.addHandler(handler)
        try:
            async with listening(path, sink, timing=Timing(replay_s=0.02)):
                async with asyncio.timeout(10):
                    await logged.wait()
                assert sink.reasons == []
                with Publisher(path) as publisher:
                    publisher.publish(stored(1))
                    await sink.when(lambda: sink.told == [1])
        finally:
            logger.removeHandler(handler)

    run(scenario())
    assert caplog.records[0].message.endswith("no connection so far")


class _Clumsy(Watched):
    """Raises at one block, the first times it is told of it."""

    trouble = 3

    def stored(self, event: BlockStored) -> None:
        if 2 in event.block_hashes and self.trouble:
            self.trouble -= 1
            raise ZeroDivisionError("clumsy")
        super().stored(event)


def test_a_failing_sink_is_logged_once_and_told_everything_again(
    run: Run, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        sink = _Clumsy()
        with Publisher(path) as publisher:
            publisher.publish(stored(1))
            publisher.publish(stored(2))
            async with listening(path, sink):
                await sink.when(lambda: sink.trusted and sink.told[-1] == 2)
                assert sink.told[-3:] == ["cleared", 1, 2]

    run(scenario())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_told_of_a_restart_it_connects_again(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        with Publisher(path) as publisher:
            publisher.publish(stored(1))
            async with listening(path, sink) as subscriber:
                await sink.when(lambda: sink.trusted)
                subscriber.engine_restarted()
                await sink.when(lambda: sink.trusted and len(sink.told) == 3)
                assert sink.told == [1, "cleared", 1]

    run(scenario())


def test_messages_of_another_kind_end_trust(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        with zmq.Context() as context, context.socket(zmq.XPUB) as pub:
            pub.linger = 0
            pub.bind(f"ipc://{path}")
            async with listening(path, sink, replay=None) as subscriber:
                assert await asyncio.to_thread(pub.recv) == b"\x01"
                pub.send_multipart([b"kv", (0).to_bytes(8, "big"), packed(stored(1))])
                for frames in ([b"kv"], [b"kv", b"1", b"x"], [b"kv", b"\xff" * 8, b"x"]):
                    pub.send_multipart(frames)
                pub.send_multipart([b"kv", (1).to_bytes(8, "big"), packed(stored(2))])
                await sink.when(lambda: sink.told == [1, 2])
                assert sink.reasons == ["complete", "undecodable"]
                assert subscriber.report().counters.undecodable == 3

    run(scenario())


def test_rank_is_a_port_on_the_replicas_own_host(run: Run, path: str) -> None:
    async def scenario() -> None:
        sink = Watched()
        with zmq.Context() as context, context.socket(zmq.XPUB) as pub:
            pub.linger = 0
            port = pub.bind_to_random_port("tcp://127.0.0.1")
            where = KvEventsEndpoint(f"tcp://*:{port - 2}", topic="kv")
            subscriber = KvSubscriber(where, host="127.0.0.1", sink=sink, context=context, rank=2)
            async with asyncio.TaskGroup() as group:
                task = group.create_task(subscriber.run())
                assert await asyncio.to_thread(pub.recv) == b"\x01kv"
                pub.send_multipart([b"other", (0).to_bytes(8, "big"), b""])
                pub.send_multipart([b"kv", (0).to_bytes(8, "big"), b"\x93\x01\x91\x91\xb0AllBlocksCleared\xc0"])
                await sink.when(lambda: sink.trusted)
                task.cancel()
        assert sink.told == ["cleared"]

    run(scenario())


def test_foreign_address_is_refused_before_anything_is_opened() -> None:
    with zmq.Context() as context, pytest.raises(EndpointRefused):
        KvSubscriber(KvEventsEndpoint("tcp://10.0.0.9:5557"), host="10.0.0.1", sink=Diary(), context=context)


async def _subscribed(publisher: Publisher, sink: Watched) -> None:
    """Until a live batch comes through: a publisher learns of a subscription at a moment of its own."""
    await sink.when(lambda: True)
    while not sink.told:
        publisher.publish(CLEARED)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await sink.when(lambda: bool(sink.told))
    seen = len(sink.told)
    while -1 not in sink.told[seen:]:
        publisher.publish(stored(-1))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await sink.when(lambda: -1 in sink.told[seen:])
    await sink.when(lambda: sink.trusted)


def test_large_messages_are_read_a_few_at_a_time() -> None:
    context: Any = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.bind("inproc://x")
    push.connect("inproc://x")
    for _ in range(3):
        push.send_multipart([b"", bytes(subscriber.BURST_BYTES * 2 // 3)])
    first, full = subscriber._Session._receive(pull, 64)
    assert (len(first), full) == (2, True)
    rest, full = subscriber._Session._receive(pull, 64)
    assert (len(rest), full) == (1, False)
    context.destroy(0)
