"""The usage record: one entry per exchange, the newest kept in memory, all of them appended to a file if one is named.

Appending happens in batches from a background loop, off the request path. Lines wait in memory for at most half a
second; a file that cannot be written (disk full, permissions) is reported once, and lines beyond the bound are counted
as lost instead of filling the memory.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from gateway.record import Exchange, ms

logger = logging.getLogger(__name__)

KEPT_IN_MEMORY = 1000
MAX_WAITING = 100_000
FLUSH_EVERY_S = 0.5


class Ledger:
    """Keeps what every exchange used. `record` is synchronous and never blocks."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lost = 0
        """Records that could not be written."""
        self.recent: deque[Exchange] = deque(maxlen=KEPT_IN_MEMORY)
        self._waiting: deque[Exchange] = deque()
        self._failing = False
        self._encode = msgspec.json.Encoder().encode
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def record(self, exchange: Exchange) -> None:
        self.recent.append(exchange)
        if self.path is None:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.lost += 1
        else:
            self._waiting.append(exchange)

    def start(self) -> None:
        """Begin writing; needs a running event loop. Raises `OSError` when the file cannot be opened at all."""
        if self.path is not None:
            with self.path.open("ab"):
                pass
            self._task = asyncio.get_running_loop().create_task(self._run(), name="ledger")

    async def aclose(self) -> None:
        """Write what is waiting and stop; what cannot be written now is lost."""
        self._closing.set()
        if self._task is not None:
            # Not cancelled: a write under way would go on in its thread, beside the last one below.
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._flush)
        if self._waiting:
            self.lost += len(self._waiting)
            logger.error("usage log %s: %d records were lost", self.path, len(self._waiting))
            self._waiting.clear()

    async def _run(self) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), FLUSH_EVERY_S)
            if self._waiting:
                await asyncio.to_thread(self._flush)

    def _flush(self) -> None:
        if self.path is None or not self._waiting:
            return
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        try:
            data = b"".join([self._encode(record_of(each)) + b"\n" for each in batch])
            # Appended in one system call, so that the lines of several workers never mix.
            with self.path.open("ab", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._failing:
                logger.error("usage log %s cannot be written: %s; records are kept and tried again", self.path, error)
            self._failing = True
            self._waiting.extendleft(reversed(batch))
        else:
            self._failing = False


class Record(msgspec.Struct, gc=False):
    """The fields of a usage record, in their order: flat, times in milliseconds, no text of request or answer."""

    id: str
    time_unix_s: float
    tenant: str
    key_id: str
    class_: str = msgspec.field(name="class")
    route: str
    model: str
    fallback_from: str | None
    stream: bool
    pool: str
    replica: str
    region: str | None
    route_reason: str
    predicted_cached_tokens: int | None
    predicted_ttft_ms: float | None
    attempts: int
    failed_attempts: str | None
    continuations: int
    hedged: bool
    possible_duplicate: bool
    status: int
    outcome: str | None
    error_code: str | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    usage_estimated: bool
    content_events: int
    request_bytes: int
    response_bytes: int
    queue_ms: float
    ttft_ms: float | None
    replica_ttft_ms: float | None
    duration_ms: float
    cost_usd: float | None
    trace_id: str | None


def record_of(exchange: Exchange) -> Record:
    """The exchange as its record is written. By position: to pass so many by name takes a dozen times as long."""
    used, outcome, predicted_ms = exchange.usage, exchange.outcome, exchange.predicted_ttft_ms
    failed, ttft_s, replica_ttft_s = exchange.failures, exchange.ttft_s, exchange.replica_ttft_s
    return Record(
        exchange.request_id,
        round(exchange.started_unix_s, 3),
        exchange.tenant,
        exchange.key_id,
        exchange.priority_class,
        exchange.route,
        exchange.model,
        exchange.fallback_from or None,
        exchange.stream,
        exchange.pool,
        exchange.replica,
        exchange.region,
        exchange.route_reason,
        exchange.predicted_cached_tokens if exchange.replica else None,
        None if predicted_ms is None else round(predicted_ms, 3),
        exchange.attempts,
        "; ".join([f"{each.replica} {each.code}" for each in failed]) if failed else None,
        exchange.continuations,
        exchange.hedged,
        exchange.possible_duplicate,
        exchange.status,
        None if outcome is None else outcome.value,
        exchange.error_code,
        None if used is None else used.prompt_tokens,
        None if used is None else used.cached_tokens,
        None if used is None else used.completion_tokens,
        exchange.usage_estimated,
        exchange.content_events,
        exchange.request_bytes,
        exchange.response_bytes,
        ms(exchange.queue_s),
        None if ttft_s is None else ms(ttft_s),
        None if replica_ttft_s is None else ms(replica_ttft_s),
        ms(exchange.duration_s),
        exchange.cost_usd,
        None if exchange.traced is None else f"{exchange.traced.trace_id:032x}",
    )


def as_record(exchange: Exchange) -> dict[str, Any]:
    """The same by the names of its fields."""
    record: dict[str, Any] = msgspec.to_builtins(record_of(exchange))
    return record
