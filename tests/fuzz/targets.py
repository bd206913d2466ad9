"""What is fuzzed: every place where bytes of a client or of a model server are first understood.

Each target takes arbitrary bytes. It returns when they were understood or refused in the documented way; any other
exception, a broken promise (an `AssertionError`) included, is a finding. `tests.fuzz.run` drives them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, cast

import httptools
import orjson
import uvicorn
from uvicorn.server import ServerState

from backends.dialects.anthropic import Anthropic
from backends.dialects.protocol import CHAT, COMPLETIONS, EMBEDDINGS, Fault, TranslationError, Untranslatable, Wish
from backends.errors import UpstreamError
from backends.http1 import Connection, Headers, Wire
from backends.kvevents.decode import Undecodable, decode_batch
from backends.prometheus import read_page
from backends.sse import EventTooLarge
from gateway.body import parse
from gateway.bounds import asked_choices, asked_output
from gateway.edges.protocol import GatewayProtocol
from gateway.errors import GatewayError, InvalidRequest
from gateway.keys.directory import Directory, Freshness
from gateway.keys.errors import Unauthenticated
from gateway.prompt import prompt_parts, session_of
from gateway.sse import StreamReader
from gateway.upstream_errors import error_in_answer, error_of, from_status, parse_retry_after
from tests.fuzz import seeds


@dataclass(frozen=True)
class Target:
    """`run` is given bytes like those of `seeds`, and many others."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]
    passes: int = 1
    """How often it has the input read."""


def pieces_of(data: bytes) -> list[bytes]:
    """The bytes as several reads, 4,096 at most: the first byte says how long each is, the rest is what is read."""
    if not data:
        return []
    step, rest = max(data[0] or 1 << 16, len(data) // 4096), data[1:]
    return [rest[start : start + step] for start in range(0, len(rest), step)]


# -- a client's body


def body(data: bytes) -> None:
    """Changing top-level values changes these and nothing else, for a parser that is none of ours."""
    try:
        read = parse(data)
    except InvalidRequest:
        return
    for path in (CHAT, COMPLETIONS, EMBEDDINGS):
        try:
            asked_output(path, read.fields)
            asked_choices(path, read.fields)
        except InvalidRequest:
            pass
    spliced = read.with_values({"model": b'"other"', "rid": b'"7"'})
    pairs: list[tuple[str, Any]] = json.loads(spliced, object_pairs_hook=lambda found: found)
    assert len({name for name, _ in pairs}) == len(pairs), "a key twice"
    assert orjson.loads(spliced) == {**read.fields, "model": "other", "rid": "7"}


def prompt(data: bytes) -> None:
    """What routing reads of a prompt exists for every body that is JSON at all."""
    try:
        fields = parse(data).fields
    except InvalidRequest:
        return
    for path in (CHAT, COMPLETIONS, EMBEDDINGS):
        assert all(isinstance(part, bytes) for part in prompt_parts(path, fields))
    session_of(fields, [(b"x-session-id", data[:300])], "tenant")


def anthropic_request(data: bytes) -> None:
    """A chat becomes JSON for Anthropic, or is refused with the parameter at fault."""
    try:
        fields = parse(data).fields
        prepared = _ANTHROPIC.prepare(Wish(CHAT, fields, "id", fields.get("stream") is True))
    except (InvalidRequest, Untranslatable):
        return
    assert isinstance(prepared.body, bytes)
    json.loads(prepared.body)


_ANTHROPIC = Anthropic(now=lambda: 1.0)


# -- a client's connection


class _Loop:
    """Stands for the event loop: what would be started is only counted."""

    def __init__(self) -> None:
        self.started = 0

    def create_task(self, work: Coroutine[Any, Any, Any], **_: Any) -> Any:
        work.close()
        self.started += 1
        return self

    def call_later(self, *_: Any) -> Any:
        return self

    call_soon = call_later

    def time(self) -> float:
        return 0.0

    def cancel(self) -> bool:
        return True

    def add_done_callback(self, *_: Any) -> None:
        pass


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class _Answers:
    """Reads what the edge has written with a parser that is not the edge's."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.parser = httptools.HttpResponseParser(self)

    def on_headers_complete(self) -> None:
        self.statuses.append(self.parser.get_status_code())


def edge(data: bytes) -> None:
    """A connection takes any bytes, answers in HTTP, and works for nobody whom it has refused."""
    loop, transport = _Loop(), _Transport()
    protocol = GatewayProtocol(
        cast(Any, _runtime()), _uvicorn(), ServerState(), {}, cast(asyncio.AbstractEventLoop, loop)
    )
    protocol.connection_made(transport)
    for piece in pieces_of(data):
        begun = loop.started
        refused = b"connection: close" in transport.written
        protocol.data_received(piece)
        assert not refused or loop.started == begun, "went on after a refusal"
    protocol.connection_lost(None)
    answers = _Answers()
    answers.parser.feed_data(bytes(transport.written))
    assert {status for status in answers.statuses if status >= 200} <= {400, 401, 403, 408, 413, 415, 421, 431, 503}
    assert _runtime().body_budget.used_bytes == 0


_KEPT: dict[str, Any] = {}
"""Made when first asked for: the targets are imported where no gateway is wanted."""


def _runtime() -> Any:
    if "runtime" not in _KEPT:
        from gateway.ledger import Ledger
        from gateway.metrics import Metrics
        from gateway.runtime import Runtime
        from tests.support.serving import settings_for

        async def make() -> Runtime:
            return Runtime(settings_for(["http://127.0.0.1:9"]), None, Metrics(), Ledger(None))

        _KEPT["runtime"] = asyncio.run(make())
    return _KEPT["runtime"]


def _uvicorn() -> uvicorn.Config:
    if "config" not in _KEPT:
        _KEPT["config"] = uvicorn.Config(_nobody, ws="none", lifespan="off", log_config=None, access_log=False)
        _KEPT["config"].load()
    found: uvicorn.Config = _KEPT["config"]
    return found


async def _nobody(scope: Any, receive: Any, send: Any) -> None:
    """An application that is never run."""


def authorization(data: bytes) -> None:
    """No header but the one with the key opens anything."""
    directory = _KEPT.get("directory")
    if directory is None:
        directory = _KEPT["directory"] = Directory(b"p" * 32, freshness=Freshness.CURRENT)
    name, _, value = data.partition(b":")
    headers = [(b"authorization", data), (name.lower()[:20], value), (b"x-api-key", data[:300])]
    for carried in (headers[:1], headers[1:2], headers[2:], headers):
        try:
            directory.authenticate(carried, 0.0)
        except Unauthenticated:
            continue
        raise AssertionError("a key was found where there is none")


# -- a model server's answer


class _Consumer:
    """Notes when it is told too much, or in another order than it was promised. (What it raises would be caught.)"""

    def __init__(self) -> None:
        self.ended = self.headed = False
        self.broken: list[str] = []

    def on_head(self, status: int, headers: Headers) -> None:
        self._hold(not self.headed and not self.ended, "a second head")
        self._hold(200 <= status <= 999, f"status {status}")
        self._hold(all(b"\n" not in value and b"\0" not in value for _, value in headers), "a line end in a header")
        self.headed = True

    def on_data(self, data: bytes) -> None:
        self._hold(self.headed and not self.ended and data != b"", "data without a head, after the end, or none")

    def on_end(self) -> None:
        self._hold(self.headed and not self.ended, "an end too many")
        self.ended = True

    def on_error(self, error: UpstreamError) -> None:
        self._hold(not self.ended, "an error after the end")
        self.ended = True

    def _hold(self, promise: bool, otherwise: str) -> None:
        if not promise:
            self.broken.append(otherwise)


class _Keeper:
    address = "fuzz"

    def release(self, wire: Wire, *, reusable: bool) -> None:
        pass

    def forget(self, wire: Wire) -> None:
        pass


def http1(data: bytes) -> None:
    """A response is read to one end or one error, however it is cut, and nothing is delivered after that."""
    loop = cast(asyncio.AbstractEventLoop, _Loop())
    wire, consumer = Wire(_Keeper(), loop), _Consumer()
    wire.connection_made(_Transport())
    Connection(wire).send(b"GET / HTTP/1.1\r\n\r\n", consumer, head_timeout_s=1, idle_timeout_s=1, method=b"GET")
    for piece in pieces_of(data):
        if wire.closed:
            break
        wire.data_received(piece)
    wire.eof_received()
    wire.connection_lost(None)
    assert consumer.ended
    assert not consumer.broken, consumer.broken


_EMPTY_LINES = re.compile(rb"^[\r\n]+|(?<=\n\n)[\r\n]+")


def stream(data: bytes) -> None:
    """The same events pass, and the same is learnt of them, however the stream is cut into reads."""
    whole, cut = StreamReader(max_event_bytes=1 << 20), StreamReader(max_event_bytes=1 << 20)
    seen: list[bytes] = []
    for reader, reads in ((whole, [data[1:]]), (cut, pieces_of(data))):
        try:
            seen.append(b"".join([reader.feed(piece) for piece in reads if piece]))
        except EventTooLarge:
            return
    # An empty line too many means nothing, and may be dropped.
    assert _EMPTY_LINES.sub(b"", seen[0]) == _EMPTY_LINES.sub(b"", seen[1])
    learnt = [(each.done, each.complete, each.error, each.usage, each.content_events) for each in (whole, cut)]
    assert learnt[0] == learnt[1]


def anthropic_stream(data: bytes) -> None:
    """Whatever a server of Anthropic's API sends, whole or streamed, becomes OpenAI's events or an error."""
    prepared = _ANTHROPIC.prepare(Wish(CHAT, _CHAT_FIELDS, "id", True))
    translation = prepared.translation
    assert translation is not None
    try:
        for piece in pieces_of(data):
            for event in translation.feed(piece).split(b"\n\n"):
                assert event == b"" or event == b"data: [DONE]" or orjson.loads(event.removeprefix(b"data: "))
    except TranslationError as error:
        orjson.dumps(error.error)
    try:
        orjson.loads(translation.whole(data[1:]))
    except TranslationError as error:
        orjson.dumps(error.error)


_CHAT_FIELDS: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def upstream_error(data: bytes) -> None:
    """Any body with any status becomes one of our own errors, whose headers are clean."""
    status = 400 + data[0] if data else 500
    headers = [(b"retry-after", data[1:40]), (b"retry-after-ms", data[40:60])]
    said = error_of(data[1:])
    for fault in Fault:
        _clean(from_status(status, headers, said, fault, 0.0))
    wait_s = parse_retry_after(headers, 0.0)
    assert wait_s is None or 0 < wait_s <= 1e9
    try:
        tree = orjson.loads(data[1:])
    except orjson.JSONDecodeError:
        return
    error_in_answer(tree, data[1:])


def _clean(error: GatewayError) -> None:
    orjson.loads(error.body())
    assert all(b"\n" not in value and b"\r" not in value for _, value in error.headers())


def kvevents(data: bytes) -> None:
    """A payload is a batch of events, or undecodable."""
    try:
        decode_batch(data)
    except Undecodable:
        return


def prometheus(data: bytes) -> None:
    """Any page of metrics gives the samples that can be read."""
    read_page(data, frozenset({"a", "num_requests_running"}), ("", "vllm:"))


TARGETS = {
    "body": Target(body, seeds.BODIES),
    "prompt": Target(prompt, seeds.CHATS),
    "anthropic_request": Target(anthropic_request, seeds.CHATS),
    "edge": Target(edge, seeds.REQUESTS),
    "authorization": Target(authorization, seeds.AUTHORIZATIONS),
    "http1": Target(http1, seeds.RESPONSES),
    "stream": Target(stream, seeds.STREAMS, passes=3),
    "anthropic_stream": Target(anthropic_stream, seeds.ANTHROPIC_STREAMS),
    "upstream_error": Target(upstream_error, seeds.ERRORS),
    "kvevents": Target(kvevents, seeds.BATCHES),
    "prometheus": Target(prometheus, seeds.PAGES),
}
