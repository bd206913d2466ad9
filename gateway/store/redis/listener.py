"""Messages that others publish, over a connection of its own that is opened again whenever it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from gateway.store.redis.connect import Connector, reason_of
from gateway.store.redis.link import Link

logger = logging.getLogger(__name__)

CONNECT_S = 1.0
CONFIRM_S = 1.0
PING_S = 2.0
"""A connection on which nothing has come for two of these is taken for dead."""
LONGEST_DELAY_S = 1.0

OnMessage = Callable[[bytes], None]


class Listener:
    """Subscriptions to channels. Belongs to one event loop; ends with `aclose`.

    Messages are wake-up calls here, never the only way in which something is learned: what is published while there is
    no connection is lost.
    """

    def __init__(self, connector: Connector, rng: random.Random) -> None:
        self.address = connector.address
        self._connector = connector
        self._rng = rng
        self._channels: dict[bytes, list[OnMessage]] = {}
        self._confirmed: dict[bytes, asyncio.Event] = {}
        self._link: Link | None = None
        self._heard_at = 0.0
        self._task: asyncio.Task[None] | None = None

    async def subscribe(self, channel: str, on_message: OnMessage) -> Callable[[], None]:
        """See `RedisClient.subscribe`."""
        name = channel.encode()
        listeners = self._channels.setdefault(name, [])
        listeners.append(on_message)
        if len(listeners) == 1:
            self._confirmed[name] = asyncio.Event()
            if self._link is not None:
                self._link.tell("SUBSCRIBE", name)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONFIRM_S):
                await self._confirmed[name].wait()
        return lambda: self._unsubscribe(name, on_message)

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # -- told by the connection, which carries no counted calls

    def answered(self, calls: int) -> None: ...

    def failed(self, calls: int, reason: str) -> None: ...

    def lost(self, link: Link) -> None: ...

    def _unsubscribe(self, name: bytes, on_message: OnMessage) -> None:
        listeners = self._channels.get(name, [])
        if on_message not in listeners:
            return
        listeners.remove(on_message)
        if not listeners:
            del self._channels[name], self._confirmed[name]
            if self._link is not None:
                self._link.tell("UNSUBSCRIBE", name)

    async def _keep(self) -> None:
        delay_s = 0.0
        while True:
            try:
                async with asyncio.timeout(CONNECT_S):
                    link = await self._connector.connect(self, CONNECT_S)
            except Exception as error:  # of whatever kind: the client tells of those that are not ordinary
                logger.debug("no connection for messages to the store at %s: %s", self.address.shown, reason_of(error))
                delay_s = min(max(delay_s * 2, 0.05), LONGEST_DELAY_S)
            else:
                delay_s = 0.05
                await self._listen(link)
            await asyncio.sleep(delay_s * self._rng.uniform(0.8, 1.2))

    async def _listen(self, link: Link) -> None:
        """Until the connection is lost, or nothing has come for too long."""
        link.on_message = self._message
        self._heard_at = time.monotonic()
        self._link = link
        try:
            if self._channels:
                link.tell("SUBSCRIBE", *self._channels)
            while link.open:
                await asyncio.wait((link.closed,), timeout=PING_S)
                if time.monotonic() - self._heard_at > 2 * PING_S:
                    return
                if self._channels:
                    link.tell("PING")
                else:  # outside a subscription Redis would answer something else
                    self._heard_at = time.monotonic()
        finally:
            self._link = None
            for confirmed in self._confirmed.values():
                confirmed.clear()
            link.close("it is not listened to any more")

    def _message(self, message: Any) -> None:
        self._heard_at = time.monotonic()
        if not isinstance(message, list) or len(message) != 3:
            return  # the answer to a ping
        kind, channel, payload = message
        if kind == b"message":
            for on_message in tuple(self._channels.get(channel, ())):
                try:
                    on_message(payload)
                except Exception:
                    logger.exception("a message of the store could not be dealt with")
        elif kind == b"subscribe" and channel in self._confirmed:
            self._confirmed[channel].set()
