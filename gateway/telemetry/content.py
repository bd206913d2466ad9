"""The texts of a request and its answer, for keys that ask for them to be kept (`capture_content`), and for no other.

They go onto the request's span in the form of the conventions for generative AI: a list of messages with parts, as
JSON. Each side is bounded in bytes; what is longer is cut, and said to be. Pictures and sounds are named, not kept.
Nothing of this is looked at for other keys: the reply of a request that is kept is wrapped, others' are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from backends.sse import BOUNDARY, fields
from gateway.reply import Headers, Reply
from gateway.telemetry.context import TraceContext

MAX_CHOICES = 16
"""Answers to one request that are kept."""
MAX_PARSED_BYTES = 4 << 20
"""A whole answer larger than this is not read for its text."""


class Room:
    """How many bytes of text may still be kept."""

    __slots__ = ("left", "truncated")

    def __init__(self, limit_bytes: int) -> None:
        self.left = limit_bytes
        self.truncated = False

    def cut(self, text: str) -> str:
        """As much of the text as there is room for."""
        data = text[: self.left + 1].encode(errors="replace")
        if len(data) > self.left or len(text) > self.left + 1:
            data, self.truncated = data[: self.left], True
        self.left -= len(data)
        return data.decode(errors="ignore")


class _Answer:
    """What one choice has brought so far."""

    __slots__ = ("calls", "finish_reason", "reasoning", "text")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, dict[str, str]] = {}
        self.finish_reason = ""

    def message(self) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        if self.reasoning:
            parts.append({"type": "reasoning", "content": "".join(self.reasoning)})
        if self.text:
            parts.append({"type": "text", "content": "".join(self.text)})
        parts += [{"type": "tool_call", **call} for call in self.calls.values()]
        return {"role": "assistant", "parts": parts, "finish_reason": self.finish_reason or "error"}


class Captured:
    """Both texts of one exchange."""

    __slots__ = ("_answers", "_room", "_truncated", "prompt")

    def __init__(self, asked: Mapping[str, Any], limit_bytes: int) -> None:
        """`asked`: the fields of the request's body."""
        room = Room(limit_bytes)
        self.prompt = orjson.dumps(_messages(asked, room)).decode()
        self._truncated = room.truncated
        self._answers: dict[int, _Answer] = {}
        self._room = Room(limit_bytes)

    @property
    def truncated(self) -> bool:
        return self._truncated or self._room.truncated

    def answer(self) -> str:
        """The answer's messages as JSON; empty where none has come."""
        if not self._answers:
            return ""
        return orjson.dumps([each.message() for _, each in sorted(self._answers.items())]).decode()

    def add_events(self, data: bytes) -> None:
        """Some whole events of a stream, as they went to the client."""
        for event in BOUNDARY.split(data):
            _, payload = fields(event)
            if payload is not None and payload != b"[DONE]":
                self._add(payload, "delta")

    def add_whole(self, body: bytes) -> None:
        """An answer that went to the client in one piece."""
        if len(body) > MAX_PARSED_BYTES:
            self._room.truncated = True
        else:
            self._add(body, "message")

    def _add(self, payload: bytes, member: str) -> None:
        try:
            tree = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return
        choices = tree.get("choices") if isinstance(tree, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._add_choice(choice, member)

    def _add_choice(self, choice: dict[str, Any], member: str) -> None:
        index = choice.get("index")
        index = index if type(index) is int else 0
        answer = self._answers.get(index)
        if answer is None:
            if len(self._answers) >= MAX_CHOICES:
                self._room.truncated = True
                return
            answer = self._answers[index] = _Answer()
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            answer.finish_reason = reason[:64]
        said = choice.get(member)
        if not isinstance(said, dict):
            said = {"content": choice.get("text")}
        for name, kept in (("content", answer.text), ("reasoning_content", answer.reasoning)):
            text = said.get(name)
            if isinstance(text, str) and text and (cut := self._room.cut(text)):
                kept.append(cut)
        calls = said.get("tool_calls")
        for position, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict) and position < MAX_CHOICES:
                self._add_call(answer, call, position)

    def _add_call(self, answer: _Answer, call: dict[str, Any], position: int) -> None:
        index = call.get("index")
        kept = answer.calls.setdefault(min(index, MAX_CHOICES) if type(index) is int else position, {})
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        for name, text in (("id", call.get("id")), ("name", function.get("name"))):
            if isinstance(text, str) and text:
                kept[name] = self._room.cut(text)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            kept["arguments"] = kept.get("arguments", "") + self._room.cut(arguments)


class CapturingReply:
    """A reply (`gateway.reply.Reply`) whose text is kept as well."""

    __slots__ = ("_captured", "_reply")

    def __init__(self, reply: Reply, captured: Captured) -> None:
        self._reply = reply
        self._captured = captured

    @property
    def started(self) -> bool:
        return self._reply.started

    @started.setter
    def started(self, value: bool) -> None:
        self._reply.started = value

    @property
    def on_pause(self) -> Callable[[bool], None] | None:
        return self._reply.on_pause

    @on_pause.setter
    def on_pause(self, value: Callable[[bool], None] | None) -> None:
        self._reply.on_pause = value

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        if status == 200:
            self._captured.add_whole(body)
        self._reply.send(status, headers, body)

    def start(self, status: int, headers: Headers) -> None:
        self._reply.start(status, headers)

    def write(self, data: bytes) -> None:
        self._captured.add_events(data)
        self._reply.write(data)

    def finish(self) -> None:
        self._reply.finish()

    def abort(self) -> None:
        self._reply.abort()


def captured(traced: TraceContext, asked: Mapping[str, Any], reply: Reply) -> Reply:
    """Have the texts of this request and its answer kept with its trace; the reply to answer it with."""
    traced.captured = Captured(asked, traced.capture_max_bytes)
    return CapturingReply(reply, traced.captured)


def _messages(asked: Mapping[str, Any], room: Room) -> list[dict[str, Any]]:
    """The request's messages; a bare prompt, or what is to be embedded, as one of the user's."""
    messages = asked.get("messages")
    if not isinstance(messages, list):
        texts = asked.get("prompt", asked.get("input"))
        messages = [{"role": "user", "content": text} for text in (texts if isinstance(texts, list) else [texts])]
    found: list[dict[str, Any]] = []
    for message in messages:
        if not room.left:
            room.truncated = True
            break
        if isinstance(message, dict):
            role = message.get("role")
            found.append({"role": role[:32] if isinstance(role, str) else "user", "parts": _parts(message, room)})
    return found


def _parts(message: Mapping[str, Any], room: Room) -> list[dict[str, Any]]:
    content, parts = message.get("content"), list[dict[str, Any]]()
    if isinstance(content, str):
        if message.get("role") == "tool":
            parts.append({"type": "tool_call_response", "response": room.cut(content)})
        else:
            parts.append({"type": "text", "content": room.cut(content)})
    for part in content if isinstance(content, list) else ():
        if not room.left:
            room.truncated = True
            break
        if isinstance(part, dict):
            text, kind = part.get("text"), part.get("type")
            if isinstance(text, str):
                parts.append({"type": "text", "content": room.cut(text)})
            elif isinstance(kind, str):
                parts.append({"type": kind[:32]})
                room.left = max(0, room.left - 16)
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and room.left:
            name, arguments = str(function.get("name")), str(function.get("arguments"))
            parts.append({"type": "tool_call", "name": room.cut(name), "arguments": room.cut(arguments)})
    return parts
