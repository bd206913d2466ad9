"""How streams end: cleanly only when every choice has finished, else with an error that the stock SDK raises."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from gateway.order import CHAT
from gateway.record import Outcome
from loadtests import rawclient
from loadtests.engine import FakeEngine
from tests.backends.scripted import Peer
from tests.gateway.test_relay import DONE, EDGES, END, HEAD, HI, PING, ROLE, STOP, UNASKED, event, framed, playing
from tests.support.client import connect, post
from tests.support.http import ask, error_of, streaming
from tests.support.serving import serving, settings_for

LOOPS = ("uvloop",)

CUTS = {
    "a clean end without a finish": ({"truncate_after": 3}, "upstream_truncated"),
    "an early [DONE]": ({"early_done": 3}, "upstream_truncated"),
    "[DONE] without a finish": ({"done_without_finish": True, "chunks": 3}, "upstream_truncated"),
    "a reset": ({"cut_after": 3}, "upstream_disconnected"),
    "silence": ({"hang_mid": 3}, "upstream_timeout"),
    "an error event": ({"error_event_after": 3}, "upstream_error"),
}


def error_event_of(tail: bytes) -> dict[str, Any]:
    """The one error event that these bytes must be."""
    assert tail.startswith(b"data: {")
    assert tail.endswith(b"\n\n")
    assert tail.count(b"\n") == 2
    error: dict[str, Any] = json.loads(tail[len(b"data: ") :])["error"]
    assert error.keys() == {"message", "type", "param", "code", "request_id"}
    return error


@EDGES
@pytest.mark.parametrize(("script", "code"), CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("paced", [False, True], ids=["at once", "paced"])
async def test_a_broken_stream_is_its_exact_prefix_and_one_error_event(
    edge: str, script: dict[str, Any], code: str, paced: bool
) -> None:
    backend = {"timeouts": {"idle_s": 0.2}}
    pace = {"interval_s": 0.02, "timestamps": False} if paced else {}
    async with (
        FakeEngine(**{**script, **pace}) as engine,
        serving(settings_for([engine.url], edge=edge, backend=backend)) as gateway,
    ):
        reply = await ask(gateway, UNASKED)
        whole = (await rawclient.ask(engine, UNASKED, headers=f"x-fake: {healed(script)}\r\n")).body
        (record,) = await gateway.settled()
    assert reply.status == 200
    assert reply.complete
    sent = reply.body[: reply.body.rindex(b"data: ")]
    assert whole.startswith(sent)
    assert sent.count(b'"content":') == 1 + 3  # the role event has an empty one
    error = error_event_of(reply.body[len(sent) :])
    assert error["code"] == code
    assert error["request_id"] == reply.headers["x-request-id"] == record.request_id
    assert b"[DONE]" not in reply.body
    assert record.outcome is (Outcome.TIMEOUT if code == "upstream_timeout" else Outcome.UPSTREAM_INTERRUPTED)
    assert (record.status, record.error_code) == (200, code)
    assert record.content_events == 3


def healed(script: dict[str, Any]) -> str:
    """What makes this script's stream a healthy one, as the fake engine's header."""
    return "; ".join(f"{key}={'0' if value is True else '99'}" for key, value in script.items() if key != "chunks")


async def collect(stream: openai.AsyncStream[ChatCompletionChunk], texts: list[str]) -> None:
    async for chunk in stream:
        texts += [choice.delta.content for choice in chunk.choices if choice.delta.content]


@EDGES
@pytest.mark.parametrize("script", [each for each, _ in CUTS.values()], ids=CUTS.keys())
async def test_the_stock_sdk_raises_on_a_broken_stream_after_what_came(edge: str, script: dict[str, Any]) -> None:
    backend = {"timeouts": {"idle_s": 0.2}}
    async with (
        FakeEngine(**script) as engine,
        serving(settings_for([engine.url], edge=edge, backend=backend)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x") as client,
    ):
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        texts: list[str] = []
        with pytest.raises(openai.APIError):
            await collect(stream, texts)
        await stream.close()
        assert len(engine.requests) == 1
    assert len(texts) == 3


# Before any content there is still a true status to give.


def error_events(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n" + DONE


@EDGES
@pytest.mark.parametrize("before", [b"", PING, ROLE, PING + ROLE], ids=["first", "ping", "role", "both"])
@pytest.mark.parametrize(
    ("payload", "status", "code"),
    [
        (b'{"error":{"object":"error","message":"The request queue is full.","code":503}}', 503, "upstream_overloaded"),
        (b'{"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}', 400, None),
        (b'{"error":{"message":"slow down","code":429}}', 429, "rate_limit_exceeded"),
        (b'{"error":"broken"}', 502, "upstream_error"),
    ],
    ids=["SGLang's full queue", "flat", "rate limit", "bare"],
)
async def test_an_error_event_before_content_is_answered_with_its_status(
    edge: str, before: bytes, payload: bytes, status: int, code: str | None
) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + (framed(before) if before else b"") + framed(error_events(payload)) + END)

    async with playing(script, edge) as gateway:
        reply = await ask(gateway, UNASKED)
        (record,) = await gateway.settled()
    assert (reply.status, error_of(reply.body)["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/json"
    assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert record.status == status
    assert record.outcome in (Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_REJECTED)


@EDGES
@pytest.mark.parametrize(
    ("script", "code"),
    [
        ({"empty_stream": True}, "upstream_truncated"),
        ({"chunks": 0, "done_without_finish": True}, "upstream_truncated"),
        ({"truncate_after": 0}, "upstream_truncated"),
        ({"early_done": 0}, "upstream_truncated"),
        ({"cut_after": 0}, "upstream_disconnected"),
        (
            {"raw": 'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: ping\n\ndata: {"cho'},
            "upstream_truncated",
        ),
        ({"raw": "not HTTP at all"}, "upstream_disconnected"),
        ({"raw": ""}, "upstream_disconnected"),
    ],
    ids=str,
)
async def test_a_stream_that_breaks_before_content_is_a_502(edge: str, script: dict[str, Any], code: str) -> None:
    async with FakeEngine(**script) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        reply = await ask(gateway, UNASKED)
        (record,) = await gateway.settled()
        assert len(engine.requests) == 1  # it may have been worked on: not sent again
    assert (reply.status, error_of(reply.body)["code"]) == (502, code)
    # "Interrupted" is kept for what the client saw begin.
    assert (record.status, record.outcome) == (502, Outcome.UPSTREAM_ERROR)


@EDGES
async def test_after_the_hold_has_run_out_errors_are_in_the_stream(edge: str) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(ROLE))
        await go.wait()
        await peer.send(framed(error_events(b'{"error":{"message":"full","code":503}}')) + END)

    async with playing(script, edge, stream={"hold_s": 0}) as gateway, streaming(gateway, UNASKED) as stream:
        await stream.until(PING)
        go.set()
        body = await stream.rest()
        (record,) = await gateway.settled()
    assert error_event_of(body.removeprefix(PING))["code"] == "upstream_overloaded"
    assert (record.status, record.outcome) == (200, Outcome.UPSTREAM_ERROR)


@EDGES
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"HTTP/1.1 400 Bad Request\r\ncontent-length: 28\r\n\r\n" + b'{"error":{"message":"nope"}}', None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "upstream_disconnected"),
        (b"", "upstream_disconnected"),
    ],
    ids=["a status", "no stream", "no answer"],
)
async def test_whatever_comes_after_the_hold_ends_in_the_stream(edge: str, answer: bytes, code: str | None) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await go.wait()
        await peer.send(answer)

    async with playing(script, edge, stream={"hold_s": 0}) as gateway, streaming(gateway, UNASKED) as stream:
        await stream.until(PING)
        go.set()
        body = await stream.rest()
    assert error_event_of(body.removeprefix(PING))["code"] == code


# Complete streams whose end is untidy.


@EDGES
@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(STOP, id="closed after the finish"),
        pytest.param(STOP + HI[:30], id="cut in the middle of a later event"),
        pytest.param(STOP + DONE, id="closed after [DONE]"),
        pytest.param(STOP + DONE + b"data: more\n\n", id="more after [DONE]"),
    ],
)
@pytest.mark.parametrize("how", ["chunked", "cut", "reset"])
async def test_a_finished_answer_ends_cleanly_however_the_engine_hangs_up(edge: str, ending: bytes, how: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI))
        await peer.send(framed(ending) + (END if how == "chunked" else b""))
        if how == "reset":
            await asyncio.sleep(0.05)  # a reset overtakes bytes that are still in the sender's queue
            peer.reset()

    async with playing(script, edge) as gateway:
        reply = await ask(gateway, UNASKED)
        (record,) = await gateway.settled()
    assert reply.complete
    assert reply.body == HI + STOP + DONE
    assert record.outcome is Outcome.COMPLETED


@EDGES
async def test_a_finished_answer_followed_by_silence_is_complete_too(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI + STOP))
        await peer.gone()

    async with playing(script, edge, backend={"timeouts": {"idle_s": 0.2}}) as gateway:
        reply = await ask(gateway, UNASKED)
        (record,) = await gateway.settled()
    assert (reply.body, reply.complete) == (HI + STOP + DONE, True)
    assert record.outcome is Outcome.COMPLETED


@EDGES
async def test_an_engine_that_keeps_the_body_open_after_done_is_not_waited_for(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI + STOP + DONE))
        await peer.gone()

    async with playing(script, edge) as gateway:
        started_at = time.monotonic()
        reply = await ask(gateway, UNASKED)
        assert time.monotonic() - started_at < 1.0
        (record,) = await gateway.settled()
    assert (reply.body, reply.complete) == (HI + STOP + DONE, True)
    assert record.outcome is Outcome.COMPLETED


@EDGES
async def test_an_engine_that_talks_on_after_done_is_not_listened_to(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI + STOP + DONE))
        while not peer.reader.at_eof():
            await peer.send(framed(PING))
            await asyncio.sleep(0.05)

    async with playing(script, edge) as gateway:
        started_at = time.monotonic()
        reply = await ask(gateway, UNASKED)
        assert time.monotonic() - started_at < 1.0
        (record,) = await gateway.settled()
    assert (reply.body, reply.complete) == (HI + STOP + DONE, True)
    assert record.outcome is Outcome.COMPLETED


@EDGES
async def test_a_client_that_leaves_at_done_has_a_complete_answer(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI + STOP + DONE))
        await peer.gone()

    async with playing(script, edge) as gateway:
        async with connect(gateway.host, gateway.port) as client:
            await client.send(post(CHAT, UNASKED))
            await client.until(b"[DONE]")
        (record,) = await gateway.settled()
    assert record.outcome is Outcome.COMPLETED


@EDGES
async def test_one_of_two_choices_is_not_the_whole_answer(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI + STOP + DONE) + END)

    async with playing(script, edge) as gateway:
        reply = await ask(gateway, {**UNASKED, "n": 2})
    assert reply.body.startswith(HI + STOP)
    assert error_event_of(reply.body.removeprefix(HI + STOP))["code"] == "upstream_truncated"


@EDGES
async def test_a_finish_without_any_text_is_a_complete_answer(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(ROLE + event({}, "content_filter") + DONE) + END)

    async with playing(script, edge) as gateway:
        reply = await ask(gateway, UNASKED)
    assert reply.body == ROLE + event({}, "content_filter") + DONE


@EDGES
async def test_an_error_event_after_the_finish_is_still_an_error(edge: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(HEAD + framed(HI + STOP + error_events(b'{"error":{"message":"late"}}')) + END)

    async with playing(script, edge) as gateway:
        reply = await ask(gateway, UNASKED)
    assert error_event_of(reply.body.removeprefix(HI + STOP))["message"] == "late"
