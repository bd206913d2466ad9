"""A stand-in for the admin listener of a gateway, as far as whoever registers replicas sees it; over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from loadtests.ports import free_port

PATIENCE_S = 30.0


@dataclass
class StandIn:
    """Takes registrations in; a test sets what it says to them.

    async with StandIn() as gateway:
        ...                                     # have something register at gateway.url
        await gateway.until(lambda: gateway.state("r0") == "ready")
    """

    token: str = "registrar-token"
    renew_in_s: float = 0.2
    ttl_s: float = 1.0
    in_flight: int = 0
    """What it says of every replica."""
    refusal: tuple[int, str, str] | None = None
    """Status, code and message of every answer, where there is to be none other."""
    raw: bytes | None = None
    """Whole answer instead."""
    port: int = field(default_factory=free_port)
    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name, as registered last."""
    events: list[tuple[str, str]] = field(default_factory=list)
    """Each change: what, and of which state: `put ready`, `delete`."""
    puts: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0
    heads: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def __aenter__(self) -> StandIn:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """On the port that it had before, if it had one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections and drop the open ones."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._open):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    @property
    def connections(self) -> int:
        """Those that are open."""
        return len(self._open)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def state(self, name: str) -> str | None:
        """None: not registered."""
        member = self.members.get(name)
        return None if member is None else str(member.get("state", "ready"))

    async def until(self, true: Callable[[], object]) -> None:
        """Wait for it, looking after each question."""
        async with asyncio.timeout(PATIENCE_S):
            while not true():
                self._changed.clear()
                await self._changed.wait()

    async def asked_again(self, times: int = 2) -> None:
        """Until it has been asked so often from now on."""
        wanted = self.asked + times
        await self.until(lambda: self.asked >= wanted)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = head.lower().split("\r\n")
                size = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
                body = await reader.readexactly(size)
                self.heads.append(head)
                status, answer = self._answer(head, body)
                text = json.dumps(answer).encode()
                writer.write(self.raw or b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(text), text))
                await writer.drain()
                self.asked += 1
                self._changed.set()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()
            self._changed.set()

    def _answer(self, head: str, body: bytes) -> tuple[int, Any]:
        method, path, _ = head.split(" ", 2)
        if self.refusal is not None:
            status, code, message = self.refusal
            return status, {"error": {"code": code, "message": message}}
        if f"authorization: bearer {self.token}".lower() not in head.lower():
            return 401, {"error": {"code": "unauthorized", "message": "This token is not known."}}
        name = path.rsplit("/", 1)[1]
        if path.startswith("/admin/agents/"):
            self.reports.append(json.loads(body))
            return 200, {"renew_in_s": 2.0, "pools": {"pool": {"count": 3, "leave": ["a"], "roll": 1}}}
        if method == "DELETE":
            self.events.append(("delete", name))
            return 200, {"removed": self.members.pop(name, None) is not None}
        member = json.loads(body)
        state = member.get("state", "ready")
        if self.state(name) != state:
            self.events.append((f"put {state}", name))
        self.members[name] = member
        self.puts.append(member)
        return 200, {
            "ttl_s": self.ttl_s,
            "renew_in_s": self.renew_in_s,
            "state": state,
            "in_flight": self.in_flight,
            "empty": self.in_flight == 0,
            "draining": state == "draining",
        }
