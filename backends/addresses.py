"""Where a host name leads: asked off the event loop, remembered for a while, and kept while no new answer comes.

`loop.getaddrinfo` would do for a name server that always answers. It asks before every connection, in a few threads
that all names share (libuv's four, or asyncio's default executor): one domain whose name server is slow holds up
everybody else's connections, and one that is away makes healthy servers unreachable. Here each host has at most one
question under way, in a thread of its own, and an old answer is better than none, as in Envoy's clusters:
https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/service_discovery

`getaddrinfo` does not say for how long an answer holds, so that `FRESH_S` stands in for the record's TTL.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Final

logger = logging.getLogger(__name__)

FRESH_S: Final = 30.0
"""An answer is not asked for again before this. What JDK 8 and later do where nothing else is configured."""
PATIENCE_S: Final = 0.5
"""How long one connection waits for a new answer when there is an old one."""
AGAIN_S: Final = 5.0
"""After a question that failed, the old answer holds for so long before the next one."""
DOUBT_S: Final = 1.0
"""An answer that led nowhere is asked for again after this, and not at once: a dead server has many callers."""
STAGGER_S: Final = 0.25
"""RFC 8305 §5: the next address is tried beside the one before, if that has not answered by then."""

RECEIVE_BUFFER_BYTES: Final = 131_072
"""Kernel buffer per connection, and so about the most that one read brings. Left to itself Linux lets a connection that
is not read, because its client is slow, hold 6 MB. Enough for 1.6 MB/s from another continent (80 ms)."""

Address = tuple[int, tuple[str, int]]
"""Family, and where in it: host (an IP address) and port."""
LookUp = Callable[[str, int], Sequence[Address]]
"""Blocks; raises `OSError` or `UnicodeError`."""


class Addresses:
    """The addresses of one host. Belongs to the event loop it is first asked in."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        look_up: LookUp | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`host`: a name or an IP address; for the latter nothing is ever asked."""
        self.host = host
        self.port = port
        self._look_up = look_up or resolved
        self._clock = clock
        self._known: Sequence[Address] = ()
        self._fixed = False
        self._asked_at = 0.0
        self._fresh_until = 0.0
        self._failing = False
        self._question: asyncio.Future[Sequence[Address] | Exception] | None = None
        self._late = False
        """Somebody has waited for the question under way in vain."""
        with contextlib.suppress(ValueError):
            family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
            self._known, self._fixed = ((family, (host, port)),), True

    async def get(self) -> Sequence[Address]:
        """At least one address, in the order in which to try them. Raises `OSError` or `UnicodeError`.

        Waits for as long as the name server takes only where nothing is known yet: let the caller set a limit. The
        question goes on when the caller gives up, for whoever comes next.
        """
        if self._fixed or (self._known and self._clock() < self._fresh_until):
            return self._known
        question = self._question or self._ask()
        if not self._known:
            answer = await asyncio.shield(question)
            if isinstance(answer, Exception):
                raise answer
            return answer
        if not self._late:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await asyncio.shield(question)
                return self._known  # the old answer, where the new one is an error
            if self._question is question:
                self._late = True
                self._note_failure(f"no answer within {PATIENCE_S:g} s")
        return self._known

    def doubt(self) -> None:
        """None of the addresses could be connected to: perhaps they are not its addresses any more."""
        if not self._fixed:
            self._fresh_until = min(self._fresh_until, self._asked_at + DOUBT_S)

    def _ask(self) -> asyncio.Future[Sequence[Address] | Exception]:
        loop = asyncio.get_running_loop()
        self._question = loop.create_future()
        self._asked_at = self._clock()
        self._late = False
        # Of its own, and a daemon: a name server that is silent holds up neither others' questions nor the exit.
        asking = threading.Thread(target=self._answer, args=(loop,), name=f"resolve {self.host}", daemon=True)
        question = self._question
        try:
            asking.start()
        except RuntimeError:  # no thread is to be had, which must not leave a question that nobody answers
            self._answered(OSError(errno.EAGAIN, "no thread can be started to resolve the name"))
        return question

    def _answer(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the thread."""
        answer: Sequence[Address] | Exception
        try:
            answer = self._look_up(self.host, self.port) or OSError("the name has no addresses")
        except (OSError, UnicodeError) as error:
            answer = error
        except Exception as error:
            answer = OSError(f"the look-up failed: {error!r}")
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._answered, answer)

    def _answered(self, answer: Sequence[Address] | Exception) -> None:
        question, self._question = self._question, None
        assert question is not None
        now = self._clock()
        if isinstance(answer, Exception):
            self._fresh_until = now + AGAIN_S
            self._note_failure(str(answer))
        else:
            self._known, self._fresh_until = answer, now + FRESH_S
            if self._failing:
                logger.info("%s resolves again", self.host)
            self._failing = False
        if not question.done():
            question.set_result(answer)

    def _note_failure(self, reason: str) -> None:
        """Said once, and only where it goes unnoticed otherwise: without an old answer the connection fails."""
        if self._known and not self._failing:
            logger.warning("%s does not resolve (%s): its last addresses are used on", self.host, reason)
            self._failing = True


def resolved(host: str, port: int) -> Sequence[Address]:
    """What the system's resolver says, families alternating (RFC 8305 §4). Blocks; raises `OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families: dict[int, list[Address]] = {}
    for family, _, _, _, address in found:
        if isinstance(address[0], str):
            families.setdefault(family, []).append((int(family), (address[0], port)))
    turns = zip_longest(*families.values())
    return [address for address in dict.fromkeys(chain.from_iterable(turns)) if address is not None]


async def connect_first(addresses: Sequence[Address], stagger_s: float = STAGGER_S) -> socket.socket:
    """A socket connected to the first address that accepts, tried in turn and side by side ("happy eyeballs").

    Raises the `OSError` of the last one that failed when all did.
    """
    if len(addresses) == 1:
        return await _connected(addresses[0])
    waiting = deque(addresses)
    under_way: set[asyncio.Task[socket.socket]] = set()
    last_error: OSError = OSError("no addresses")
    first: socket.socket | None = None
    try:
        while waiting or under_way:
            if waiting:
                under_way.add(asyncio.create_task(_connected(waiting.popleft())))
            done, _ = await asyncio.wait(
                under_way, timeout=stagger_s if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                try:
                    sock = task.result()
                except OSError as error:
                    last_error = error
                    under_way.discard(task)
                else:
                    under_way.discard(task)
                    first = sock
                    return sock
        raise last_error
    finally:
        for task in under_way:
            task.cancel()
        try:
            for late in await asyncio.gather(*under_way, return_exceptions=True):
                if isinstance(late, socket.socket):  # it came in the same turn as the winner
                    late.close()
        except asyncio.CancelledError:
            if first is not None:
                first.close()
            raise


async def _connected(address: Address) -> socket.socket:
    family, where = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)  # before the window is agreed on
        await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock
