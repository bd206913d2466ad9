"""One line for each request with its outcome: the logger `tidegate.requests`.

A line has what the usage record has of who, where, how long and how much, and nothing of the request's or the answer's
text. The path of a request pays for putting its record into a queue; the thread that writes the log
(`gateway.log_writer`) makes the line of it. What is too much for that thread is counted and lost.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

import msgspec

from gateway.logs import LogStyle, painted
from gateway.record import Exchange, Outcome, ms

RequestLogMode = Literal["all", "errors"]

LOGGER = "tidegate.requests"
MAX_WAITING = 20_000
"""Settled requests whose lines are not made yet."""
BATCH = 50
"""Lines made at a time: about half a millisecond, after which the event loop may have the interpreter again."""

_QUIET = frozenset({Outcome.COMPLETED, Outcome.CLIENT_LEFT})
"""What is no error."""
_CLIENTS = frozenset({Outcome.COMPLETED, Outcome.CLIENT_LEFT, Outcome.REJECTED, Outcome.UPSTREAM_REJECTED})
_PLAIN = re.compile(r"[!#-~]+")


class RequestLine(msgspec.Struct, omit_defaults=True, gc=False):
    """The fields of a line, in their order. What is not known or does not apply is left out."""

    time: str
    level: str
    logger: str
    worker: int | None = None
    pid: int | None = None
    message: str = ""
    request_id: str = ""
    tenant: str = ""
    key_id: str = ""
    class_: str = msgspec.field(default="", name="class")
    route: str = ""
    model: str = ""
    fallback_from: str = ""
    stream: bool | None = None
    pool: str = ""
    replica: str = ""
    region: str | None = None
    route_reason: str = ""
    status: int | None = None
    outcome: str = ""
    error_code: str | None = None
    attempts: int | None = None
    failed_attempts: str = ""
    continuations: int | None = None
    hedged: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    usage_estimated: bool = False
    request_bytes: int | None = None
    response_bytes: int | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    duration_ms: float | None = None
    cost_usd: float | None = None
    trace_id: str = ""


class RequestLog:
    """One worker's. `record` is the loop's, `lines` the writing thread's."""

    def __init__(
        self,
        mode: RequestLogMode,
        style: LogStyle,
        *,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.mode = mode
        self.lost = 0
        """Requests that got no line because too many waited."""
        self._style = style
        self._worker = style.worker
        self._pid = os.getpid()
        self._max_waiting = max_waiting
        self._waiting: deque[Exchange] = deque()
        self._encode = msgspec.json.Encoder().encode

    def record(self, exchange: Exchange) -> None:
        """Have a line made of a settled request, if it is one that gets any. Never waits."""
        if self.mode == "errors" and exchange.outcome in _QUIET:
            return
        if len(self._waiting) >= self._max_waiting:
            self.lost += 1
        else:
            self._waiting.append(exchange)

    def lines(self) -> list[bytes]:
        """Lines of the first requests that wait, at most `BATCH`; empty: none does."""
        waiting = self._waiting
        make = self._json_line if self._style.json else self._text_line
        batch = [make(waiting.popleft()) for _ in range(min(len(waiting), BATCH))]
        if batch:
            time.sleep(0)  # the event loop may be waiting for the interpreter
        return batch

    def _json_line(self, exchange: Exchange) -> bytes:
        return self._encode(line_of(exchange, self._worker, self._pid)) + b"\n"

    def _text_line(self, exchange: Exchange) -> bytes:
        line = line_of(exchange)
        number = "" if self._worker is None else f"[{self._worker}]"
        head = f"{line.time} {line.level.upper()} {line.logger}{number}: {line.request_id} {line.message}"
        if self._style.colour:
            head = painted(head, line.level)
        shown = [
            f"{name}={value if type(value) is int else _shown(value)}"
            for name, attribute in _TEXT_FIELDS
            if (value := getattr(line, attribute)) is not None and value != "" and value is not False
        ]
        return f"{head} {' '.join(shown)}\n".encode()


def line_of(exchange: Exchange, worker: int | None = None, pid: int | None = None) -> RequestLine:
    """A settled request as its line says it. Its `message` is the outcome, with the status where there was one.

    By position: to pass so many arguments by name takes a dozen times as long.
    """
    used, outcome = exchange.usage, exchange.outcome or Outcome.INTERNAL
    status = exchange.status or None
    duration_s, ttft_s = exchange.duration_s, exchange.ttft_s
    failed = exchange.failures if exchange.attempts > 1 or outcome is not Outcome.COMPLETED else ()
    return RequestLine(
        _time(exchange.started_unix_s + duration_s),
        _level(outcome),
        LOGGER,
        worker,
        pid,
        outcome.value if status is None else f"{outcome.value} {status}",
        exchange.request_id,
        exchange.tenant,
        exchange.key_id,
        exchange.priority_class,
        exchange.route,
        exchange.model,
        exchange.fallback_from,
        exchange.stream,
        exchange.pool,
        exchange.replica,
        exchange.region,
        exchange.route_reason,
        status,
        outcome.value,
        exchange.error_code,
        exchange.attempts,
        "; ".join([f"{each.replica} {each.code}" for each in failed]) if failed else "",
        exchange.continuations or None,
        exchange.hedged,
        None if used is None else used.prompt_tokens,
        None if used is None else used.cached_tokens,
        None if used is None else used.completion_tokens,
        exchange.usage_estimated,
        exchange.request_bytes,
        exchange.response_bytes,
        ms(exchange.queue_s) if exchange.queue_s else None,
        None if ttft_s is None else ms(ttft_s),
        ms(duration_s),
        exchange.cost_usd,
        "" if exchange.traced is None else f"{exchange.traced.trace_id:032x}",
    )


def _level(outcome: Outcome) -> str:
    if outcome is Outcome.INTERNAL:
        return "error"
    return "info" if outcome in _CLIENTS else "warning"


def _time(unix_s: float) -> str:
    ms = int(unix_s * 1000)
    return f"{_second(ms // 1000)}.{ms % 1000:03}Z"


@lru_cache(maxsize=64)
def _second(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()[:19]


_TEXT_FIELDS = tuple(
    (name, attribute)
    for name, attribute in zip(RequestLine.__struct_encode_fields__, RequestLine.__struct_fields__, strict=True)
    if name not in ("time", "level", "logger", "worker", "pid", "message", "request_id", "status", "outcome")
)


def _shown(value: Any) -> str:
    """A value of a text line: quoted where it has spaces, quotes or anything that is not plain ASCII."""
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 0.001 else f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else msgspec.json.encode(text).decode()
