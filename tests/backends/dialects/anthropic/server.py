"""A small Anthropic: checks requests by the SDK's types, and answers with what its event models allow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tests.backends.dialects.anthropic.schema import request_types
from tests.backends.dialects.anthropic.talking import sse, streamed

KEY = "sk-ant-secret"
VERSIONS = ("2023-06-01",)
REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


@dataclass
class FakeAnthropic:
    """What it is to answer, and what it was asked."""

    types: dict[bool, TypeAdapter[Any]]
    url: str = ""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """The next message, whole or streamed as the request says."""
    events: bytes | None = None
    """Instead: this stream."""
    status: int = 200
    """Anything else is an error with `answer` as its body."""
    paths: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def reply(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        self.paths.append(path)
        if headers.get("x-api-key") != KEY or headers.get("anthropic-version") not in VERSIONS:
            return error(401, "authentication_error", "invalid x-api-key")
        if method == "GET":
            return self._models(path)
        if path != "/v1/messages":
            return error(404, "not_found_error", "Not found")
        request = json.loads(body)
        self.requests.append(request)
        try:
            self.types[request.get("stream", False)].validate_python(request)
        except ValidationError as problem:
            return error(400, "invalid_request_error", str(problem))
        if self.status != 200:
            return self.status, "application/json", json.dumps(self.answer).encode()
        if request.get("stream"):
            made = sse(streamed(self.answer, [3, 7])) if self.events is None else self.events
            return 200, "text/event-stream; charset=utf-8", made
        return 200, "application/json", json.dumps(self.answer).encode()

    def _models(self, path: str) -> tuple[int, str, bytes]:
        one = {
            "type": "model",
            "id": "claude-sonnet-5-5",
            "display_name": "Sonnet",
            "created_at": "2026-09-01T00:00:00Z",
        }
        if path == "/v1/models/claude-sonnet-5-5":
            return 200, "application/json", json.dumps(one).encode()
        if path.partition("?")[0] == "/v1/models":
            return 200, "application/json", json.dumps({"data": [one], "has_more": False}).encode()
        return error(404, "not_found_error", "model: unknown")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection. Streams are sent in pieces of odd sizes."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                status, kind, answer = self.reply(method, path, headers, body)
                start = f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\ncontent-type: {kind}\r\n"
                writer.write(f"{start}content-length: {len(answer)}\r\n\r\n".encode())
                for place in range(0, len(answer), 61):
                    writer.write(answer[place : place + 61])
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def error(status: int, kind: str, said: str) -> tuple[int, str, bytes]:
    """An error in Anthropic's form (https://platform.claude.com/docs/en/api/errors, read on 2026-11-22)."""
    return status, "application/json", json.dumps(error_body(kind, said)).encode()


def error_body(kind: str, said: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": said}, "request_id": "req_1"}


@asynccontextmanager
async def fake_anthropic(answer: Mapping[str, Any] | None = None) -> AsyncIterator[FakeAnthropic]:
    """Serve on a loopback port until the block ends."""
    fake = FakeAnthropic(request_types(), answer=answer or {})
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    fake.url = f"http://{host}:{port}"
    try:
        yield fake
    finally:
        server.close()
