"""Anthropic's event stream as OpenAI's, event by event.

The answer is never gathered: each event becomes at most two chunks at once, in the compact form whose ordinary deltas
the gateway's reader recognises without parsing. Only signed thinking is kept until its block ends, because it must go
back to Anthropic as one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from backends.dialects.anthropic.reply import (
    FINISH_REASONS,
    Block,
    Counts,
    Message,
    error_of,
    malformed,
    refusal_of,
    string,
    thinking_block,
    whole_answer,
)
from backends.dialects.protocol import TranslationError
from backends.sse import EventSplitter, EventTooLarge
from backends.usage import Usage

_DONE = b"data: [DONE]\n\n"


class Delta(msgspec.Struct):
    """What `content_block_delta` and `message_delta` bring."""

    type: str = ""
    text: Any = ""
    partial_json: Any = ""
    thinking: Any = ""
    signature: Any = ""
    stop_reason: Any = None
    stop_details: Any = None


class Event(msgspec.Struct):
    """One event. `type` says which members it has."""

    type: str
    index: Any = None
    message: Message | None = None
    content_block: Block | None = None
    delta: Delta | None = None
    usage: Counts | None = None
    error: Any = None


class _Tool:
    """A tool call under way."""

    __slots__ = ("empty", "given", "position")

    def __init__(self, position: int, given: bytes) -> None:
        self.position = position
        self.given = given
        self.empty = True


class AnthropicTranslation:
    """Translates one answer, whole or streamed."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._splitter = EventSplitter()
        self._decode = msgspec.json.Decoder(Event).decode
        self._counts = Counts()
        self._counted = False
        self._head = b""
        """Everything of a chunk before its choices; empty before `message_start`."""
        self._finished = False
        self._done = False
        self._tools: dict[int, _Tool] = {}
        self._tool_count = 0
        self._thinking: dict[int, Block] = {}
        self._thinking_count = 0

    @property
    def usage(self) -> Usage | None:
        """What Anthropic has reported so far, for an answer that breaks off before its usage chunk; None: nothing."""
        return self._counts.usage() if self._counted else None

    def whole(self, body: bytes) -> bytes:
        """See `Translation.whole`."""
        return whole_answer(body, int(self._now()))

    def assembled(self) -> bytes | None:
        """Always None: who wants no stream gets Anthropic's whole answer."""
        return None

    def feed(self, data: bytes) -> bytes:
        """See `Translation.feed`.

        An error that stands behind other events in the same read is not raised, which would lose them, but returned
        after them as an event that carries OpenAI's error object.
        """
        chunks: list[bytes] = []
        try:
            for _, payload in self._splitter.feed(data):
                if self._done:
                    break
                chunks.append(self._event(payload))
        except (TranslationError, EventTooLarge) as error:
            self._done = True
            made = error if isinstance(error, TranslationError) else _too_large()
            sent = b"".join(chunks)
            if not sent:
                raise made from error
            return sent + b"data: " + msgspec.json.encode({"error": made.error}) + b"\n\n"
        return b"".join(chunks)

    def _event(self, payload: bytes) -> bytes:
        try:
            event = self._decode(payload)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            return _unreadable(payload, error)
        kind = event.type
        if kind == "content_block_delta":
            return self._delta(event)
        if kind == "content_block_start":
            return self._block_start(event)
        if kind == "content_block_stop":
            return self._block_stop(event)
        if kind == "message_start":
            return self._start(event.message)
        if kind == "message_delta":
            return self._message_delta(event)
        if kind == "message_stop":
            return self._stop()
        if kind == "error":
            raise TranslationError(error_of(event.error))
        return b""

    def _start(self, message: Message | None) -> bytes:
        if message is None or self._head:
            malformed("message_start is empty, or not the first event")
        head = {
            "id": string(message.id, "id"),
            "object": "chat.completion.chunk",
            "created": int(self._now()),
            "model": string(message.model, "model"),
        }
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._count(message.usage)
        return self._chunk(b'{"role":"assistant","content":""}')

    def _block_start(self, event: Event) -> bytes:
        block, index = event.content_block, self._index(event)
        if block is None:
            malformed("content_block_start has no block")
        if block.type == "text":
            return self._text("content", block.text)
        if block.type == "thinking":
            self._thinking[index] = block
            return self._text("reasoning_content", block.thinking)
        if block.type == "redacted_thinking":
            return self._thinking_block(block)
        if block.type == "tool_use":
            tool = self._tools[index] = _Tool(self._tool_count, bytes(block.input))
            self._tool_count += 1
            function = {"name": string(block.name, "a tool's name"), "arguments": ""}
            call = {"id": string(block.id, "a tool call's id"), "type": "function", "function": function}
            return self._call(tool, msgspec.json.encode(call)[1:])
        return b""

    def _delta(self, event: Event) -> bytes:
        delta, index = event.delta, self._index(event)
        if delta is None:
            malformed("content_block_delta has no delta")
        if delta.type == "text_delta":
            return self._text("content", delta.text)
        if delta.type == "input_json_delta":
            tool = self._tools.get(index)
            part = string(delta.partial_json, "partial_json")
            if tool is None or not part:
                return b""
            tool.empty = False
            return self._call(tool, b'"function":{"arguments":' + msgspec.json.encode(part) + b"}}")
        block = self._thinking.get(index)
        if delta.type == "thinking_delta":
            text = string(delta.thinking, "thinking")
            if block is not None:
                block.thinking += text
            return self._text("reasoning_content", text)
        if delta.type == "signature_delta" and block is not None:
            block.signature = string(delta.signature, "a signature")
        return b""

    def _block_stop(self, event: Event) -> bytes:
        index = self._index(event)
        block = self._thinking.pop(index, None)
        if block is not None:
            return self._thinking_block(block)
        tool = self._tools.pop(index, None)
        if tool is not None and tool.empty:
            # A call without arguments brings no JSON at all, and clients parse the empty string in vain.
            return self._call(tool, b'"function":{"arguments":' + msgspec.json.encode(tool.given.decode()) + b"}}")
        return b""

    def _message_delta(self, event: Event) -> bytes:
        self._count(event.usage)
        delta = event.delta
        if delta is None or delta.stop_reason is None or self._finished:
            return b""
        reason = string(delta.stop_reason, "stop_reason")
        self._finished = True
        refusal = refusal_of(delta.stop_details) if reason == "refusal" else None
        said = b"" if refusal is None else self._text("refusal", refusal)
        finish = FINISH_REASONS.get(reason, "stop").encode()
        return said + self._chunk(b"{}", b'"' + finish + b'"')

    def _stop(self) -> bytes:
        self._done = True
        if not self._head:
            malformed("message_stop came before message_start")
        usage = self._counts.as_openai() if self._counted else None
        if usage is None:
            return _DONE
        return self._head + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n" + _DONE

    def _index(self, event: Event) -> int:
        if type(event.index) is not int:
            malformed(f"{event.type} has no index")
        return event.index

    def _count(self, counts: Counts | None) -> None:
        if counts is not None:
            self._counted = True
            self._counts.update(counts)

    def _text(self, member: str, text: Any) -> bytes:
        """A chunk with more of the content, the reasoning or the refusal; nothing for an empty piece."""
        if string(text, member) == "":
            return b""
        return self._chunk(b'{"' + member.encode() + b'":' + msgspec.json.encode(text) + b"}")

    def _call(self, tool: _Tool, rest: bytes) -> bytes:
        return self._chunk(b'{"tool_calls":[{"index":%d,%b]}' % (tool.position, rest))

    def _thinking_block(self, block: Block) -> bytes:
        kept = thinking_block(block, self._tool_count)
        if kept is None:
            return b""
        # The openai SDK puts the entries of a list together by their index, and fails on those without one.
        entry = msgspec.json.encode({"index": self._thinking_count, **kept})
        self._thinking_count += 1
        return self._chunk(b'{"thinking_blocks":[' + entry + b"]}")

    def _chunk(self, delta: bytes, finish: bytes = b"null") -> bytes:
        if not self._head:
            malformed("content came before message_start")
        return self._head + b'{"index":0,"delta":' + delta + b',"finish_reason":' + finish + b"}]}\n\n"


def _unreadable(payload: bytes, error: Exception) -> bytes:
    """Nothing, for an event of a type that this module does not know and so need not be able to read."""
    try:
        kind = msgspec.json.decode(payload, type=_Kind).type
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        kind = None
    if isinstance(kind, str) and kind not in _READ:
        return b""
    try:
        malformed(str(error))
    except TranslationError as translation_error:
        raise translation_error from error


class _Kind(msgspec.Struct):
    type: Any = None


_READ = frozenset(
    {
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    }
)


def _too_large() -> TranslationError:
    message = "Anthropic sent an event that is too large."
    return TranslationError({"message": message, "type": "api_error", "param": None, "code": 502})
