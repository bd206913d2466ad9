"""Messages that others publish, over a connection of redis-py's that is opened again whenever it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway.store.redis.connect import ORDINARY, Connector, reason_of
from gateway.store.redis.ending import end

if TYPE_CHECKING:
    from redis.asyncio.client import PubSub

logger = logging.getLogger(__name__)

CONNECT_S = 1.0
"""For each step of connecting, and for each write."""
CONFIRM_S = 1.0
PING_S = 3.0
"""A connection on which nothing has come for two of these is taken for dead."""
FIRST_DELAY_S = 0.05
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
        """What is wanted. The task makes Redis' side agree: it alone writes to the connection."""
        self._confirmed: dict[bytes, asyncio.Event] = {}
        self._changed = asyncio.Event()
        """There is something for the task to do."""
        self._heard_at = 0.0
        self._warned = False
        self._task: asyncio.Task[None] | None = None

    async def subscribe(self, channel: str, on_message: OnMessage) -> Callable[[], None]:
        """See `RedisClient.subscribe`."""
        name = channel.encode()
        self._channels.setdefault(name, []).append(on_message)
        confirmed = self._confirmed.setdefault(name, asyncio.Event())
        self._changed.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONFIRM_S):
                await confirmed.wait()
        return lambda: self._unsubscribe(name, on_message)

    async def aclose(self) -> None:
        if self._task is not None:
            await end((self._task,))
            self._task = None

    def _unsubscribe(self, name: bytes, on_message: OnMessage) -> None:
        listeners = self._channels.get(name, [])
        if on_message not in listeners:
            return
        listeners.remove(on_message)
        if not listeners:
            del self._channels[name]
            self._changed.set()

    async def _keep(self) -> None:
        """Listen over one connection after the other, for ever."""
        delay_s = 0.0
        while True:
            began_at = time.monotonic()
            try:
                async with await self._connector.listening(CONNECT_S) as client, client.pubsub() as pubsub:
                    await pubsub.connect()
                    await self._listen(pubsub)
            except Exception as error:
                self._lost(error)
            if time.monotonic() - began_at > CONNECT_S + LONGEST_DELAY_S:
                delay_s = 0.0
            delay_s = min(max(delay_s * 2, FIRST_DELAY_S), LONGEST_DELAY_S)
            await asyncio.sleep(delay_s * self._rng.uniform(0.8, 1.2))

    def _lost(self, error: Exception) -> None:
        """The client tells of a Redis that is away. What is only wrong here, such as a missing right, is told once."""
        ordinary = isinstance(error, (*ORDINARY, *self._connector.away))
        level = logging.DEBUG if ordinary or self._warned else logging.WARNING
        self._warned |= not ordinary
        logger.log(level, "no messages of the store at %s: %s", self.address.shown, reason_of(error))

    async def _listen(self, pubsub: PubSub) -> None:
        """Until the connection is lost, or nothing has come for too long: raises why."""
        reading = asyncio.create_task(self._read(pubsub))
        reading.add_done_callback(lambda _: self._changed.set())
        asked: set[bytes] = set()
        self._heard_at = time.monotonic()
        ping_at = self._heard_at + PING_S
        try:
            while True:
                self._changed.clear()
                if reading.done():
                    reading.result()
                await self._agree(pubsub, asked)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ping_at - time.monotonic()):
                        await self._changed.wait()
                if (now := time.monotonic()) >= ping_at:
                    if now - self._heard_at > 2 * PING_S:
                        raise TimeoutError
                    await pubsub.ping()
                    ping_at = now + PING_S
        finally:
            await end((reading,))
            for confirmed in self._confirmed.values():
                confirmed.clear()

    async def _agree(self, pubsub: PubSub, asked: set[bytes]) -> None:
        """Subscribe to what is wanted and has not been asked for yet, and give up what is not wanted any more."""
        wanted = set(self._channels)
        if new := wanted - asked:
            asked |= new
            await pubsub.subscribe(*new)
        if old := asked - wanted:
            asked -= old
            for name in old:
                self._confirmed.pop(name, None)
            await pubsub.unsubscribe(*old)

    async def _read(self, pubsub: PubSub) -> None:
        while True:
            message = await pubsub.get_message(timeout=None)
            self._heard_at = time.monotonic()
            if message is not None:
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        channel = message["channel"]
        if message["type"] == "message":
            for on_message in tuple(self._channels.get(channel, ())):
                try:
                    on_message(message["data"])
                except Exception:
                    logger.exception("a message of the store could not be dealt with")
        elif message["type"] == "subscribe" and channel in self._confirmed:
            self._confirmed[channel].set()
