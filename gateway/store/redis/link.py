"""One connection to Redis: commands go out in batches, replies come back in the order of the commands.

A connection on which a reply is overdue is closed and never used again, so that no reply can reach the wrong caller.
What a caller no longer waits for is read and thrown away.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, cast

import hiredis

from gateway.store.protocol import StoreError, StoreUnavailable
from gateway.store.redis.address import Address
from gateway.store.redis.scripts import Script

Argument: TypeAlias = str | int | bytes
Call: TypeAlias = tuple["asyncio.Future[Any]", Script, Sequence[str], Sequence[Argument]]

MAX_PENDING = 20_000
"""Calls that wait for their replies on one connection. Redis needs a second for so many."""
GRACE_S = 0.002
"""How long an overdue reply is still looked for, for the case that it was this process that was late."""
_AWAY = re.compile(
    r"\b(READONLY|LOADING|OOM|MASTERDOWN|NOPERM|NOAUTH|WRONGPASS|MISCONF|NOREPLICAS|CLUSTERDOWN|BUSY|UNKILLABLE)\b"
)
"""Refusals that say something about Redis and nothing about the script. One that a script met with is somewhere in the
text: 6.2 begins it with `ERR Error running script`."""
_CLOSES = frozenset({"READONLY", "MASTERDOWN", "NOAUTH"})
"""Of these, what a new connection may cure: the primary is another one now, or the password was changed."""
_NOTHING = object()


class Refused(Exception):
    """An error reply."""


class Owner(Protocol):
    """Who is told how calls went."""

    address: Address

    def answered(self, calls: int) -> None:
        """So many calls got an answer."""

    def failed(self, calls: int, reason: str) -> None:
        """So many got none, or one that says that Redis does not work."""

    def lost(self, link: Link) -> None:
        """The connection is closed. Its calls have failed already."""


class Link(asyncio.Protocol):
    """A connection; `owner` is told of every call that `send` was given, once."""

    def __init__(self, owner: Owner, timeout_s: float) -> None:
        self._owner = owner
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(replyError=Refused, notEnoughData=_NOTHING)
        self._known: set[str] = set()
        """Scripts that Redis was given over this connection. It may have been told to forget them since."""
        self._pending: deque[tuple[Call | asyncio.Future[Any], bool]] = deque()
        """What replies are awaited for, and whether the call was sent with the script's text."""
        self._sent = 0
        self._received = 0
        self._batches: deque[tuple[int, float]] = deque()
        """Of each batch: how many were sent up to its end, and when their replies are overdue."""
        self._timer: asyncio.TimerHandle | None = None
        self._late = False
        self.open = True
        self.reason = ""
        """Why it was closed."""
        self.closed: asyncio.Future[None] = self._loop.create_future()

    @property
    def pending(self) -> int:
        return len(self._pending)

    def send(self, calls: Sequence[Call]) -> None:
        """One write for all of them."""
        if not self.open:
            for call in calls:
                self._fail(call, self.reason)
            self._owner.failed(len(calls), self.reason)
            return
        packed: list[bytes] = []
        known = self._known
        for call in calls:
            future, script, keys, args = call
            whole = script.sha not in known
            try:
                packed.append(_packed(script, keys, args, whole))
            except (TypeError, ValueError) as error:
                if not future.done():
                    future.set_exception(error)
                continue
            if whole:
                known.add(script.sha)
            self._pending.append((call, whole))
        if packed:
            self._write(packed)

    def ask(self, *words: Argument) -> asyncio.Future[Any]:
        """One plain command, outside the owner's count and without a time limit: the caller has one. Fails with
        `Refused` or `StoreUnavailable`."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if not self.open:
            self._fail(future, self.reason)
            return future
        self._pending.append((future, False))
        self._sent += 1
        self._put(hiredis.pack_command(words))  # type: ignore[arg-type]  # the stub means tuple[..., ...]
        return future

    def close(self, reason: str) -> None:
        """At once. Whoever waits for a reply learns that there will be none."""
        if not self.open:
            return
        self.open = False
        self.reason = reason
        if not self.closed.done():
            self.closed.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        calls = 0
        for waiting, _ in self._pending:
            calls += not isinstance(waiting, asyncio.Future)
            self._fail(waiting, reason)
        self._pending.clear()
        self._batches.clear()
        if calls:
            self._owner.failed(calls, reason)
        self._owner.lost(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(f"the connection was lost{f': {exc}' if exc else ''}")

    def data_received(self, data: bytes) -> None:
        if not self.open:
            return
        try:
            self._read(data)
        except hiredis.ProtocolError as error:
            self.close(f"it said something that is not Redis' protocol: {error}")

    def _read(self, data: bytes) -> None:
        reader, pending = self._reader, self._pending
        reader.feed(data)
        gets = reader.gets
        received = good = 0
        again: list[Call] = []
        while (reply := gets()) is not _NOTHING:
            if not pending:
                # a Redis without a free place for a client says so unasked
                self.close(str(reply) if isinstance(reply, Refused) else "it answered what nobody had asked")
                return
            waiting, whole = pending.popleft()
            received += 1
            if isinstance(waiting, asyncio.Future):
                _resolve(waiting, reply)
            elif type(reply) is not Refused:
                good += 1
                future = waiting[0]
                if not future.done():
                    future.set_result(reply)
            elif not whole and str(reply).startswith("NOSCRIPT"):
                again.append(waiting)
            elif self._refused(waiting, str(reply)):
                good += 1
            if not self.open:  # closed by a refusal, or by whoever was told
                break
        self._received += received
        if self._late and received:
            self._late = False
        if good:
            self._owner.answered(good)
        if again and self.open:
            self._known.clear()
            self.send(again)
        elif again:
            for call in again:
                self._fail(call, self.reason)
            self._owner.failed(len(again), self.reason)

    def _refused(self, call: Call, text: str) -> bool:
        """Whether Redis itself is well, and it was the script or its arguments that were wrong."""
        future, script = call[0], call[1]
        if (found := _AWAY.search(text)) is None:
            if not future.done():
                future.set_exception(StoreError(f"the script {script.name} was refused: {text}"))
            return True
        self._fail(call, text)
        self._owner.failed(1, text)
        if found.group() in _CLOSES:
            self.close(text)
        return False

    def _write(self, packed: list[bytes]) -> None:
        self._sent += len(packed)
        self._batches.append((self._sent, time.monotonic() + self._timeout_s))
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._look)
        self._put(packed[0] if len(packed) == 1 else b"".join(packed))

    def _put(self, data: bytes) -> None:
        if self._transport is None or not self.open:
            return
        try:
            self._transport.write(data)
        except RuntimeError:  # uvloop's, when an earlier write has met with a connection that is gone
            self.close("the connection was lost")

    def _look(self) -> None:
        """Is the oldest batch overdue? One timer for a connection, which runs only while replies are awaited."""
        self._timer = None
        batches = self._batches
        while batches and batches[0][0] <= self._received:
            batches.popleft()
        if not batches:
            self._late = False
            return
        left_s = batches[0][1] - time.monotonic()
        if left_s <= 0 and self._late:
            self.close("no answer in time")
            return
        self._late = left_s <= 0
        self._timer = self._loop.call_later(GRACE_S if self._late else left_s, self._look)

    def _fail(self, waiting: Call | asyncio.Future[Any], reason: str) -> None:
        future = waiting if isinstance(waiting, asyncio.Future) else waiting[0]
        if not future.done():
            future.set_exception(StoreUnavailable(self._owner.address.shown, reason))


def _packed(script: Script, keys: Sequence[str], args: Sequence[Argument], whole: bool) -> bytes:
    command = (b"EVAL", script.text) if whole else (b"EVALSHA", script.sha)
    packed: bytes = hiredis.pack_command((*command, len(keys), *keys, *args))  # type: ignore[arg-type]
    return packed


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return
    if isinstance(reply, Refused):
        future.set_exception(reply)
    else:
        future.set_result(reply)


async def open_link(owner: Owner, timeout_s: float, host: str, port: int, tls: ssl.SSLContext | None) -> Link:
    """A TCP connection without any handshake of Redis'. Raises `OSError`."""
    loop = asyncio.get_running_loop()
    _, link = await loop.create_connection(lambda: Link(owner, timeout_s), host, port, ssl=tls)
    return link


async def open_unix_link(owner: Owner, timeout_s: float, path: str) -> Link:
    """The same over a Unix socket."""
    _, link = await asyncio.get_running_loop().create_unix_connection(lambda: Link(owner, timeout_s), path)
    return link
