"""The clients of a soak: each request takes one of many ways to succeed, fail or leave, and notes what it was told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from loadtests.rawclient import read_head

State = Literal["completed", "refused", "error_event", "left", "broken", "unreachable", "wrong"]
"""`broken`: the connection ended in the middle. `wrong`: what no client may be given, such as a stream that ends
without [DONE] and without an error, or with both."""
PATIENCE_S = 40.0
STALLS_S = 4.0
"""Longer than the gateway lets a client wait with reading."""
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Way:
    """One kind of request. `fake` is what the engine is told to do (`loadtests.behaviour`)."""

    name: str
    weight: float
    fake: dict[str, Any] = field(default_factory=dict)
    stream: bool = True
    leaves: Literal["", "sending", "waiting", "streaming"] = ""
    """In which phase the client goes."""
    reads: Literal["", "slowly", "never"] = ""
    key: str = "open"
    body: bytes | None = None
    """In place of a proper one."""


SLOW = {"chunks": 40, "interval_s": 0.03}
BIG = {"chunks": 3000}
WAYS = (
    Way("whole answer", 12, stream=False),
    Way("stream", 12, {"chunks": 20}),
    Way("paced stream", 8, {"chunks": 20, "interval_s": 0.02}),
    Way("long prompt's wait", 2, {"ttft_s": 1.0, "chunks": 5}),
    Way("role, then nothing", 1, {"role_only_then_hang": True}),
    Way("no answer", 1, {"hang": True}),
    Way("silence in the middle", 1, {"hang_mid": 5}),
    Way("status 500", 2, {"status": 500}, stream=False),
    Way("status 429", 2, {"status": 429}, stream=False),
    Way("status 503 to a stream", 2, {"status": 503}),
    Way("status 400", 2, {"status": 400}, stream=False),
    Way("error first", 2, {"error_first": True}),
    Way("error in the middle", 2, {"error_event_after": 5}),
    Way("reset in the middle", 2, {"cut_after": 5}),
    Way("clean end in the middle", 2, {"truncate_after": 5}),
    Way("empty stream", 1, {"empty_stream": True}),
    Way("half an answer", 1, {"content_length_short": 50}, stream=False),

    Way("no usage", 1, {"no_usage": True}),
    Way("one byte at a time", 1, {"chunks": 3, "split": 1}),
    Way("leaves while sending", 2, leaves="sending"),
    Way("leaves a whole answer", 3, {"delay_head_s": 1.0}, stream=False, leaves="waiting"),
    Way("leaves before the first token", 3, {"ttft_s": 1.0}, leaves="waiting"),
    Way("leaves in the middle", 5, SLOW, leaves="streaming"),
    Way("reads slowly", 1, BIG, reads="slowly"),
    Way("never reads", 1, {"chunks": 9000}, reads="never"),
    Way("no JSON", 1, body=b"{"),
    Way("unknown model", 1, body=b'{"model": "other", "messages": []}'),
    Way("unknown key", 1, key="none"),
    Way("key with tight limits", 3, {"chunks": 5}, key="tight"),
)  # fmt: skip


@dataclass(slots=True)
class Seen:
    """What one client knows of its request."""

    way: str
    state: State
    status: int = 0
    id: str = ""
    """`x-request-id`; empty where no head came."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    took_s: float = 0.0
    sent: bool = True
    """The request had left as a whole."""


class Traffic:
    """So many users who ask one thing after another until `over`."""

    def __init__(self, port: int, keys: dict[str, str], seed: int, pause_s: float) -> None:
        self._port = port
        self._keys = {**keys, "none": "soak-nobody-knows-this-key-0123456789"}
        self._rng = random.Random(seed)
        self._pause_s = pause_s
        self.seen: list[Seen] = []
        self.over = asyncio.Event()

    async def run(self, users: int) -> None:
        """Returns when all have ended what they had begun."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(users):
                tasks.create_task(self._user())

    async def _user(self) -> None:
        rng = random.Random(self._rng.random())
        weights = [way.weight for way in WAYS]
        while not self.over.is_set():
            (way,) = rng.choices(WAYS, weights)
            self.seen.append(await self.one(way, rng))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.over.wait(), rng.expovariate(1 / self._pause_s))

    async def one(self, way: Way, rng: random.Random) -> Seen:
        """One request of this kind, to its end."""
        began_s = time.monotonic()
        seen = Seen(way.name, "broken")
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._ask(way, rng, seen)
        except TimeoutError:
            seen.state = "wrong"  # nobody may have to wait for so long
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            seen.state = "left" if seen.state == "left" else "broken"
        seen.took_s = time.monotonic() - began_s
        return seen

    async def _ask(self, way: Way, rng: random.Random, seen: Seen) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        if way.reads:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        except OSError:
            sock.close()
            seen.state = "unreachable"
            return
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096 if way.reads else 1 << 20)
        try:
            message = self._message(way, rng)
            if way.leaves == "sending":
                seen.state, seen.sent = "left", False
                writer.write(message[: rng.randrange(1, len(message) - 1)])
                await asyncio.sleep(rng.uniform(0.0, 0.05))
                return
            writer.write(message)
            if way.leaves:
                seen.state = "left"
                if way.leaves == "waiting":
                    await asyncio.sleep(rng.uniform(0.02, 0.5))
                    return
            await self._read(way, rng, reader, seen)
        finally:
            self._go(writer, rng)

    def _go(self, writer: asyncio.StreamWriter, rng: random.Random) -> None:
        """With FIN or RST; both are ways to leave, and the end of what has ended."""
        if rng.random() < 0.5:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()

    def _message(self, way: Way, rng: random.Random) -> bytes:
        prompt = f"prompt {rng.randrange(40)} " + "and so on " * rng.choice((1, 5, 50))
        fields: dict[str, Any] = {
            "model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 10_000,
            "fake": {"prompt_tokens": rng.randrange(20, 400), "cached_tokens": rng.randrange(20), **way.fake},
        }  # fmt: skip
        if way.stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(fields).encode() if way.body is None else way.body
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {self._keys[way.key]}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _read(self, way: Way, rng: random.Random, reader: asyncio.StreamReader, seen: Seen) -> None:
        seen.status, headers = await read_head(reader)
        seen.id = headers.get("x-request-id", "")
        if "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
            seen.state = state_of_whole(seen.status, body, seen)
            return
        if way.reads == "never":
            await asyncio.sleep(STALLS_S)  # the reader takes a few KiB, and lets nothing more come
        leave_after = rng.randrange(1, 12) if way.leaves == "streaming" else 0
        pieces: list[bytes] = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
            if leave_after and len(pieces) >= leave_after:
                return
            if way.reads:
                await asyncio.sleep(0.001)
        await reader.readexactly(2)
        if not leave_after:
            seen.state = state_of_stream(b"".join(pieces), seen)


def state_of_whole(status: int, body: bytes, seen: Seen) -> State:
    """What a whole answer is, with its usage noted."""
    if status != 200:
        return "refused" if "error" in _json(body) else "wrong"
    found = _json(body)
    if not found.get("choices"):
        return "wrong"
    _note_usage(found, seen)
    return "completed"


def state_of_stream(body: bytes, seen: Seen) -> State:
    """What a stream is that ended as HTTP wants it to."""
    datas = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    dones = datas.count(b"[DONE]")
    events = [_json(data) for data in datas if data != b"[DONE]"]
    if any("error" in event for event in events):
        return "error_event" if not dones else "wrong"
    if dones != 1 or not any(choice.get("finish_reason") for event in events for choice in event.get("choices", ())):
        return "wrong"
    for event in events:
        _note_usage(event, seen)
    return "completed"


def _note_usage(found: dict[str, Any], seen: Seen) -> None:
    usage = found.get("usage")
    if isinstance(usage, dict):
        seen.prompt_tokens, seen.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _json(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(data)
        if isinstance(found, dict):
            return found
    return {}


def told(seen: list[Seen]) -> Counter[tuple[str, State]]:
    """How many of each way ended in each state."""
    return Counter((each.way, each.state) for each in seen)
