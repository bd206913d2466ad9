"""Live topics: computed once for all who look, and not at all when nobody does.

Each topic has one task while somebody has subscribed to it. What it makes is kept for each viewer in one place per
topic: who reads slowly gets the newest, and never more than one behind. Data that is equal to the last is not sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.errors import GatewayError
from gateway.record import Outcome

logger = logging.getLogger(__name__)

MAX_STREAMS = 32
"""At once, of all operators: the admin listener takes no more than some hundred connections."""
KEEP_ALIVE_S = 15.0
"""A comment after so much silence: proxies close what is silent for a minute, and a viewer that is gone is noticed."""
RETRY_MS = 2000
"""How long a browser waits before it connects again."""

Produce = Callable[[], Awaitable[dict[str, Any]]]


class TooManyStreams(GatewayError):
    """More pages look than the listener can hold."""

    status = 429
    code = "too_many_streams"
    type = "rate_limit_error"
    outcome = Outcome.REJECTED


@dataclass(slots=True, eq=False)
class Viewer:
    """One stream of events."""

    topics: tuple[str, ...]
    fresh: dict[str, bytes] = field(default_factory=dict)
    """What is to be sent, by topic."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    def put(self, topic: str, data: bytes) -> None:
        """Have it sent in the place of what was not yet."""
        self.fresh[topic] = data
        self.wake.set()

    def end(self) -> None:
        """Nothing more is sent to it."""
        self.ended = True
        self.wake.set()


class _Topic:
    __slots__ = ("last", "name", "period_s", "produce", "task", "viewers")

    def __init__(self, name: str, period_s: float, produce: Produce) -> None:
        self.name = name
        self.period_s = period_s
        self.produce = produce
        self.viewers: set[Viewer] = set()
        self.task: asyncio.Task[None] | None = None
        self.last = b""


class Hub:
    """Belongs to the event loop of the process that answers operators."""

    def __init__(self, *, max_streams: int = MAX_STREAMS, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._max_streams = max_streams
        self._keep_alive_s = keep_alive_s
        self._topics: dict[str, _Topic] = {}
        self._viewers: set[Viewer] = set()
        self._closed = False

    def topic(self, name: str, period_s: float, produce: Produce) -> None:
        """Have `produce` run every `period_s` while somebody looks at `name`; once for all of them."""
        self._topics[name] = _Topic(name, period_s, produce)

    @property
    def topics(self) -> list[str]:
        """What can be subscribed to."""
        return list(self._topics)

    @property
    def streams(self) -> int:
        """Viewers at the moment."""
        return len(self._viewers)

    def watched(self, name: str) -> bool:
        """Whether anybody looks at it."""
        return bool(self._topics[name].viewers)

    def close(self) -> None:
        """End every stream now; there will be none any more."""
        self._closed = True
        for viewer in list(self._viewers):
            viewer.end()

    async def aclose(self) -> None:
        """The same, and wait for what is being computed."""
        self.close()
        tasks = [topic.task for topic in self._topics.values() if topic.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def join(self, topics: Sequence[str]) -> Viewer:
        """A new viewer of these topics, which exist. `leave` must follow. Raises `TooManyStreams`."""
        if len(self._viewers) >= self._max_streams:
            raise TooManyStreams(
                f"There are {self._max_streams} streams of events already. Close some pages.", retry_after_s=10.0
            )
        viewer = Viewer(tuple(dict.fromkeys(topics)))
        self._viewers.add(viewer)
        if self._closed:
            viewer.end()
            return viewer
        for name in viewer.topics:
            topic = self._topics[name]
            topic.viewers.add(viewer)
            if topic.task is None or topic.task.done():
                topic.last = b""
                topic.task = asyncio.get_running_loop().create_task(self._run(topic), name=f"topic {name}")
            elif topic.last:
                viewer.put(name, topic.last)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """It is gone. The last one of a topic ends its task."""
        self._viewers.discard(viewer)
        for name in viewer.topics:
            topic = self._topics[name]
            topic.viewers.discard(viewer)
            if not topic.viewers and topic.task is not None:
                topic.task.cancel()
                topic.task = None

    async def events(self, viewer: Viewer) -> AsyncIterator[bytes]:
        """The stream's bytes, until the viewer is ended; `leave` is its caller's to call."""
        yield b"retry: %d\n\n" % RETRY_MS
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._keep_alive_s):
                    await viewer.wake.wait()
            viewer.wake.clear()
            if viewer.ended:
                return
            fresh, viewer.fresh = viewer.fresh, {}
            if not fresh:
                yield b":\n\n"
                continue
            yield b"".join(b"event: %b\ndata: %b\n\n" % (name.encode(), data) for name, data in fresh.items())

    async def _run(self, topic: _Topic) -> None:
        """Compute it again and again, while somebody looks."""
        loop = asyncio.get_running_loop()
        failing = False
        while topic.viewers:
            due = loop.time() + topic.period_s
            try:
                data = msgspec.json.encode(await topic.produce())
                failing = False
            except Exception:
                if not failing:
                    logger.exception("the live topic %s failed", topic.name)
                failing = True
            else:
                if data != topic.last:
                    topic.last = data
                    for viewer in topic.viewers:
                        viewer.put(topic.name, data)
            await asyncio.sleep(max(topic.period_s / 10, due - loop.time()))
