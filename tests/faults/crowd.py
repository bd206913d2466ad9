"""Clients by the hundred, each a bare connection of its own, that note when every piece came and how it all ended.

Open loop: each begins at its time, whatever became of the others. Nothing is retried and nothing is hidden. All times
are `time.monotonic()` seconds, as in the logs of the fake engines.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import httptools

State = Literal["running", "completed", "refused", "error_event", "broken", "left", "unreachable", "wrong"]
"""How an exchange ended for its client. `broken`: the connection ended in the middle. `wrong`: what no client may ever
see, such as [DONE] without a finish_reason, an error and [DONE], or an end that says nothing."""
Leaving = Literal["reset", "half-close", "close"]
PATIENCE_S = 30.0


@dataclass(eq=False)
class Answer:
    """What one client saw."""

    number: int
    at_s: float = 0.0
    """When its request was written."""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When a piece of the body came, and how long the body was then."""
    whole: bool = False
    """The message ended as HTTP says."""
    left_at_s: float | None = None
    ended_s: float | None = None
    unreachable: bool = False
    mark: str = ""
    """What the replicas' logs call it, if it has such a name (`fake`'s `mark`)."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def events(self) -> list[Any]:
        """The JSON of each event; [DONE] as the string it is."""
        found: list[Any] = []
        for block in bytes(self.body).split(b"\n\n"):
            data = b"".join(line[6:] for line in block.splitlines() if line.startswith(b"data: "))
            if data:
                found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
        return found

    @property
    def streamed(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def text(self) -> str:
        """The content so far, of a stream or a whole chat."""
        if self.status != 200:
            return ""
        if not self.streamed:
            return str(json.loads(self.body)["choices"][0]["message"]["content"])
        chunks = [event for event in self.events if isinstance(event, dict) and event.get("choices")]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

    @property
    def error(self) -> dict[str, Any]:
        """The error it was given, in the body or as an event; empty if none."""
        values = self.events if self.streamed else [json.loads(self.body)] if self.whole and self.body else []
        found: list[dict[str, Any]] = [v["error"] for v in values if isinstance(v, dict) and v.get("error")]
        return found[-1] if found else {}

    @property
    def error_at_s(self) -> float | None:
        """When the error event was there as a whole."""
        begin = self.body.find(b'data: {"error"')
        end = self.body.find(b"\n\n", begin) + 2
        if begin < 0 or end < 2:
            return None
        return next((at_s for at_s, length in self.arrivals if length >= end), None)

    @property
    def state(self) -> State:
        if self.left_at_s is not None:
            return "left"
        if self.unreachable:
            return "unreachable"
        if self.ended_s is None:
            return "running"
        if self.status >= 400 and self.whole:
            return "refused"
        if self.status != 200:
            return "broken"
        if not self.streamed:
            return ("completed" if "choices" in json.loads(self.body) else "wrong") if self.whole else "broken"
        return self._state_of_stream()

    def _state_of_stream(self) -> State:
        events = self.events
        dones = events.count("[DONE]")
        errors = [number for number, event in enumerate(events) if isinstance(event, dict) and event.get("error")]
        if errors:
            return "error_event" if not dones and errors == [len(events) - 1] else "wrong"
        if not dones:
            return "wrong" if self.whole else "broken"
        finished = any(
            choice.get("finish_reason")
            for event in events
            if isinstance(event, dict)
            for choice in event.get("choices", ())
        )
        return "completed" if dones == 1 and events[-1] == "[DONE]" and finished and self.whole else "wrong"


class _Client(asyncio.Protocol):
    """One request on one connection."""

    def __init__(self, answer: Answer, message: bytes) -> None:
        self.answer = answer
        self._message = message
        self._parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.answer.at_s = time.monotonic()
        self.transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        before = len(self.answer.body)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            assert self.transport is not None
            self.transport.abort()
        if len(self.answer.body) > before:
            self.answer.arrivals.append((time.monotonic(), len(self.answer.body)))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.answer.body += data

    def on_message_complete(self) -> None:
        if self.answer.status >= 200:
            self.answer.whole = True
            self._ended()
            assert self.transport is not None
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()

    def _ended(self) -> None:
        if self.answer.ended_s is None:
            self.answer.ended_s = time.monotonic()
            self.answer.ended.set()


class Crowd:
    """The clients of one experiment. `answers` has them in the order in which they began."""

    def __init__(self, host: str, port: int, headers: Sequence[str] = ()) -> None:
        self.address = (host, port)
        self.headers = tuple(headers)
        self.answers: list[Answer] = []
        self._clients: dict[Answer, _Client] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, body: Any, *headers: str, path: str = "/v1/chat/completions") -> Answer:
        """One request, from now on; returns at once."""
        answer = Answer(len(self.answers), at_s=time.monotonic())
        if isinstance(body, dict):
            answer.mark = body.get("fake", {}).get("mark", "")
        self.answers.append(answer)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}", *self.headers, *headers]
        message = "\r\n".join([*lines, "", ""]).encode("latin-1") + data
        task = asyncio.get_running_loop().create_task(self._connect(answer, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    async def _connect(self, answer: Answer, message: bytes) -> None:
        loop = asyncio.get_running_loop()
        client = self._clients[answer] = _Client(answer, message)
        try:
            await loop.create_connection(lambda: client, *self.address)
        except OSError:
            answer.unreachable = True
            answer.ended_s = time.monotonic()
            answer.ended.set()

    async def many(self, count: int, body: Any, *headers: str, per_s: float = 500.0) -> list[Answer]:
        """So many requests, begun at this rate whatever becomes of them. `body` may be made from the number."""
        begin_s = time.monotonic()
        made: Callable[[int], Any] = body if callable(body) else lambda _: body
        found = []
        for number in range(count):
            late_s = begin_s + number / per_s - time.monotonic()
            if late_s > 0:
                await asyncio.sleep(late_s)
            found.append(self.ask(made(number), *headers))
        return found

    def leave(self, answer: Answer, how: Leaving) -> None:
        """The client goes, now; one whose exchange has ended already does not."""
        if answer.ended_s is not None:
            return
        transport = self._clients[answer].transport
        answer.left_at_s = time.monotonic()
        if transport is None:
            return
        sock: socket.socket = transport.get_extra_info("socket")
        match how:
            case "half-close":
                transport.write_eof()
            case "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
            case "close":
                transport.abort()

    async def until(self, condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
        """Wait for what clients have seen."""
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 - a hundred clients set no event
                await asyncio.sleep(0.005)

    async def ended(self, answers: Iterable[Answer] | None = None, within_s: float = PATIENCE_S) -> None:
        """Wait until these, or all, have come to their end."""
        async with asyncio.timeout(within_s):
            for answer in self.answers if answers is None else answers:
                await answer.ended.wait()

    def close(self) -> None:
        for client in self._clients.values():
            if client.transport is not None:
                client.transport.abort()


def states(answers: Iterable[Answer]) -> dict[State, int]:
    """How many ended in each way."""
    return dict(Counter(answer.state for answer in answers))


def tell(answers: Sequence[Answer]) -> str:
    """The same in words."""
    return ", ".join(f"{count} {state}" for state, count in sorted(states(answers).items())) or "none"
