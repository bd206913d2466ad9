"""The fake engine's answers as bytes: OpenAI-shaped JSON, event streams, and when to send which piece.

Nothing here does I/O. An answer is an iterator of steps that the connection plays: ``bytes`` are written, a
``float`` waits until so many seconds after the request arrived, an ``End`` says what the connection does.
A step is computed only when the ones before it are done, so time stamps are true.
"""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from loadtests.behaviour import Behaviour
from loadtests.counting import piece_after

Json = dict[str, Any]
CREATED = 1_763_769_600
FILLER = "All work and no play makes the engine a dull machine. "
ANSWER = (FILLER * 3)[:152]
PIECE_BYTES = 65_536  # a huge body is written in pieces, so that back-pressure can stop it


class End(enum.Enum):
    KEEP = "keep"  # the answer is complete; the connection may carry another
    CLOSE = "close"
    RESET = "reset"
    HANG = "hang"  # say nothing more; the connection stays open


Step = bytes | float | End


@dataclass(frozen=True, slots=True)
class Call:
    """What the engine needs to know about a request in order to answer it."""

    kind: str  # "chat" | "text" | "embeddings"
    model: str
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    prompts: int = 1
    begun_bytes: int = 0
    """How much of the counted text the request begins with."""
    cut_short: bool = False
    """`max_tokens` ends it."""

    @property
    def choices(self) -> int:
        return self.n * self.prompts


def head(status: int, headers: list[tuple[str, str]]) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} {phrase}\r\n{lines}\r\n".encode("latin-1")


def dumps(value: object, *, spaces: bool = False) -> bytes:
    return json.dumps(value, separators=(", ", ": ") if spaces else (",", ":")).encode()


def json_response(status: int, value: object) -> bytes:
    """A complete small response, for the routes that no script changes."""
    body = dumps(value)
    return head(status, [("content-type", "application/json"), ("content-length", str(len(body)))]) + body


def error(message: str, status: int) -> Json:
    return {"error": {"message": message, "type": "fake_error", "param": None, "code": status}}


def usage(call: Call, b: Behaviour) -> Json:
    completion = 0 if call.kind == "embeddings" else b.chunks * call.choices
    prompt = b.prompt_tokens * call.prompts
    found: Json = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    found["prompt_tokens_details"] = {"cached_tokens": b.cached_tokens}
    if b.reasoning:
        found["completion_tokens_details"] = {"reasoning_tokens": b.reasoning}
    return found


def steps(call: Call, b: Behaviour) -> Iterator[Step]:
    """The whole answer to one request."""
    if b.hang:
        yield End.HANG
        return
    if b.delay_head_s:
        yield b.delay_head_s
    if b.interim:
        yield head(b.interim, [("link", "</fake>; rel=preload")] if b.interim == HTTPStatus.EARLY_HINTS else [])
    if b.raw is not None:
        yield b.raw.encode("latin-1")
        yield End.CLOSE
    elif b.status == HTTPStatus.OK and call.stream:
        yield from _stream(call, b)
    else:
        yield from _plain(call, b)


# -- plain answers


def body(call: Call, b: Behaviour) -> bytes:
    """The JSON of a plain answer."""
    if b.status != HTTPStatus.OK:
        if b.error_body is not None:
            return b.error_body.encode()
        return dumps(error(f"the fake engine was told to answer {b.status}", b.status), spaces=b.spaces)
    value: Json
    if call.kind == "embeddings":
        vectors = [{"object": "embedding", "index": i, "embedding": [0.25, -0.5, 1.0]} for i in range(call.prompts)]
        value = {"object": "list", "data": vectors, "model": call.model}
    else:
        value = {
            "id": "chatcmpl-5f8c2d7e9a1b4c3d" if call.kind == "chat" else "cmpl-5f8c2d7e9a1b4c3d",
            "object": "chat.completion" if call.kind == "chat" else "text_completion",
            "created": CREATED,
            "model": call.model,
            "choices": [_choice(call, b, index) for index in range(call.choices)],
        }
    if not b.no_usage:
        value["usage"] = usage(call, b)
    text = dumps(value, spaces=b.spaces)
    return text[: len(text) // 2] if b.bad_json else text


def _choice(call: Call, b: Behaviour, index: int) -> Json:
    text: str | None = _counted(call, b) if b.counting else ANSWER
    if b.huge_body_bytes:
        text = (FILLER * (b.huge_body_bytes // len(FILLER) + 1))[: b.huge_body_bytes]
    if call.kind == "text":
        return {"index": index, "text": text, "logprobs": None, "finish_reason": "stop", "matched_stop": 2}
    message: Json = {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": None}
    if b.reasoning:
        message["reasoning_content"] = "think " * b.reasoning
    if b.refusal:
        message |= {"content": None, "refusal": text}
    if b.tool_calls:
        message |= {"content": None, "tool_calls": [_tool_call(i, ARGUMENTS) for i in range(b.tool_calls)]}
    finish = "tool_calls" if b.tool_calls else "stop"
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish, "matched_stop": 2}


def _counted(call: Call, b: Behaviour) -> str:
    return "".join(piece_after(call.begun_bytes, number) for number in range(b.chunks))


ARGUMENTS = '{"city":"Paris"}'


def _tool_call(index: int, arguments: str) -> Json:
    function = {"name": f"tool_{index}", "arguments": arguments}
    return {"id": f"call_{index}", "index": index, "type": "function", "function": function}


def _plain(call: Call, b: Behaviour) -> Iterator[Step]:
    if b.ttft_s:
        yield b.delay_head_s + b.ttft_s
    data = body(call, b)
    headers = _headers("application/json", b)
    if not b.close_delimited:
        headers.append(("content-length", str(len(data))))
    if b.content_length_short:
        data = data[: -b.content_length_short]
    first = head(b.status, headers)
    yield first + data[:PIECE_BYTES]
    for start in range(PIECE_BYTES, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]
    yield _ending(b) if not b.content_length_short else End.CLOSE


def _headers(content_type: str, b: Behaviour) -> list[tuple[str, str]]:
    headers = [("date", "Sat, 22 Nov 2025 00:00:00 GMT"), ("server", "fake"), ("content-type", content_type)]
    if b.retry_after is not None:
        headers.append(("retry-after", b.retry_after))
    if b.connection_close:
        headers.append(("connection", "close"))
    return headers


def _ending(b: Behaviour) -> End:
    return End.CLOSE if b.connection_close or b.close_delimited else End.KEEP


# -- event streams


def _stream(call: Call, b: Behaviour) -> Iterator[Step]:
    headers = [*_headers("text/event-stream; charset=utf-8", b), ("cache-control", "no-cache")]
    if not b.close_delimited:
        headers.append(("transfer-encoding", "chunked"))
    yield head(b.status, headers)
    if not b.empty_stream:
        for step in _events(call, b):
            if isinstance(step, End):
                yield step
                return
            if isinstance(step, float) or b.close_delimited:
                yield step
            else:
                yield b"%x\r\n%b\r\n" % (len(step), step)
    if not b.close_delimited:
        yield b"0\r\n\r\n"
    yield _ending(b)


def _events(call: Call, b: Behaviour) -> Iterator[Step]:
    """The events of a stream without HTTP's framing; an ``End`` only where it breaks off."""
    write = _Writer(call, b)
    begin = b.delay_head_s + b.ttft_s
    if b.ttft_s:
        yield begin
    if b.error_first:
        yield write.event(dumps(error("the fake engine failed", 500)))
        yield write.event(b"[DONE]")
        return
    if call.kind == "chat":
        yield write.delta({"role": "assistant", "content": ""})
    if b.role_only_then_hang:
        yield End.HANG
        return
    for _ in range(b.reasoning):
        yield write.delta({"reasoning_content": "think "})
    if b.tool_calls:
        yield from _tool_events(write, b)
    else:
        for sent in range(b.chunks + 1):
            stop = _stop(sent, write, b)
            if stop is not None:
                yield from stop
                return
            if sent == b.early_done:
                yield write.event(b"[DONE]")
            if sent == b.chunks:
                break
            if b.interval_s and sent:
                yield begin + sent * b.interval_s
            yield write.content(sent)
    if not b.done_without_finish:
        yield write.delta({}, "tool_calls" if b.tool_calls else "length" if call.cut_short else "stop")
    if call.include_usage and not b.no_usage:
        yield write.usage(usage(call, b))
    if not b.finish_without_done:
        yield write.event(b"[DONE]")


def _stop(sent: int, write: _Writer, b: Behaviour) -> tuple[Step, ...] | None:
    """What to do instead of going on, once so many content events are sent."""
    if sent == b.cut_after:
        return (End.RESET,)
    if sent == b.hang_mid:
        return (End.HANG,)
    if sent == b.error_event_after:
        return write.event(dumps(error("the fake engine failed", 500))), write.event(b"[DONE]")
    if sent == b.truncate_after:
        return ()
    return None


def _tool_events(write: _Writer, b: Behaviour) -> Iterator[bytes]:
    half = len(ARGUMENTS) // 2
    for index in range(b.tool_calls):
        yield write.delta({"tool_calls": [_tool_call(index, "")]})
        for piece in (ARGUMENTS[:half], ARGUMENTS[half:]):
            yield write.delta({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})


TEXT_MARK = "@text@"
TIME_MARK = 1111111111111


class _Writer:
    """Writes one stream's events. Content events come from a template: JSON for each would cost 5 µs."""

    def __init__(self, call: Call, b: Behaviour) -> None:
        self._call = call
        self._b = b
        self._line_end = b"\r\n" if b.crlf else b"\n"
        self._stamped = b.timestamps and b.interval_s > 0
        self._templates = [self._template(index) for index in range(call.choices)]

    def event(self, data: bytes) -> bytes:
        end = self._line_end
        ping = b": ping" + end + end if self._b.pings else b""
        return b"".join((ping, b"data: ", data, end, end))

    def delta(self, delta: Json, finish: str | None = None) -> bytes:
        """One event for every choice, as engines do it."""
        chunks = (self._chunk([self._choice(index, delta, finish)]) for index in range(self._call.choices))
        return b"".join(self.event(dumps(chunk, spaces=self._b.spaces)) for chunk in chunks)

    def usage(self, tokens: Json) -> bytes:
        return self.event(dumps(self._chunk([], tokens), spaces=self._b.spaces))

    def content(self, number: int) -> bytes:
        """The next piece of text for every choice."""
        b = self._b
        if b.bad_json and number == b.chunks - 1:
            return self.event(b'{"id":"chatcmpl-5f8c2d7e9a1b4c3d","object":"chat.comp')
        big = (FILLER * (b.big_event_bytes // len(FILLER) + 1))[: b.big_event_bytes].encode() if number == 0 else b""
        text = piece_after(self._call.begun_bytes, number).encode() if b.counting else big
        stamp = b"%d" % time.monotonic_ns() if self._stamped else b""
        events = []
        for before, filler, between, after in self._templates:
            events.append(b"".join((before, text or filler, between, stamp, after)))
        return b"".join(events)

    def _template(self, index: int) -> tuple[bytes, bytes, bytes, bytes]:
        chunk = self._chunk([self._choice(index, {"refusal" if self._b.refusal else "content": TEXT_MARK}, None)])
        if self._stamped:
            chunk["t"] = TIME_MARK
        before, _, rest = self.event(dumps(chunk, spaces=self._b.spaces)).partition(TEXT_MARK.encode())
        between, _, after = rest.partition(b"%d" % TIME_MARK) if self._stamped else (rest, b"", b"")
        stamp_bytes = len(str(TIME_MARK)) + 2 if self._stamped else 0
        size = max(1, self._b.chunk_bytes - len(before) - len(rest) - stamp_bytes)
        return before, (FILLER * (size // len(FILLER) + 1))[:size].encode(), between, after

    def _choice(self, index: int, delta: Json, finish: str | None) -> Json:
        if self._call.kind == "text":
            return {
                "index": index,
                "text": delta.get("content", ""),
                "logprobs": None,
                "finish_reason": finish,
            }
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _chunk(self, choices: list[Json], tokens: Json | None = None) -> Json:
        chat = self._call.kind == "chat"
        chunk: Json = {
            "id": "chatcmpl-5f8c2d7e9a1b4c3d" if chat else "cmpl-5f8c2d7e9a1b4c3d",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": CREATED,
            "model": self._call.model,
            "choices": choices,
        }
        if tokens is not None or self._b.usage_null:
            chunk["usage"] = tokens
        return chunk
