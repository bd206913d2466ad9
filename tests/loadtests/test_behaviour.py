"""Each scripted behaviour of the fake engine does what it says, seen from a raw socket."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT, STREAM, Reply, ask, open_to, read_head, read_reply, request_bytes


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(chunks=3) as engine:
        yield engine


# -- timing


async def timed(engine: FakeEngine, body: Any) -> tuple[float, float, float]:
    """Seconds until the head, until the first body byte and until the end."""
    reader, writer = await open_to(engine)
    start = time.monotonic()
    writer.write(request_bytes(body))
    await read_head(reader)
    head = time.monotonic() - start
    first = await reader.readuntil(b"\r\n")
    begin = time.monotonic() - start
    assert first
    await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    return head, begin, time.monotonic() - start


async def test_head_first_event_and_events_are_delayed(engine: FakeEngine) -> None:
    fake = {"delay_head_s": 0.05, "ttft_s": 0.05, "interval_s": 0.05, "chunks": 2}
    head, begin, end = await timed(engine, {**STREAM, "fake": fake})
    assert head >= 0.049
    assert begin >= 0.099
    assert end >= 0.149


async def test_delays_add_up_for_a_plain_answer(engine: FakeEngine) -> None:
    start = time.monotonic()
    await ask(engine, {**CHAT, "fake": {"delay_head_s": 0.03, "ttft_s": 0.03}})
    assert time.monotonic() - start >= 0.059


async def test_paced_events_carry_the_time(engine: FakeEngine) -> None:
    before = time.monotonic_ns()
    events = (await ask(engine, {**STREAM, "fake": {"interval_s": 0.01}})).events
    stamps = [event["t"] for event in events if "t" in event]
    assert len(stamps) == 3
    assert before <= stamps[0] < stamps[1] < stamps[2] <= time.monotonic_ns()
    quiet = (await ask(engine, {**STREAM, "fake": {"interval_s": 0.01, "timestamps": False}})).events
    assert not [event for event in quiet if "t" in event]


@pytest.mark.parametrize(
    ("fake", "writes"),
    [({"hang": True}, 0), ({"hang_mid": 2}, 4), ({"role_only_then_hang": True}, 2)],
    ids=["hang", "hang_mid", "role_only"],
)
async def test_hanging(engine: FakeEngine, fake: dict[str, object], writes: int) -> None:
    _, writer = await open_to(engine)
    writer.write(request_bytes({**STREAM, "fake": fake}))
    request = await engine.received(1)
    assert request.writes == writes  # the head counts as one
    assert not request.done.is_set()
    writer.close()
    await request.gone.wait()


async def test_slow_reading_pauses_between_reads(engine: FakeEngine) -> None:
    start = time.monotonic()
    body = {**CHAT, "padding": "x" * 2_000_000}
    reply = await ask(engine, body, headers="x-fake: slow_body_read_s=0.02\r\n")
    assert reply.status == 200
    assert time.monotonic() - start >= 0.1  # a read takes at most 256 KB


# -- errors


async def test_status_error_body_and_retry_after(engine: FakeEngine) -> None:
    reply = await ask(engine, {**STREAM, "fake": {"status": 429, "retry_after": "7"}})
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")
    assert reply.json["error"]["code"] == 429
    assert (await ask(engine, {**CHAT, "fake": {"status": 500, "error_body": "oops"}})).body == b"oops"


async def test_bad_json(engine: FakeEngine) -> None:
    plain = await ask(engine, {**CHAT, "fake": {"bad_json": True}})
    assert plain.complete
    with pytest.raises(json.JSONDecodeError):
        json.loads(plain.body)
    stream = await ask(engine, {**STREAM, "fake": {"bad_json": True}})
    assert stream.complete
    with pytest.raises(json.JSONDecodeError):
        assert stream.events


async def test_error_events(engine: FakeEngine) -> None:
    first = (await ask(engine, {**STREAM, "fake": {"error_first": True}})).events
    assert list(first[0]) == ["error"]
    assert first[1:] == ["[DONE]"]
    later = (await ask(engine, {**STREAM, "fake": {"error_event_after": 2}})).events
    assert ["error" in event for event in later] == [False, False, False, True, False]
    assert later[-1] == "[DONE]"


# -- streams that end in the wrong way

WrongEnd = Callable[[Reply], bool]
WRONG_ENDS: list[tuple[dict[str, object], WrongEnd]] = [
    ({"cut_after": 2}, lambda r: not r.complete and len(r.texts) == 2),
    ({"cut_after": 0}, lambda r: not r.complete and len(r.events) == 1),
    ({"truncate_after": 2}, lambda r: r.complete and len(r.events) == 3),
    ({"done_without_finish": True}, lambda r: r.events[-1] == "[DONE]" and b'"stop"' not in r.body),
    ({"finish_without_done": True}, lambda r: b"[DONE]" not in r.body and b'"stop"' in r.body and r.complete),
    ({"early_done": 1}, lambda r: r.events[2] == "[DONE]" and len(r.texts) == 3 and r.events[-1] == "[DONE]"),
    ({"empty_stream": True}, lambda r: r.complete and r.body == b""),
    ({"no_usage": True}, lambda r: b"usage" not in r.body and r.complete),
    ({"usage_null": True}, lambda r: r.body.count(b'"usage":null') == 5 and r.body.count(b'"usage":{') == 1),
    ({"pings": True}, lambda r: r.body.count(b": ping\n\n") == 7 and len(r.events) == 7),
    ({"crlf": True}, lambda r: r.body.count(b"\r\n\r\n") == 7 and b"\n\n" not in r.body),
    ({"spaces": True}, lambda r: b'"object": "chat' in r.body and b'":' not in r.body.replace(b'": ', b"")),
    ({"big_event_bytes": 300_000}, lambda r: len(r.texts[0]) == 300_000),
    ({"close_delimited": True}, lambda r: "transfer-encoding" not in r.headers and r.events[-1] == "[DONE]"),
]


@pytest.mark.parametrize(("fake", "holds"), WRONG_ENDS, ids=[next(iter(fake)) for fake, _ in WRONG_ENDS])
async def test_stream(engine: FakeEngine, fake: dict[str, object], holds: WrongEnd) -> None:
    assert holds(await ask(engine, {**STREAM, "fake": fake}))


async def test_a_cut_is_a_reset(engine: FakeEngine) -> None:
    reader, writer = await open_to(engine)
    writer.write(request_bytes({**STREAM, "fake": {"cut_after": 1}}))
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    request = await engine.received(1)
    await request.gone.wait()


# -- HTTP


async def test_split_writes_arrive_in_pieces(engine: FakeEngine) -> None:
    whole = await ask(engine, STREAM)
    split = await ask(engine, {**STREAM, "fake": {"split": 7}})
    assert split.body == whole.body
    assert engine.requests[1].writes > len(whole.body) / 7


async def test_interim_response_comes_first(engine: FakeEngine) -> None:
    reader, writer = await open_to(engine)
    writer.write(request_bytes({**CHAT, "fake": {"interim": 103}}))
    assert (await read_head(reader))[0] == 103
    assert (await read_reply(reader)).status == 200
    writer.close()


async def test_short_body_is_short(engine: FakeEngine) -> None:
    reply = await ask(engine, {**CHAT, "fake": {"content_length_short": 10}})
    assert not reply.complete
    assert len(reply.body) == int(reply.headers["content-length"]) - 10


async def test_plain_close_delimited_and_connection_close(engine: FakeEngine) -> None:
    reply = await ask(engine, {**CHAT, "fake": {"close_delimited": True}})
    assert "content-length" not in reply.headers
    assert reply.json["choices"]
    reader, writer = await open_to(engine)
    writer.write(request_bytes({**CHAT, "fake": {"connection_close": True}}))
    assert (await read_reply(reader)).headers["connection"] == "close"
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("keepalive_s", [0, 0.02])
async def test_idle_connections_are_closed_without_a_word(engine: FakeEngine, keepalive_s: float) -> None:
    reader, writer = await open_to(engine)
    writer.write(request_bytes({**CHAT, "fake": {"keepalive_s": keepalive_s}}))
    reply = await read_reply(reader)
    assert reply.complete
    assert "connection" not in reply.headers
    assert await reader.read() == b""
    writer.close()


async def test_a_client_that_closes_is_closed(engine: FakeEngine) -> None:
    reader, writer = await open_to(engine)
    writer.write(request_bytes(CHAT, headers="connection: close\r\n"))
    assert (await read_reply(reader)).complete
    assert await reader.read() == b""
    writer.close()


async def test_huge_bodies_wait_for_the_reader(engine: FakeEngine) -> None:
    size = 30_000_000
    reader, writer = await open_to(engine)
    writer.write(request_bytes({**CHAT, "fake": {"huge_body_bytes": size}}))
    request = await engine.received(1)
    assert not request.done.is_set()  # 30 MB do not fit into socket buffers
    reply = await read_reply(reader)
    assert len(reply.json["choices"][0]["message"]["content"]) == size
    await request.done.wait()
    writer.close()


async def test_raw_bytes_are_sent_as_they_are(engine: FakeEngine) -> None:
    reader, writer = await open_to(engine)
    writer.write(request_bytes({**CHAT, "fake": {"raw": "HTTP/9.9 nonsense\r\n"}}))
    assert await reader.read() == b"HTTP/9.9 nonsense\r\n"
    writer.close()
