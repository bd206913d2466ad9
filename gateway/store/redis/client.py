"""Scripts on one Redis, for a process that must never wait long for it.

What concurrent callers ask in one turn of the event loop goes out as one write. Every call ends within `timeout_s`,
nothing is tried twice, and after a few failures a breaker answers at once until a probe has run a real script.
`docs/adr/0008-redis-client.md` has the figures that led to this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

from gateway.store.protocol import StoreUnavailable
from gateway.store.redis.address import Address
from gateway.store.redis.breaker import Breaker
from gateway.store.redis.connect import ORDINARY, Connector, Credentials, reason_of
from gateway.store.redis.ending import end
from gateway.store.redis.link import MAX_PENDING, Argument, Call, Link, Owner
from gateway.store.redis.listener import Listener
from gateway.store.redis.scripts import Script, load

logger = logging.getLogger(__name__)

TIMEOUT_S = 0.05
CONNECT_S = 1.0
"""For a connection with everything that belongs to it."""
FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 1.0
"""Between attempts to connect."""
PROBE_S = (1.2, 1.6)
"""Between two probes, drawn anew each time: gateways do not come in step. With `TIMEOUT_S` it stays below 2 s."""


class RedisClient:
    """One per process; belongs to the event loop of its first use. Keeps `connections` connections open.

    All calls go over one of them as long as it works, which keeps their order; the others stand by, so that the loss
    of one costs only the calls that were on their way. `subscribe` adds one, and `open_apart` one each. Ends with
    `aclose`.
    """

    def __init__(
        self,
        address: Address,
        *,
        timeout_s: float = TIMEOUT_S,
        connections: int = 2,
        prefix: str = "tidegate",
        username: str = "",
        password: str = "",
        sentinel_password: str = "",
        tls: ssl.SSLContext | None = None,
        on_change: Callable[[bool], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.address = address
        self.prefix = prefix
        """What the names of all keys begin with."""
        self.on_change = on_change
        """Told whether Redis is available, whenever that changes."""
        self._timeout_s = timeout_s
        self._connections = connections
        self._connector = Connector(address, Credentials(username, password, sentinel_password, tls))
        self._rng = rng or random.Random()
        self._breaker = Breaker()
        self._probe_script = load("probe")
        self._probe_at = 0.0
        self._since = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.epoch = 0
        """Counts how often there was a connection again after all had been lost: another Redis may be at its end."""
        self._was_linked = False
        self._links: list[Link] = []
        """Those that may be used; the first one is."""
        self._linked = asyncio.Event()
        self._hurry = asyncio.Event()
        """Set: connect now, whatever the delay."""
        self._batch: list[Call] = []
        self._waiting: list[tuple[float, list[Call]]] = []
        """Batches that no connection could take yet, and when each of them is overdue."""
        self._trouble = ""
        """Why the last attempt to connect failed."""
        self._listener: Listener | None = None
        self._closed = False

    def __repr__(self) -> str:
        pending = sum(link.pending for link in self._links)
        return f"<RedisClient {self.address.shown} available={self.available} pending={pending}>"

    @property
    def available(self) -> bool:
        """False while calls fail at once."""
        return not self._breaker.open and not self._closed

    def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> asyncio.Future[Any]:
        """What the script answers: integers, bytes, None and lists of them.

        Fails with `StoreUnavailable` (whether it ran is unknown), or `StoreError` when the script was refused.
        Cancelling the future ends the waiting, not the call. Calls are carried out in the order in which they are
        made, except when Redis was told to forget its scripts (`SCRIPT FLUSH`, a failover): a call that meets with
        that is sent again, with the text, and one made before its answer may overtake it.
        """
        loop = self._loop or self._begin()
        future: asyncio.Future[Any] = loop.create_future()
        if self._breaker.open or self._closed:
            future.set_exception(self._unavailable())
            return future
        if not self._batch:
            loop.call_soon(self._flush)
        self._batch.append((future, script, keys, args))
        return future

    async def connect(self, within_s: float = 5.0) -> None:
        """Wait until Redis can be asked, so that the first calls need not fail. Raises `StoreUnavailable`."""
        if self._loop is None:
            self._begin()
        try:
            async with asyncio.timeout(within_s):
                await self._linked.wait()
        except TimeoutError:
            raise self._unavailable(self._trouble or "no answer in time") from None
        if self._closed:
            raise self._unavailable()

    async def subscribe(self, channel: str, on_message: Callable[[bytes], None]) -> Callable[[], None]:
        """Have every message of `channel` told, until the returned function is called.

        Over a connection of its own, which is opened again whenever it is lost; what is published meanwhile is
        missed. Returns when Redis has confirmed, or after a second without that.
        """
        if self._listener is None:
            self._listener = Listener(self._connector, self._rng)
        return await self._listener.subscribe(channel, on_message)

    async def open_apart(self, owner: Owner) -> Link:
        """A connection that is nobody else's, for plain commands that may take their time. The caller closes it.

        Raises `StoreUnavailable`.
        """
        if self._closed:
            raise self._unavailable()
        try:
            async with asyncio.timeout(CONNECT_S):
                return await self._connector.connect(owner, self._timeout_s)
        except ORDINARY as error:
            raise StoreUnavailable(self.address.shown, reason_of(error)) from error

    async def aclose(self) -> None:
        """Close all connections. What waits for an answer, and every later call, fails."""
        self._closed = True
        await end(self._tasks)
        for link in tuple(self._links):
            link.close("it is closed")
        for _, calls in self._waiting:
            self._fail(calls, "it is closed")
        self._waiting.clear()
        self._fail(self._batch, "it is closed")
        self._batch = []
        self._linked.set()
        if self._listener is not None:
            await self._listener.aclose()

    # -- told by connections

    def answered(self, calls: int) -> None:
        self._breaker.succeeded(calls, time.monotonic())

    def failed(self, calls: int, reason: str) -> None:
        if not self._closed and self._breaker.failed(calls, time.monotonic()):
            self._away(reason)

    def lost(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)
        if not self._links and not self._closed:
            self._linked.clear()

    # -- batches

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        if self._links and not self._breaker.open:
            link = self._links[0]
            if link.pending + len(batch) > MAX_PENDING:
                self._fail(batch, "too many calls are waiting")
            else:
                link.send(batch)
        elif self._breaker.open or self._trouble:
            self._failed(batch, self._trouble or "it did not answer lately")
        else:
            assert self._loop is not None
            self._waiting.append((self._loop.time() + self._timeout_s, batch))
            if len(self._waiting) == 1:
                self._loop.call_later(self._timeout_s, self._give_up)

    def _give_up(self) -> None:
        """There is no connection yet: end the calls whose time is over."""
        assert self._loop is not None
        while self._waiting and self._waiting[0][0] <= self._loop.time():
            self._failed(self._waiting.pop(0)[1], self._trouble or "there is no connection yet")
        if self._waiting:
            self._loop.call_at(self._waiting[0][0], self._give_up)

    def _failed(self, calls: Sequence[Call], reason: str) -> None:
        self._fail(calls, reason)
        self.failed(len(calls), reason)

    def _fail(self, calls: Sequence[Call], reason: str) -> None:
        for call in calls:
            if not call[0].done():
                call[0].set_exception(self._unavailable(reason))

    def _unavailable(self, reason: str = "") -> StoreUnavailable:
        if self._closed:
            return StoreUnavailable(self.address.shown, "it is closed")
        left_s = max(0.0, self._probe_at - time.monotonic()) if self._breaker.open else 0.0
        return StoreUnavailable(self.address.shown, reason or "it did not answer lately", left_s)

    # -- connections

    def _begin(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.get_running_loop()
        if not self._closed:
            for _ in range(self._connections):
                self._spawn(self._keep())
        return self._loop

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self) -> None:
        """Keep one connection open, for ever."""
        delay_s = 0.0
        while True:
            try:
                async with asyncio.timeout(CONNECT_S):
                    link = await self._connector.connect(self, self._timeout_s)
            except Exception as error:
                self._not_connected(reason_of(error))
                if not isinstance(error, ORDINARY):
                    logger.exception("connecting to the store at %s went wrong", self.address.shown)
            else:
                opened_at = time.monotonic()
                self._connected(link)
                try:
                    await asyncio.wait((link.closed,))
                finally:
                    link.close("it is closed")
                if time.monotonic() - opened_at > LONGEST_DELAY_S:
                    delay_s = 0.0
                    continue
            delay_s = min(max(delay_s * 2, FIRST_DELAY_S), LONGEST_DELAY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s * self._rng.uniform(0.8, 1.2)):
                    await self._hurry.wait()

    def _connected(self, link: Link) -> None:
        if not link.open:
            return
        self._trouble = ""
        if not self._links:
            self.epoch += self._was_linked
            self._was_linked = True
        self._links.append(link)
        self._linked.set()
        waiting, self._waiting = self._waiting, []
        for _, calls in waiting:
            link.send(calls)

    def _not_connected(self, reason: str) -> None:
        if self._links:
            return  # another one works
        if not self._trouble and not self._breaker.open:
            logger.warning("no connection to the store at %s: %s", self.address.shown, reason)
        self._trouble = reason
        waiting, self._waiting = self._waiting, []
        for _, calls in waiting:
            self._failed(calls, reason)

    # -- the breaker

    def _away(self, reason: str) -> None:
        self._since = time.monotonic()
        logger.warning("the store at %s is unavailable: %s", self.address.shown, reason)
        self._spawn(self._probe())
        self._tell(False)

    def _back(self) -> None:
        self._breaker.close()
        away_s = time.monotonic() - self._since
        logger.warning("the store at %s is available again after %.1f s", self.address.shown, away_s)
        self._tell(True)

    def _tell(self, available: bool) -> None:
        """In a turn of its own: what goes wrong there is not the connection's business."""
        if self.on_change is not None:
            asyncio.get_running_loop().call_soon(self.on_change, available)

    async def _probe(self) -> None:
        """Run a script now and then until one succeeds. A success is only what Redis has answered to a write."""
        while True:
            await asyncio.sleep(max(0.0, self._probe_at - time.monotonic()))
            self._probe_at = time.monotonic() + self._rng.uniform(*PROBE_S)
            self._hurry.set()
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + PROBE_S[0]):
                    await self._linked.wait()
            if self._links and await self._answers(self._links[0]):
                self._back()
                return

    async def _answers(self, link: Link) -> bool:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        link.send([(future, self._probe_script, (f"{self.prefix}:{{probe}}",), ())])
        try:
            return bool(await future == 1)
        except Exception as error:  # of whatever kind: it has not worked
            logger.debug("the store at %s does not answer a probe: %s", self.address.shown, error)
            return False
