"""One connection of the fake engine: reads requests with httptools and plays the scripted answers.

`loadtests.engine` holds what all connections share and is the module to import.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import httptools
import msgspec

from loadtests import counting, replies
from loadtests.behaviour import BadBehaviour, Behaviour
from loadtests.replies import Call, End, Step

if TYPE_CHECKING:
    from loadtests.engine import FakeEngine

KINDS = {"/v1/chat/completions": "chat", "/v1/completions": "text", "/v1/embeddings": "embeddings"}
RESET_AFTER_S = 0.02  # a reset overtakes bytes that are still in the sender's queue; let them leave first
NO_LINGER = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: close() sends RST


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One request as the engine saw it. Times are `time.monotonic()`."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    """In the order they came, names in lower case."""
    body: bytes
    received_at: float
    connection: int
    """Which connection carried it: connections are numbered from 1 in the order they were accepted."""
    behaviour: Behaviour = dataclasses.field(default_factory=Behaviour)
    begun_bytes: int = 0
    """Of the counted text, where the request begins with some of it."""
    writes: int = 0
    """Pieces of the answer handed to the socket so far (the head is one, each event is one)."""
    completed_at: float | None = None
    closed_at: float | None = None
    """When the peer's connection dropped, if that was before the answer was complete."""
    done: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    gone: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def header(self, name: str) -> str | None:
        """The first value of a header."""
        wanted = name.lower().encode("latin-1")
        return next((value.decode("latin-1") for found, value in self.headers if found == wanted), None)

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct):
    """The few fields that the engine looks at; the rest is skipped without building objects."""

    model: str = ""
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: int | None = 1
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    fake: dict[str, object] | None = None


class _Abort(msgspec.Struct):
    rid: str = ""


class _Script(msgspec.Struct):
    script: dict[str, object] = {}
    probe: dict[str, object] = {}


class _Lora(msgspec.Struct):
    lora_name: str
    lora_path: str = ""


_decode = msgspec.json.Decoder(_Body).decode


def _inputs(raw: msgspec.Raw) -> int:
    """How many prompts: a list of texts or of token lists counts its members, anything else is one."""
    value = msgspec.json.decode(raw) if bytes(raw)[:1] == b"[" else None
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


def _in_pieces(steps: Iterator[Step], size: int) -> Iterator[Step]:
    for step in steps:
        if isinstance(step, bytes):
            for start in range(0, len(step), size):
                yield step[start : start + size]
                yield 0.0  # a deadline in the past: the next turn of the loop
        else:
            yield step


class Connection(asyncio.Protocol):
    """One client connection: reads requests, plays the answers one after the other."""

    def __init__(self, engine: FakeEngine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._pending: deque[tuple[Request, Iterator[Step]]] = deque()
        self._request: Request | None = None
        self._steps: Iterator[Step] = iter(())
        self._timer: asyncio.Handle | None = None
        self._paused = False
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._fake: bytes | None = None
        self._read_pause_s = 0.0

    # -- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclass of it
        engine = self._engine
        engine.connections.add(self)
        engine.accepted += 1
        self._number = engine.accepted
        engine.changed()

    def data_received(self, data: bytes) -> None:
        if self._timer is not None and self._request is None:
            self._timer.cancel()  # it was the idle timer
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            self._transport.abort()
            raise  # a bug in here, not in the request
        except httptools.HttpParserError as error:
            self._transport.write(replies.json_response(400, replies.error(str(error), 400)))
            self._transport.close()
            return
        if self._read_pause_s:
            self._transport.pause_reading()
            self._loop.call_later(self._read_pause_s, self._transport.resume_reading)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        engine = self._engine
        engine.connections.discard(self)
        unanswered = [request for request, _ in self._pending]
        if self._request is not None:
            unanswered.append(self._request)
        for request in unanswered:
            request.closed_at = time.monotonic()
            request.gone.set()
            if engine.log is not None and request.path in KINDS:
                engine.log("gone", request)
            engine.running -= 1
        self._request, self._steps = None, iter(())
        self._pending.clear()
        engine.changed()

    def abort(self) -> None:
        self._transport.abort()

    # -- parser callbacks

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._body = []
        self._fake = None

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"x-fake":
            self._fake = value
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._fake is not None or self._engine.script.slow_body_read_s or self._engine.queue:
            queue = self._engine.queue
            try:
                behaviour = self._from_header(queue[0] if queue else self._engine.script)
            except BadBehaviour:
                return  # answered with 400 once the body is read
            self._read_pause_s = behaviour.slow_body_read_s

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        self._read_pause_s = 0.0
        engine = self._engine
        method = self._parser.get_method().decode()
        path = self._url.partition(b"?")[0].decode("latin-1")
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        kind = KINDS.get(path) if method == "POST" else None
        if kind is None:
            self._other(method, path, body)
            return
        if engine.quick and engine.pace is None and self._request is None and self._answered_from_cache(kind, body):
            return
        request = Request(method, path, self._headers, body, time.monotonic(), self._number)
        if engine.record:
            engine.requests.append(request)
        try:
            call, request.behaviour = self._understand(kind, body)
            request.begun_bytes = call.begun_bytes
            if engine.pace is not None:
                request.behaviour = engine.pace(body, request.behaviour, request.received_at)
        except (msgspec.MsgspecError, BadBehaviour, counting.NotMyText) as error:
            wrong = replies.json_response(400, replies.error(str(error), 400))
            self._play(request, iter((wrong, End.KEEP)))
            return
        self._play(request, replies.steps(call, request.behaviour))

    # -- routes

    def _answered_from_cache(self, kind: str, body: bytes) -> bool:
        """The quick way for load: the default script and a plain answer, composed once."""
        if self._fake is not None or self._engine.queue or not self._parser.should_keep_alive():
            return False
        try:
            found = _decode(body)
        except msgspec.MsgspecError:
            return False
        if found.fake or found.stream or found.n != 1 or len(bytes(found.prompt)) or len(bytes(found.input)):
            return False
        call = Call(kind, found.model)
        answer = self._engine.answers.get(call)
        if answer is None:
            steps = list(replies.steps(call, self._engine.script))
            if len(steps) != 2 or not isinstance(steps[0], bytes) or steps[1] is not End.KEEP:
                return False
            answer = self._engine.answers[call] = steps[0]
        self._transport.write(answer)
        self._engine.served += 1
        return True

    def _from_header(self, behaviour: Behaviour) -> Behaviour:
        return behaviour.updated_from_header(self._fake.decode("latin-1")) if self._fake else behaviour

    def _understand(self, kind: str, body: bytes) -> tuple[Call, Behaviour]:
        engine = self._engine
        scripted = engine.queue.popleft() if engine.queue else engine.script
        found = _decode(body)
        behaviour = self._from_header(scripted)
        if found.fake:
            behaviour = behaviour.updated(found.fake)
        options = found.stream_options or _StreamOptions()
        prompts = _inputs(found.input if kind == "embeddings" else found.prompt)
        stream = bool(found.stream) and kind != "embeddings"
        begun_bytes, cut_short = 0, False
        if behaviour.counting and kind == "chat":
            begun_bytes, left, cut_short = counting.asked(body, behaviour.chunks)
            behaviour = dataclasses.replace(behaviour, chunks=left)
        call = Call(kind, found.model, stream, options.include_usage, found.n or 1, prompts, begun_bytes, cut_short)
        return call, behaviour

    def _other(self, method: str, path: str, body: bytes) -> None:
        """Everything that is not a model's work."""
        engine = self._engine
        request = Request(method, path, self._headers, body, time.monotonic(), self._number, engine.probe)
        if engine.record:
            engine.probes.append(request)
        if (method, path) == ("POST", "/abort_request"):
            engine.aborted_rids.append(msgspec.json.decode(body, type=_Abort).rid)
            self._play(request, iter((replies.json_response(200, {}), End.KEEP)))
            return
        if engine.adapters is not None and method == "POST" and path in ("/load_lora_adapter", "/unload_lora_adapter"):
            self._play(request, self._change_adapter(path, msgspec.json.decode(body, type=_Lora), engine.adapters))
            return
        if (method, path) == ("POST", "/script") and engine.scriptable:
            told = msgspec.json.decode(body, type=_Script)
            engine.script, engine.probe = Behaviour().updated(told.script), Behaviour().updated(told.probe)
            self._play(request, iter((replies.json_response(200, {}), End.KEEP)))
            return
        known: dict[str, Callable[[], replies.Json]] = {
            "/health": dict,
            "/v1/models": lambda: {
                "object": "list",
                "data": [{"id": m, "object": "model"} for m in engine.models]
                if engine.adapters is None
                else [{"id": m, "object": "model", "parent": None} for m in engine.models]
                + [{"id": n, "parent": engine.models[0], "root": p} for n, p in engine.adapters.items()],
            },
            "/stats": lambda: {
                "served": engine.served,
                "running": engine.running,
                "accepted": engine.accepted,
            },
            **engine.reports,
        }
        if method != "GET" or path not in known:
            unknown = replies.json_response(404, replies.error(f"no route {method} {path}", 404))
            self._play(request, iter((unknown, End.KEEP)))
        elif engine.probe == Behaviour():
            self._play(request, iter((replies.json_response(200, known[path]()), End.KEEP)))
        else:
            self._play(request, replies.steps(Call("chat", engine.models[0]), engine.probe))

    def _change_adapter(self, path: str, asked: _Lora, adapters: dict[str, str]) -> Iterator[Step]:
        """As SGLang does it: takes its time, and refuses what is done already."""
        yield self._engine.adapter_delay_s
        name = asked.lora_name
        if (path == "/load_lora_adapter") == (name in adapters):
            said = f"LoRA adapter {name} is {'already' if name in adapters else 'not'} loaded"
            yield replies.json_response(400, {"success": False, "error_message": said})
        elif name in adapters:
            del adapters[name]
            yield replies.json_response(200, {"success": True, "loaded_adapters": adapters})
        elif asked.lora_path.startswith("/missing"):
            yield replies.json_response(400, {"success": False, "error_message": f"{asked.lora_path} does not exist"})
        else:
            adapters[name] = asked.lora_path
            yield replies.json_response(200, {"success": True, "loaded_adapters": adapters})
        self._engine.changed()
        yield End.KEEP

    # -- playing an answer

    def _play(self, request: Request, steps: Iterator[Step]) -> None:
        if request.path in KINDS:
            self._engine.running += 1
            if self._engine.log is not None:
                self._engine.log("received", request)
        if request.behaviour.split:
            steps = _in_pieces(steps, request.behaviour.split)
        self._pending.append((request, steps))
        if self._request is None:
            self._next()
        self._engine.changed()

    def _next(self) -> None:
        if self._pending:
            self._request, self._steps = self._pending.popleft()
            self._advance()

    def _advance(self) -> None:
        """Play steps until one has to wait."""
        request = self._request
        self._timer = None
        if request is None:
            return
        while not self._paused:
            step = next(self._steps)
            if isinstance(step, bytes):
                self._transport.write(step)
                request.writes += 1
            elif isinstance(step, float):
                # loop.time() and time.monotonic() are the same clock
                self._timer = self._loop.call_at(max(request.received_at + step, self._loop.time()), self._advance)
                return
            else:
                self._end(request, step)
                return

    def _end(self, request: Request, end: End) -> None:
        if end is End.HANG:
            return
        if end is End.RESET:
            self._timer = self._loop.call_later(RESET_AFTER_S, self._reset)
            return
        self._request = None
        request.completed_at = time.monotonic()
        request.done.set()
        if request.path in KINDS:
            self._engine.running -= 1
            self._engine.served += 1
            if self._engine.log is not None:
                self._engine.log("answered", request)
        self._engine.changed()
        if end is End.CLOSE or request.behaviour.keepalive_s == 0 or not self._parser.should_keep_alive():
            self._transport.close()
        elif self._pending:
            self._next()
        elif request.behaviour.keepalive_s:
            self._timer = self._loop.call_later(request.behaviour.keepalive_s, self._transport.close)

    def _reset(self) -> None:
        """RST. The request counts as gone, not as completed: its answer never was."""
        raw: socket.socket = self._transport.get_extra_info("socket")
        if raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._transport.abort()
