"""Experiment 36: text of others inside a stream of events, where a line end would begin an event of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.dialects.anthropic import Anthropic
from backends.dialects.protocol import CHAT, Wish
from backends.sse import EventSplitter
from gateway.errors import GatewayError, error_event
from loadtests.engine import FakeEngine
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.support.client import connect, post
from tests.support.serving import serving, settings_for
from tests.support.talking import STREAM, both_edges

ENDS = ("\n", "\r", "\r\n", "\n\n", "\r\r", "\u2028", "\u0085", "\0")
FIELDS = (
    "data: x",
    "event: error",
    "id: 1",
    "retry: 1",
    ": comment",
    "data: [DONE]",
    'data: {"error":{"message":"x"}}',
)
BREAKING = [f"a{end}{field}{end}{end}b" for end in ENDS for field in FIELDS]


BEGUN = (
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
)
"""A model server's stream, before its error."""


def events_of(stream: bytes) -> Sequence[tuple[bytes, bytes]]:
    """Name and data of each event, read by the rules that clients read by: any of three line ends."""
    return EventSplitter().feed(stream)


def fields_besides_data(stream: bytes) -> list[bytes]:
    """Lines that are neither data nor a comment nor empty."""
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return [line for line in lines if line and not line.startswith((b"data:", b":"))]


@settings(max_examples=200, deadline=None)
@given(st.text() | st.sampled_from(BREAKING), st.text() | st.sampled_from(BREAKING))
def test_36_an_error_event_of_ours_is_one_event_whatever_it_says(message: str, id: str) -> None:
    try:
        message.encode()
        id.encode()
    except UnicodeEncodeError:
        return  # no text that has come as JSON has half a surrogate pair
    written = error_event(GatewayError(message, param=message, code=id), id)
    ((name, data),) = events_of(written)
    assert name == b""
    assert not fields_besides_data(written)
    assert json.loads(data)["error"]["message"] == message


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BREAKING) | st.text(st.characters(exclude_categories=["Cs"])))
def test_36_a_translated_stream_has_the_same_events_whatever_is_in_it(text: str) -> None:
    assert chunks_for(text) == chunks_for("plain") or not text


def chunks_for(text: str) -> int:
    """How many events a stream of Anthropic's becomes that has this text as its id, model, text, tool and arguments."""
    said: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"id": text, "model": text, "usage": {"input_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        {
            "type": "content_block_start",
            "index": 1,
            "content_block": {"type": "tool_use", "id": text, "name": text, "input": {}},
        },
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": text}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]
    fields = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    translation = Anthropic(now=lambda: 1.0).prepare(Wish(CHAT, fields, "id", True)).translation
    assert translation is not None
    sent = b"".join([b"data: " + json.dumps(each, ensure_ascii=False).encode() + b"\n\n" for each in said])
    written = translation.feed(sent)
    assert not fields_besides_data(written)
    return len(events_of(written))


@both_edges
async def test_36_text_of_others_adds_no_event_and_no_header(edge: str, report: Report) -> None:
    """An engine's error, in a status before the stream and in an event inside it, and a client's model name.

    Names of replicas, pools and models, which go into headers, hold printable ASCII only: the configuration says so.
    """
    extra: list[str] = []
    count = 0
    async with FakeEngine() as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        for text in BREAKING:
            said = json.dumps({"error": {"message": text, "type": text, "param": text, "code": text}})
            for script, model in (
                ({"status": 400, "error_body": said}, "m"),
                ({"status": 503, "error_body": said}, "m"),
                ({"raw": f"{BEGUN}data: {said}\n\n"}, "m"),
                ({}, text),
            ):
                async with connect(gateway.host, gateway.port) as client:
                    await client.send(post(CHAT, {**STREAM, "model": model, "fake": script}))
                    reply = await client.reply()
                count += 1
                values = "".join([*reply.headers, *reply.headers.values()])
                clean = values.isascii() and values.isprintable()
                if reply.headers["content-type"].startswith("text/event-stream"):
                    told = events_of(reply.body)
                    errors = [data for _, data in told if b'"error"' in data]
                    clean = clean and not fields_besides_data(reply.body) and len(errors) == 1 and len(told) == 2
                else:
                    clean = clean and set(reply.json) == {"error"}
                if not clean:
                    extra.append(text)
    report(
        "36",
        Finding(
            f"injection into streams, edge {edge}",
            f"{len(BREAKING)} texts with line ends and `data:`, `event:`, `id:` as model, error text, type and code: "
            f"{count} answers",
            "one error for one error, no event or field of the stream more, header values printable ASCII",
            f"{count - len(extra)} of {count} clean",
            not extra,
            {"not_clean": extra},
        ),
    )
