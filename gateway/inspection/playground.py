"""The playground: sends a request through the gateway's own front door, and tells as it happens what becomes of it.

The same request can go to several policies or replicas side by side. Each is a request like any other there: admitted,
limited, recorded under the tenant that is chosen. Nothing of its text is kept here, and when whoever asked leaves, or
their session is over, all of it ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from gateway.admin.desk import Desk
from gateway.admin.guard import session_of
from gateway.errors import GatewayError, InvalidRequest
from gateway.inspection.door import TRIAL_HEADER, Answer, Door, DoorClosed
from gateway.operations import NoWorkerAnswers, body_of, json_response
from gateway.policy import About, GuardedRoute, Who
from gateway.sources import ask_all, find_request
from routing.policies import POLICY_NAMES

logger = logging.getLogger(__name__)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_BODY_BYTES = 4 * 2**20
MAX_COLUMNS = 4
MAX_AT_ONCE = 16
"""Requests of the playground under way, of all operators together."""
MAX_EVENT_BYTES = 2**20
MAX_ERROR_BYTES = 65_536
QUEUED_EVENTS = 256
"""Of all columns; who reads slowly slows the engines down, as any client does."""
LOOK_AGAIN_S = 0.05
SETTLED_WITHIN_S = 2.0
STALLED_S = 30.0
"""Whoever takes nothing for so long is left: their places are for others."""
LAST_WORD_S = 1.0


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of those side by side; without policy and replica, the request goes where any would."""

    policy: str | None = None
    replica: str | None = None


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to send, and how."""

    request: dict[str, Any]
    """The body, as OpenAI's API has it. It is streamed in any case, with its usage."""
    path: str = CHAT
    columns: tuple[Column, ...] = (Column(),)
    tenant: str = "playground"
    regions: tuple[str, ...] = ()
    """Where it may be served; empty: anywhere."""


class PlaygroundBusy(GatewayError):
    status = 429
    type = "requests"
    code = "playground_busy"


class PlaygroundClosed(GatewayError):
    status = 503
    code = "playground_closed"


class Playground:
    """Of one gateway."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._under_way = 0

    def routes(self) -> list[GuardedRoute]:
        about = About(body=Asked, media="text/event-stream", errors=[PlaygroundBusy, PlaygroundClosed])
        return [
            GuardedRoute("/admin/playground", self.choices, Who.READER, methods=["GET"]),
            GuardedRoute("/admin/playground", self.play, Who.OPERATOR, methods=["POST"], about=about),
        ]

    async def choices(self, request: Request) -> Response:
        """What the playground can be asked for: models, each with its pool's replicas, and policies."""
        answers = await ask_all(self._desk.sources, lambda source: source.fleet())
        fleet = next((state for _, state in answers if state is not None), None)
        if fleet is None:
            raise NoWorkerAnswers("No worker answers; they may be starting.", retry_after_s=1.0)
        replicas = {pool["name"]: [each["name"] for each in pool["replicas"]] for pool in fleet["pools"]}
        door = self._desk.door
        models = [
            {"name": name, "pool": model["backend"], "replicas": replicas.get(model["backend"], [])}
            for name, model in fleet["models"].items()
        ]
        return json_response(
            {
                "models": models,
                "policies": list(POLICY_NAMES),
                "url": "" if door is None else door.url,
                "open": bool(door),
            }
        )

    async def play(self, request: Request) -> Response:
        """Send a request through the front door; what happens is told as server-sent events."""
        asked = _read(await body_of(request, MAX_BODY_BYTES))
        door = self._desk.door
        if door is None:
            raise PlaygroundClosed("This process knows no way to its own inference listener.")
        count = len(asked.columns)
        self._take(count)
        try:
            # Not the text: nobody reads an audit for what somebody has tried out.
            await self._desk.audit.note(
                request,
                "playground.send",
                str(asked.request.get("model")),
                {"tenant": asked.tenant, "columns": [msgspec.to_builtins(each) for each in asked.columns]},
            )
        except BaseException:
            self._leave(count)
            raise
        session = session_of(request)
        return _Events(
            self._events(asked, door), partial(self._leave, count), None if session is None else session.ended
        )

    def _take(self, count: int) -> None:
        """Places for so many requests; each has to be left again. Raises `PlaygroundBusy`."""
        if self._under_way + count > MAX_AT_ONCE:
            raise PlaygroundBusy(f"{MAX_AT_ONCE} requests of the playground are under way already.", retry_after_s=1.0)
        self._under_way += count

    def _leave(self, count: int) -> None:
        self._under_way -= count

    async def _events(self, asked: Asked, door: Door) -> AsyncGenerator[bytes]:
        """Everything that happens, in the order in which it happens; leaving it early ends all that is under way."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUED_EVENTS)
        count = len(asked.columns)
        tasks = [
            asyncio.create_task(_Run(self._desk, asked, number, queue).run(door), name="playground")
            for number in range(count)
        ]
        try:
            while count:
                event = await queue.get()
                if event is None:
                    count -= 1
                else:
                    yield event
            yield _event("end", {})
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Events(StreamingResponse):
    """Ends what its events come from as soon as nobody reads them, or may, and not when that is collected."""

    def __init__(self, events: AsyncGenerator[bytes], leave: Callable[[], None], ended: asyncio.Event | None) -> None:
        """`leave` is called at its end. `ended`: set when the session of whoever asks is over."""
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._leave = leave
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()

    async def stream_response(self, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)

        async def in_time(message: Message) -> None:
            async with asyncio.timeout(STALLED_S):
                await send(message)

        with suppress(TimeoutError):
            async with _until(self._ended), aclosing(self.body_iterator):
                await super().stream_response(in_time)
                return
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def _until(ended: asyncio.Event | None) -> AsyncIterator[None]:
    """Raises `TimeoutError` in the block when that is set; None: it never is."""
    async with asyncio.timeout(None) as block:
        if ended is None:
            yield
            return
        loop = asyncio.get_running_loop()

        async def watch(ended: asyncio.Event = ended) -> None:
            await ended.wait()
            block.reschedule(loop.time())

        watching = loop.create_task(watch(), name="playground's session")
        try:
            yield
        finally:
            watching.cancel()


class _Run:
    """One column."""

    def __init__(self, desk: Desk, asked: Asked, number: int, queue: asyncio.Queue[bytes | None]) -> None:
        self._desk = desk
        self._asked = asked
        self._number = number
        self._queue = queue
        self._begun_at = time.monotonic()

    async def run(self, door: Door) -> None:
        request_id = ""
        try:
            asked, column = self._asked, self._asked.columns[self._number]
            trial = {"tenant": asked.tenant, "policy": column.policy, "replica": column.replica}
            headers = [(TRIAL_HEADER, msgspec.json.encode(trial).decode("ascii"))]
            if asked.regions:
                headers.append(("x-tidegate-region", ",".join(asked.regions)))
            self._begun_at = time.monotonic()
            async with door.ask(self._desk.settings, asked.path, headers, _body(asked)) as answer:
                request_id = answer.headers.get("x-request-id", "")
                await self._relay(answer, request_id)
            await self._tell_end(request_id)
        except DoorClosed as error:
            await self._tell("error", {"status": 0, "code": "connection", "message": str(error)})
            await self._tell_end(request_id)
        except Exception:
            logger.exception("the playground failed over request %s", request_id)
            await self._tell("error", {"status": 0, "code": "internal_error", "message": "The log says more."})
        await self._queue.put(None)

    async def _relay(self, answer: Answer, request_id: str) -> None:
        shown = {name: value for name, value in answer.headers.items() if name.startswith(("x-", "retry-after"))}
        await self._tell("head", {"status": answer.status, "id": request_id, "headers": shown})
        # Answers that come at once have begun to be settled: whoever explains them finds them either way.
        found = await find_request(self._desk.sources, request_id)
        if found is not None:
            await self._tell("decision", {"id": request_id, "decisions": found["decisions"]})
        if answer.status != 200:
            await self._tell("error", _error(answer.status, await answer.whole(MAX_ERROR_BYTES)))
            return
        rest = b""
        async for piece in answer.pieces():
            rest += piece
            *lines, rest = rest.split(b"\n")
            for line in lines:
                await self._read_line(line)
            if len(rest) > MAX_EVENT_BYTES:
                raise DoorClosed("an event of the answer is too large to show")

    async def _read_line(self, line: bytes) -> None:
        """One line of the answer's events; of what is no data, nothing is told."""
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            return
        try:
            chunk = msgspec.json.decode(line[5:])
        except msgspec.MsgspecError:
            return
        if not isinstance(chunk, dict):
            return
        if chunk.get("error"):
            error = chunk["error"] if isinstance(chunk["error"], dict) else {}
            await self._tell("error", {"status": 200, "code": error.get("code"), "message": error.get("message")})
        for choice in chunk.get("choices") or ():
            text, reasoning = _text_of(choice)
            if text or reasoning:
                told = {"choice": choice.get("index", 0), "text": text, "reasoning": reasoning}
                await self._tell("text", {name: value for name, value in told.items() if value != ""})
            if choice.get("finish_reason"):
                await self._tell("finish", {"choice": choice.get("index", 0), "reason": choice["finish_reason"]})
        if isinstance(chunk.get("usage"), dict):
            await self._tell("usage", chunk["usage"])

    async def _tell_end(self, request_id: str) -> None:
        """The record, once the request is settled: it follows the last byte by a moment."""
        end = time.monotonic() + SETTLED_WITHIN_S
        found: dict[str, Any] | None = None
        while request_id:
            found = await find_request(self._desk.sources, request_id)
            if found is None or found["record"] is not None or time.monotonic() >= end:
                break
            await asyncio.sleep(LOOK_AGAIN_S)
        told = {} if found is None else {name: found[name] for name in ("record", "timeline", "decisions")}
        await self._tell("done", {"id": request_id, **told})

    async def _tell(self, kind: str, content: dict[str, Any]) -> None:
        at_ms = round((time.monotonic() - self._begun_at) * 1000, 1)
        await self._queue.put(_event(kind, {"column": self._number, "at_ms": at_ms, **content}))


def _event(kind: str, content: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(content))


def _read(raw: bytes) -> Asked:
    try:
        asked = msgspec.json.decode(raw, type=Asked)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The body must be JSON with a request, and perhaps columns: {error}.") from error
    if asked.path not in (CHAT, COMPLETIONS):
        raise InvalidRequest(f"path must be {CHAT} or {COMPLETIONS}.", param="path")
    if not 1 <= len(asked.columns) <= MAX_COLUMNS:
        raise InvalidRequest(f"There can be 1 to {MAX_COLUMNS} columns.", param="columns")
    names = [asked.tenant, *asked.regions]
    if not all(0 < len(each) <= 200 and each.isascii() and each.isprintable() for each in names):
        raise InvalidRequest("Names of tenants and regions have 1 to 200 ASCII characters.", param="tenant")
    for column in asked.columns:
        for name in (column.policy, column.replica):
            if name is not None and not (0 < len(name) <= 200 and name.isascii() and name.isprintable()):
                raise InvalidRequest("Names of policies and replicas have 1 to 200 ASCII characters.", param="columns")
    return asked


def _body(asked: Asked) -> bytes:
    return msgspec.json.encode({**asked.request, "stream": True, "stream_options": {"include_usage": True}})


def _text_of(choice: Any) -> tuple[str, str]:
    """What a choice of a chunk adds to the answer, and to the reasoning before it."""
    if not isinstance(choice, dict):
        return "", ""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        text = delta.get("content") or delta.get("refusal")
        calls = delta.get("tool_calls")
        if calls and not text:
            text = msgspec.json.encode(calls).decode()
        return text if isinstance(text, str) else "", reasoning if isinstance(reasoning, str) else ""
    text = choice.get("text")
    return text if isinstance(text, str) else "", ""


def _error(status: int, body: bytes) -> dict[str, Any]:
    try:
        error = msgspec.json.decode(body)["error"]
        return {"status": status, "code": error.get("code"), "message": error.get("message")}
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return {"status": status, "code": None, "message": body[:1000].decode(errors="replace")}
