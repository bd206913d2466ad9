"""One streamed chat over one connection, and what came of it: when, how much, from whose cache.

Each request has a connection of its own, so that none waits for another: arrivals stay open-loop.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

LIMIT_BYTES = 1 << 20


@dataclass(slots=True)
class Answer:
    """One request. Times in seconds since it was due; None where nothing came."""

    lag_s: float = 0.0
    """How much later it was sent: the load generator's own delay."""
    ttft_s: float | None = None
    total_s: float | None = None
    status: int | None = None
    error: str | None = None
    """What was wrong, low cardinality: `status 503`, `time-out`, `cut`; None for a whole answer."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    """By the engine's usage."""
    predicted_tokens: int | None = None
    """Cached tokens that the gateway expected; None where no gateway said."""
    replica: str = ""
    text: str = ""

    @property
    def per_token_s(self) -> float:
        """Time per token of the answer after the first; 0 where there was one only."""
        if self.ttft_s is None or self.total_s is None or self.output_tokens < 2:
            return 0.0
        return (self.total_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: the server and the path before `/v1`."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None
    headers: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Target:
        """`url` with or without `/v1` at its end. Raises `ValueError` when it is none of http or https."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is not a URL of http or https")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        path = parts.path.rstrip("/").removesuffix("/v1")
        host = parts.hostname
        port = parts.port or (443 if tls else 80)
        headers = [("host", parts.netloc.rpartition("@")[2]), ("content-type", "application/json")]
        headers += [("accept", "text/event-stream"), ("connection", "close")]
        if key:
            headers.append(("authorization", f"Bearer {key}"))
        return cls(host, port, path, tls, tuple(headers))

    def message(self, body: bytes) -> bytes:
        """The request's bytes."""
        lines = [f"POST {self.path}/v1/chat/completions HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (*self.headers, ("content-length", str(len(body))))]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass(slots=True)
class _Reader:
    """Reads one response; httptools calls it back."""

    answer: Answer
    due_at: float
    keep_text: bool
    complete: bool = False
    finished: bool = False
    """A finish_reason and `[DONE]` came."""
    finish_reason: str | None = None
    tail: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        answer = self.answer
        answer.replica = self.headers.get(b"x-tidegate-replica", b"").decode("latin-1")
        predicted = self.headers.get(b"x-tidegate-predicted-cached-tokens")
        answer.predicted_tokens = None if predicted is None else int(predicted)

    def on_body(self, data: bytes) -> None:
        *lines, self.tail = (self.tail + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())

    def on_message_complete(self) -> None:
        self.complete = True

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.finished = self.finish_reason is not None
            return
        event: dict[str, Any] = orjson.loads(data)
        if "error" in event:
            self.answer.error = "error in the stream"
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("reasoning_content") or ""
            if text or delta.get("tool_calls"):
                if self.answer.ttft_s is None:
                    self.answer.ttft_s = time.perf_counter() - self.due_at
                if self.keep_text:
                    self.answer.text += text
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        usage = event.get("usage")
        if usage:
            self.answer.prompt_tokens = usage.get("prompt_tokens") or 0
            self.answer.output_tokens = usage.get("completion_tokens") or 0
            self.answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def chat_body(model: str, messages: list[dict[str, str]], max_tokens: int, **fields: Any) -> bytes:
    """A streamed chat that asks for its usage."""
    body: Mapping[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return orjson.dumps(body)


async def ask(target: Target, body: bytes, due_at: float, limit_s: float, *, keep_text: bool = False) -> Answer:
    """Send one now and read the answer to its end. `due_at` is of `time.perf_counter()`. Raises nothing but bugs."""
    answer = Answer(lag_s=time.perf_counter() - due_at)
    reading = _Reader(answer, due_at, keep_text)
    try:
        async with asyncio.timeout(limit_s):
            await _exchange(target, target.message(body), reading)
    except TimeoutError:
        answer.error = "time-out"
    except OSError as error:
        answer.error = type(error).__name__
    except (httptools.HttpParserError, orjson.JSONDecodeError):
        answer.error = "not understood"
    if answer.error is None:
        if answer.status != HTTPStatus.OK:
            answer.error = "no answer" if answer.status is None else f"status {answer.status}"
        elif not reading.finished:
            answer.error = "cut"
        elif answer.ttft_s is None:
            answer.error = "empty"
        else:
            answer.total_s = time.perf_counter() - due_at
    return answer


async def _exchange(target: Target, message: bytes, reading: _Reader) -> None:
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=target.tls, limit=LIMIT_BYTES)
    try:
        writer.write(message)
        parser = httptools.HttpResponseParser(reading)
        while not reading.complete and (data := await reader.read(65_536)):
            parser.feed_data(data)
            reading.answer.status = parser.get_status_code()
    finally:
        writer.transport.abort()
