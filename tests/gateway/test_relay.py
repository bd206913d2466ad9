"""Streams on their way through the gateway: the bytes, the hold, the heartbeats, the bounds, the delay."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.order import CHAT, COMPLETIONS
from gateway.record import Outcome
from loadtests import rawclient
from loadtests.engine import FakeEngine
from loadtests.rawclient import STREAM
from tests.backends.scripted import Peer, scripted
from tests.support.client import connect, post
from tests.support.http import ask, error_of, streaming
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
UNASKED = {**rawclient.CHAT, "stream": True}
PING = b": ping\n\n"

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def framed(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def without_usage(stream: bytes) -> bytes:
    """The fake engine's stream without the one event that has no choices."""
    end = b"\r\n\r\n" if b"\r\n" in stream else b"\n\n"
    return end.join([each for each in stream.split(end) if b'"choices":[]' not in each.replace(b" ", b"")])


ROLE = event({"role": "assistant", "content": ""})
HI = event({"content": "Hi"})
STOP = event({}, "stop")
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def playing(
    script: Callable[[Peer], Awaitable[None]], edge: str = "protocol", **sections: Any
) -> AsyncIterator[Serving]:
    """A gateway in front of a model server that answers every request, once it is read, by the script."""

    async def play(peer: Peer) -> None:
        await peer.request()
        await script(peer)

    async with scripted(play) as engine:
        url = f"http://127.0.0.1:{engine.origin.port}"
        async with serving(settings_for([url], edge=edge, **sections)) as gateway:
            yield gateway


# The bytes.


@EDGES
@pytest.mark.parametrize(
    "script",
    [
        {},
        {"crlf": True},
        {"spaces": True},
        {"pings": True},
        {"pings": True, "crlf": True, "split": 1, "chunks": 3},
        {"split": 7},
        {"split": 1000},
        {"close_delimited": True},
        {"connection_close": True},
        {"reasoning": 3},
        {"tool_calls": 2},
        {"refusal": True},
        {"usage_null": True},
        {"no_usage": True},
        {"chunks": 0},
        {"chunks": 2000},
        {"big_event_bytes": 900_000},
        {"bad_json": True},
        {"interim": 103},
    ],
    ids=str,
)
async def test_a_stream_goes_out_as_the_bytes_that_came_in(edge: str, script: dict[str, Any]) -> None:
    async with FakeEngine(**script) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        shown = await ask(gateway, STREAM)
        hidden = await ask(gateway, UNASKED)
        assert shown.complete
        assert hidden.complete
        assert shown.headers["content-type"] == "text/event-stream; charset=utf-8"
        # The raw client would take an interim response for the answer.
        direct = await rawclient.ask(engine, STREAM, headers="x-fake: interim=0\r\n")
        assert shown.body == direct.body
        assert hidden.body == without_usage(direct.body)
        first, second = await gateway.settled(2)
    assert first.outcome is second.outcome is Outcome.COMPLETED
    assert first.status == 200
    assert (first.usage is None) is bool(script.get("no_usage"))
    assert first.usage == second.usage
    assert first.response_bytes == len(shown.body)


@EDGES
@pytest.mark.parametrize(("n", "prompt"), [(1, "a"), (2, "a"), (1, ["a", "b"]), (2, ["a", "b", "c"]), (2, [1, 2, 3])])
async def test_completions_of_several_prompts_and_choices(edge: str, n: int, prompt: Any) -> None:
    body = {"model": "m", "prompt": prompt, "n": n, "stream": True, "stream_options": {"include_usage": True}}
    async with FakeEngine(chunks=3) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        reply = await ask(gateway, body, COMPLETIONS)
        assert reply.body == (await rawclient.ask(engine, body, COMPLETIONS)).body
        (record,) = await gateway.settled()
    assert record.outcome is Outcome.COMPLETED
    assert reply.body.endswith(DONE)


@EDGES
async def test_usage_is_always_asked_for_and_other_stream_options_are_kept(edge: str) -> None:
    options = [None, {}, {"include_usage": False, "x": [1, "ä"]}, {"include_usage": True, "x": 1}]
    async with FakeEngine() as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        for each in options:
            await ask(gateway, {**UNASKED, "stream_options": each})
        await ask(gateway, UNASKED)
        await ask(gateway, rawclient.CHAT)
        sent = [request.json().get("stream_options") for request in engine.requests]
    assert sent == [
        {"include_usage": True},
        {"include_usage": True},
        {"include_usage": True, "x": [1, "ä"]},
        {"include_usage": True, "x": 1},
        {"include_usage": True},
        None,
    ]


@EDGES
async def test_the_usage_event_is_shown_to_who_asked_only(edge: str) -> None:
    async with FakeEngine(chunks=3) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        shown = [each for each in (await ask(gateway, STREAM)).events if each != "[DONE]" and not each["choices"]]
        hidden = [each for each in (await ask(gateway, UNASKED)).events if each != "[DONE]" and not each["choices"]]
        records = await gateway.settled(2)
    assert [each["usage"]["completion_tokens"] for each in shown] == [3]
    assert hidden == []
    assert [each.usage and each.usage.completion_tokens for each in records] == [3, 3]


# The delay.


@EDGES
async def test_each_event_arrives_when_it_is_sent(edge: str) -> None:
    """A relay that collects events fails this: they would come late, and several in one chunk."""
    delays, in_one_chunk = [], []
    async with (
        FakeEngine(chunks=30, interval_s=0.05) as engine,
        serving(settings_for([engine.url], edge=edge)) as gateway,
        streaming(gateway, UNASKED) as stream,
    ):
        while data := await stream.chunk():
            now = time.monotonic_ns()
            stamps = [json.loads(line[6:]).get("t") for line in data.split(b"\n") if line.startswith(b"data: {")]
            delays += [(now - stamp) / 1e9 for stamp in stamps if stamp is not None]
            in_one_chunk.append(sum(stamp is not None for stamp in stamps))
    assert len(delays) == 30
    assert statistics.median(delays) < 0.02
    assert in_one_chunk.count(1) >= 28


# The hold.


@EDGES
@pytest.mark.parametrize(
    "first", [b"", framed(PING), framed(ROLE), framed(PING + ROLE)], ids=["head", "ping", "role", "both"]
)
async def test_nothing_is_shown_before_the_first_content(edge: str, first: bytes) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(HEAD + first)
        await go.wait()
        await peer.send(framed(HI) + framed(STOP + DONE) + END)

    async with playing(script, edge) as gateway, connect(gateway.host, gateway.port) as client:
        await client.send(post(CHAT, UNASKED))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.reader.read(1)
        go.set()
        reply = await client.reply()
    held = first.partition(b"\r\n")[2][:-2]
    assert (reply.status, reply.body) == (200, held + HI + STOP + DONE)


@EDGES
async def test_when_the_hold_runs_out_the_status_goes_out_with_a_heartbeat_and_the_content_later(edge: str) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(ROLE))
        await go.wait()
        await peer.send(framed(HI) + framed(STOP + DONE) + END)

    sent_at = time.monotonic()
    async with (
        playing(script, edge, stream={"hold_s": 0.2}) as gateway,
        streaming(gateway, UNASKED) as stream,
    ):
        assert stream.status == 200
        assert 0.15 < stream.started_at - sent_at < 0.8
        assert await stream.chunk() == PING
        go.set()
        assert await stream.rest() == PING + ROLE + HI + STOP + DONE


@EDGES
async def test_the_hold_covers_the_wait_for_the_head_too(edge: str) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await go.wait()
        await peer.send(HEAD + framed(HI + STOP + DONE) + END)

    async with (
        playing(script, edge, stream={"hold_s": 0.1, "heartbeat_s": 0.1}) as gateway,
        streaming(gateway, UNASKED) as stream,
    ):
        await stream.until(PING * 2)
        go.set()
        body = await stream.rest()
    assert body.replace(PING, b"") == HI + STOP + DONE


@EDGES
async def test_heartbeats_fill_the_silence_between_events(edge: str) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI))
        await go.wait()
        await peer.send(framed(HI + STOP + DONE) + END)

    async with (
        playing(script, edge, stream={"heartbeat_s": 0.3}) as gateway,
        streaming(gateway, UNASKED) as stream,
    ):
        await stream.until(HI)
        quiet_since = time.monotonic()
        assert await stream.chunk() == PING
        assert 0.25 < time.monotonic() - quiet_since < 0.8
        assert await stream.chunk() == PING
        assert 0.5 < time.monotonic() - quiet_since < 1.4
        go.set()
        assert await stream.rest() == HI + PING + PING + HI + STOP + DONE


async def test_there_are_no_heartbeats_while_events_flow() -> None:
    async with (
        FakeEngine(chunks=15, interval_s=0.05) as engine,
        serving(settings_for([engine.url], stream={"heartbeat_s": 0.3})) as gateway,
    ):
        assert PING not in (await ask(gateway, UNASKED)).body


async def test_a_heartbeat_never_splits_an_event() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI + HI[:20]))
        await go.wait()
        await peer.send(framed(HI[20:] + STOP + DONE) + END)

    async with playing(script, stream={"heartbeat_s": 0.1}) as gateway, streaming(gateway, UNASKED) as stream:
        await stream.until(PING)
        assert stream.body == HI + PING
        go.set()
        assert (await stream.rest()).replace(PING, b"") == HI + HI + STOP + DONE


@EDGES
async def test_a_long_prompt_may_be_silent_up_to_the_first_token_timeout_even_after_the_head(edge: str) -> None:
    """An engine that sends its head (or the role) at once and then reads the prompt is not idle yet."""
    timeouts = {"idle_s": 0.3, "first_token_s": 5}
    async with (
        FakeEngine(ttft_s=0.8, chunks=2) as engine,
        serving(settings_for([engine.url], edge=edge, backend={"timeouts": timeouts})) as gateway,
    ):
        reply = await ask(gateway, UNASKED)
    assert (reply.status, reply.complete) == (200, True)


@EDGES
async def test_a_client_that_reads_slowly_does_not_make_the_engine_idle(edge: str) -> None:
    """Back-pressure silences the engine; that is the gateway's own doing and no reason to give it up."""
    async with (
        FakeEngine(chunks=6_000, chunk_bytes=4_000) as engine,
        serving(settings_for([engine.url], edge=edge, backend={"timeouts": {"idle_s": 0.2}})) as gateway,
        connect(gateway.host, gateway.port, receive_buffer_bytes=4096) as client,
    ):
        await client.send(post(CHAT, UNASKED))
        request = await engine.received()
        await asyncio.sleep(0.7)  # the silence that is tested
        assert request.completed_at is None
        reply = await client.reply()
        (record,) = await gateway.settled()
    assert reply.complete
    assert reply.body.endswith(DONE)
    assert record.content_events == 6_000


@EDGES
async def test_without_content_in_time_the_request_fails_with_504(edge: str) -> None:
    timeouts = {"first_token_s": 0.3}
    async with (
        FakeEngine(role_only_then_hang=True) as engine,
        serving(settings_for([engine.url], edge=edge, backend={"timeouts": timeouts})) as gateway,
    ):
        reply = await ask(gateway, UNASKED)
        (record,) = await gateway.settled()
    assert (reply.status, error_of(reply.body)["code"]) == (504, "first_token_timeout")
    assert record.outcome is Outcome.TIMEOUT


# Other answers to a stream's request.


@EDGES
async def test_a_plain_answer_to_a_request_for_a_stream_passes_as_it_is(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 7\r\n\r\n{"a":1}')

    async with playing(script, edge) as gateway:
        reply = await ask(gateway, UNASKED)
    assert (reply.status, reply.body, reply.headers["content-type"]) == (200, b'{"a":1}', "application/json")


# Bounds.


@EDGES
async def test_an_event_beyond_the_limit_ends_the_stream_with_an_error(edge: str) -> None:
    big = event({"content": "x" * 5000})

    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI))
        await go.wait()
        await peer.send(framed(HI + big) + framed(STOP + DONE) + END)

    async with (
        playing(script, edge, stream={"max_event_bytes": 4096}) as gateway,
        streaming(gateway, UNASKED) as stream,
    ):
        await stream.until(HI)
        go.set()
        body = await stream.rest()
        (record,) = await gateway.settled()
    assert body.startswith(HI)
    assert b"xxx" not in body
    assert body.count(b'"error"') == 1
    assert DONE not in body
    assert record.outcome is Outcome.UPSTREAM_INTERRUPTED


@EDGES
async def test_a_first_event_beyond_the_limit_is_a_502(edge: str) -> None:
    async with (
        FakeEngine(big_event_bytes=100_000, interval_s=0.5) as engine,
        serving(settings_for([engine.url], edge=edge, stream={"max_event_bytes": 4096})) as gateway,
    ):
        reply = await ask(gateway, UNASKED)
        assert (reply.status, error_of(reply.body)["code"]) == (502, "upstream_failed")
        await asyncio.wait_for(engine.requests[0].gone.wait(), 1)


@EDGES
async def test_an_engine_that_never_comes_to_the_content_is_not_remembered_without_bound(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD)
        while not peer.reader.at_eof():
            await peer.send(framed(b": " + b"x" * 4000 + b"\n\n"))

    async with playing(script, edge, backend={"max_response_bytes": 100_000}) as gateway:
        reply = await ask(gateway, UNASKED)
    assert (reply.status, error_of(reply.body)["code"]) == (502, "upstream_failed")


@EDGES
async def test_a_stream_is_known_however_its_content_type_is_spelt(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD.replace(b"text/event-stream", b"Text/Event-Stream; charset=UTF-8") + framed(HI) + END)

    async with playing(script, edge) as gateway:
        reply = await ask(gateway, UNASKED)
    assert reply.body.startswith(HI)
    assert reply.events[-1]["error"]["code"] == "upstream_truncated"


@EDGES
async def test_an_answer_beyond_the_limit_is_a_502_and_is_not_read_to_its_end(edge: str) -> None:
    async with (
        FakeEngine(huge_body_bytes=30_000_000) as engine,
        serving(settings_for([engine.url], edge=edge, backend={"max_response_bytes": 100_000})) as gateway,
    ):
        reply = await ask(gateway, rawclient.CHAT)
        assert (reply.status, error_of(reply.body)["code"]) == (502, "upstream_failed")
        await asyncio.wait_for(engine.requests[0].gone.wait(), 1)


@EDGES
async def test_an_answer_at_the_limit_passes_whole(edge: str) -> None:
    async with FakeEngine(huge_body_bytes=3_000_000) as engine:
        expected = (await rawclient.ask(engine, rawclient.CHAT)).body
        backend = {"max_response_bytes": len(expected)}
        async with serving(settings_for([engine.url], edge=edge, backend=backend)) as gateway:
            assert (await ask(gateway, rawclient.CHAT)).body == expected
