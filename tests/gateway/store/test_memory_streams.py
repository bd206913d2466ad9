"""What a memory store's streams may take, however little their readers read."""

from __future__ import annotations

import pytest

from gateway.store import START, StoreFull
from gateway.store.memory_streams import MESSAGE_BYTES, KeptBlobs, MessageLog


def read_all(log: MessageLog, *streams: str) -> dict[str, list[bytes]]:
    cursors = dict.fromkeys(streams, START)
    heard: dict[str, list[bytes]] = {stream: [] for stream in streams}
    while passages := log.read(cursors):
        for passage in passages:
            cursors[passage.stream] = passage.cursor
            heard[passage.stream] += passage.payloads
    return heard


def test_the_oldest_messages_go_when_there_are_too_many() -> None:
    log = MessageLog("g", max_messages=10)
    for number in range(1000):
        log.publish("ab"[number % 2], b"%d" % number)
    assert len(log) == 10
    heard = read_all(log, "a", "b")
    assert heard == {"a": [b"990", b"992", b"994", b"996", b"998"], "b": [b"991", b"993", b"995", b"997", b"999"]}


def test_the_oldest_messages_go_when_they_are_too_large() -> None:
    log = MessageLog("g", max_bytes=10 * (1000 + MESSAGE_BYTES))
    for _ in range(100):
        log.publish("a", b"x" * 1000)
    assert len(log) == 10
    log.publish("a", b"y" * 100_000)
    assert len(log) == 0
    log.publish("a", b"z")
    assert read_all(log, "a") == {"a": [b"z"]}


def test_a_reader_that_was_overtaken_goes_on_with_what_is_left() -> None:
    log = MessageLog("g", max_messages=10)
    log.publish("a", b"first")
    (passage,) = log.read({"a": START})
    for number in range(30):
        log.publish("a", b"%d" % number)
    (passage,) = log.read({"a": passage.cursor})
    assert passage.payloads == tuple(b"%d" % number for number in range(20, 30))
    assert log.read({"a": passage.cursor}) == ()


def test_a_quiet_stream_moves_on_with_a_busy_one() -> None:
    log = MessageLog("g")
    log.publish("busy", b"1")
    passages = log.read({"busy": START, "quiet": START})
    assert {passage.stream: passage.cursor for passage in passages} == {"busy": "g.1", "quiet": "g.1"}


def test_blobs_have_a_bound_together_and_an_end() -> None:
    kept = KeptBlobs(max_bytes=100)
    kept.keep("a", b"x" * 60, 10.0, 0.0)
    with pytest.raises(StoreFull):
        kept.keep("b", b"x" * 60, 10.0, 0.0)
    kept.keep("a", b"y" * 100, 20.0, 0.0)
    assert kept.get("a", 19.0) == b"y" * 100
    assert kept.get("a", 20.0) is None
    kept.keep("b", b"x" * 100, 30.0, 20.0)
    assert kept.get("b", 20.0) == b"x" * 100
