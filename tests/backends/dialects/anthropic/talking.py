"""Builds Anthropic's answers from the event models of its own SDK, and reads what they were translated to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from openai.lib.streaming._deltas import accumulate_delta
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from backends.dialects.anthropic import Anthropic, AnthropicTranslation
from backends.dialects.protocol import CHAT, Prepared, Wish

MODEL = "claude-sonnet-5-5"
EVENTS: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
USER = {"role": "user", "content": "Hi"}
NOW = 1_790_000_000.5


def dialect() -> Anthropic:
    return Anthropic(now=lambda: NOW)


def translation() -> AnthropicTranslation:
    return AnthropicTranslation(lambda: NOW)


def prepare(fields: Mapping[str, Any], *, stream: bool = False, model: str | None = None) -> Prepared:
    wish = Wish(CHAT, {"model": MODEL, **fields}, "r1", stream, model=model)
    return dialect().prepare(wish)


def body_of(fields: Mapping[str, Any], *, stream: bool = False, model: str | None = None) -> dict[str, Any]:
    prepared = prepare(fields, stream=stream, model=model)
    assert prepared.body is not None
    body: dict[str, Any] = json.loads(prepared.body)
    return body


def message(content: Sequence[Mapping[str, Any]], **members: Any) -> dict[str, Any]:
    """A whole answer, checked against the SDK's model."""
    made = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": list(content),
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_read_input_tokens": 100,
            "cache_creation_input_tokens": 1000,
            "output_tokens": 7,
        },
        **members,
    }
    Message.model_validate(made)
    return made


def sse(events: Iterable[Mapping[str, Any]]) -> bytes:
    """The events as Anthropic sends them; all but `ping` and `error` are checked against the SDK's models."""
    parts: list[bytes] = []
    for event in events:
        if event["type"] not in ("ping", "error"):
            EVENTS.validate_python(event)
        parts.append(f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
    return b"".join(parts)


def start(**members: Any) -> dict[str, Any]:
    usage = {
        "input_tokens": 10,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 1000,
        "output_tokens": 1,
    }
    return {"type": "message_start", "message": message([], stop_reason=None, usage=usage, **members)}


def block_start(index: int, block: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def block_delta(index: int, kind: str, member: str, value: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, member: value}}


def text_delta(index: int, text: str) -> dict[str, Any]:
    return block_delta(index, "text_delta", "text", text)


def block_stop(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


def end(reason: str = "end_turn", **members: Any) -> list[dict[str, Any]]:
    delta = {"stop_reason": reason, "stop_sequence": None, **members}
    return [{"type": "message_delta", "delta": delta, "usage": {"output_tokens": 7}}, {"type": "message_stop"}]


def streamed(answer: Mapping[str, Any], cut: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The events that bring a whole answer; texts and JSON come in pieces that end at these places."""
    events = [start()]
    for index, block in enumerate(answer["content"]):
        empty: dict[str, dict[str, Any]] = {
            "text": {"text": ""},
            "thinking": {"thinking": "", "signature": ""},
            "tool_use": {"input": {}},
        }
        events.append(block_start(index, {**block, **empty.get(block["type"], {})}))
        if block["type"] == "text":
            events += [text_delta(index, piece) for piece in pieces(block["text"], cut)]
        elif block["type"] == "thinking":
            thoughts = pieces(block["thinking"], cut)
            events += [block_delta(index, "thinking_delta", "thinking", piece) for piece in thoughts]
            events.append(block_delta(index, "signature_delta", "signature", block["signature"]))
        elif block["type"] == "tool_use":
            text = json.dumps(block["input"]) if block["input"] else ""
            events += [block_delta(index, "input_json_delta", "partial_json", piece) for piece in pieces(text, cut)]
        events += [block_stop(index), {"type": "ping"}]
    return events + end(answer["stop_reason"])


def pieces(text: str, cut: Sequence[int]) -> list[str]:
    places = [0, *sorted({min(each, len(text)) for each in cut}), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


def chunks_in(stream: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The chunks of a translated stream, each checked against the openai SDK's model, and whether `[DONE]` came."""
    events = stream.split(b"\n\n")
    assert events.pop() == b""
    assert all(event.startswith(b"data: ") for event in events)
    payloads = [event[6:] for event in events]
    done = bool(payloads) and payloads[-1] == b"[DONE]"
    chunks = [json.loads(payload) for payload in (payloads[:-1] if done else payloads)]
    for chunk in chunks:
        if "error" not in chunk:
            ChatCompletionChunk.model_validate(chunk)
            assert "\n" not in chunk
    return chunks, done


def put_together(stream: bytes) -> dict[str, Any]:
    """The message that the openai SDK accumulates from a translated stream, with the finish reason and the usage."""
    chunks, done = chunks_in(stream)
    assert done
    message: dict[object, object] = {}
    finishes: list[str] = []
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        message = accumulate_delta(message, choice["delta"])
        if choice["finish_reason"] is not None:
            finishes.append(choice["finish_reason"])
    (finish,) = finishes
    assert chunks[-1]["choices"] == []
    return {"message": message, "finish_reason": finish, "usage": chunks[-1]["usage"]}


def whole(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A whole answer translated, checked against the openai SDK's model."""
    completion: dict[str, Any] = json.loads(translation().whole(json.dumps(answer).encode()))
    ChatCompletion.model_validate(completion)
    return completion
