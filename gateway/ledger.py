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

from gateway.record import Exchange

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
            data = b"".join([msgspec.json.encode(as_record(each)) + b"\n" for each in batch])
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


def as_record(exchange: Exchange) -> dict[str, Any]:
    """The exchange as its record is written: flat, times in milliseconds, no text of the request or the answer."""
    used = exchange.usage
    return {
        "id": exchange.request_id,
        "time_unix_s": round(exchange.started_unix_s, 3),
        "tenant": exchange.tenant,
        "key_id": exchange.key_id,
        "class": exchange.priority_class,
        "route": exchange.route,
        "model": exchange.model,
        "fallback_from": exchange.fallback_from or None,
        "stream": exchange.stream,
        "pool": exchange.pool,
        "replica": exchange.replica,
        "region": exchange.region,
        "route_reason": exchange.route_reason,
        "predicted_cached_tokens": exchange.predicted_cached_tokens if exchange.replica else None,
        "predicted_ttft_ms": None if exchange.predicted_ttft_ms is None else round(exchange.predicted_ttft_ms, 3),
        "attempts": exchange.attempts,
        "failed_attempts": "; ".join(f"{each.replica} {each.code}" for each in exchange.failures) or None,
        "continuations": exchange.continuations,
        "hedged": exchange.hedged,
        "possible_duplicate": exchange.possible_duplicate,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "error_code": exchange.error_code,
        "prompt_tokens": None if used is None else used.prompt_tokens,
        "cached_tokens": None if used is None else used.cached_tokens,
        "completion_tokens": None if used is None else used.completion_tokens,
        "usage_estimated": exchange.usage_estimated,
        "content_events": exchange.content_events,
        "request_bytes": exchange.request_bytes,
        "response_bytes": exchange.response_bytes,
        "queue_ms": _ms(exchange.queue_s),
        "ttft_ms": _ms(exchange.ttft_s),
        "replica_ttft_ms": _ms(exchange.replica_ttft_s),
        "duration_ms": _ms(exchange.duration_s),
        "cost_usd": exchange.cost_usd,
        "trace_id": None if exchange.traced is None else f"{exchange.traced.trace_id:032x}",
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
