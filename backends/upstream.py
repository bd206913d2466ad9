"""One replica's client: its connections, and the bytes a request to it begins with.

The part of a request head that never changes is rendered once per path; per request only the id, the length and the
few allowed client headers are added. What a client sends as credentials, cookies or hop-by-hop headers never gets
here: the head is built from nothing, not filtered.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from collections.abc import Sequence
from typing import Any

from backends.dialects import Dialect
from backends.dialects.protocol import Adapter, EngineInfo, NotOffered
from backends.errors import UpstreamError
from backends.gpus import Gpu
from backends.http1 import Headers
from backends.origin import Origin
from backends.pool import ConnectionPool
from backends.side import SideChannel
from backends.signals import Signals
from backends.ticker import Ticker
from routing.credential import Credential, Credentials
from routing.pause import Pauses
from routing.types import Replica

logger = logging.getLogger(__name__)

_ABORT_TIMEOUT_S = 2.0
_SECRET_LENGTH = 12
"""No key is shorter, and few words of other headers are as long."""
_USER_AGENT = b"tidegate"
_FIXED = b"host: %b\r\nuser-agent: %b\r\naccept-encoding: identity\r\ncontent-type: application/json\r\n"


class Upstream:
    """A replica together with the means to reach it."""

    def __init__(
        self,
        replica: Replica,
        dialect: Dialect,
        *,
        origin: str,
        path_prefix: str = "",
        headers: Sequence[tuple[str, str]] = (),
        keys: Credentials | None = None,
        key_headers: Sequence[Sequence[tuple[str, str]]] = (),
        hosted: bool = False,
        max_connections: int,
        idle_s: float,
        connect_timeout_s: float,
        side_timeout_s: float = 5.0,
        ssl_context: ssl.SSLContext | None = None,
        ticker: Ticker,
    ) -> None:
        """`headers` go with every request, the credential among them.

        Where there are several `keys`, `key_headers` has the headers for each of them, in their order.
        """
        self.replica = replica
        self.dialect = dialect
        self.hosted = hosted
        self.model: str | None = None
        """The name it knows its model by; None leaves that to the model's route."""
        self.adapters: tuple[Adapter, ...] = ()
        """What the replica said it holds; empty until it was asked."""
        self.configured_adapters: tuple[Adapter, ...] = ()
        """Those of the configuration, for engines that list none and want to be told the path each time."""
        self.dropping: set[str] = set()
        """Adapters that are about to be unloaded: no request is sent for them, whatever is still said of them."""
        self.loadable: frozenset[str] = frozenset()
        """Adapters of the configuration that may be loaded when a request wants one, if the engine lets them be."""
        self.adapter_slots: int | None = None
        """What the configuration says of how many it holds at once; None leaves that to the engine."""
        self.info: EngineInfo | None = None
        """What it said it is; None until it was asked."""
        self.gpus: tuple[Gpu, ...] = ()
        """What it runs on, where an exporter that says so is configured."""
        self._learning: asyncio.Task[None] | None = None
        self.counts_work = False
        """Whether its load reports have counters of the work it does, so that silence need not mean that it hangs."""
        self.signals = Signals(replica.name)
        address = Origin.parse(origin)
        self.pool = ConnectionPool(
            address,
            max_connections=max_connections,
            idle_s=idle_s,
            connect_timeout_s=connect_timeout_s,
            ssl_context=ssl_context,
            ticker=ticker,
        )
        several = keys is not None and len(keys.keys) > 1
        self.keys: Credentials | None = keys if several else None
        """What it is called with, where that has to be chosen; None where there is one key at most."""
        self.side = SideChannel(
            origin=origin,
            path_prefix=path_prefix,
            headers=() if several else headers,
            headers_now=self._usable_headers if several else None,
            timeout_s=side_timeout_s,
            ssl_context=ssl_context,
            ticker=ticker,
        )
        self._path_prefix = path_prefix.encode()
        self._fixed = _FIXED % (address.host_header, _USER_AGENT)
        self._heads: dict[str, bytes] = {}
        self._own_lines = _lines(headers)
        self._secrets = _secrets([headers, *key_headers])
        self._key_headers = dict(zip(keys.keys, key_headers, strict=True)) if several and keys is not None else {}
        self._key_heads: dict[tuple[str, Credential], bytes] = {}

    def hidden(self, said: dict[str, Any]) -> dict[str, Any]:
        """The replica's own words without the credentials that it was shown: some APIs repeat a key they refuse."""
        if self._secrets is None:
            return said
        hide = self._secrets.sub
        return {name: hide("***", value) if isinstance(value, str) else value for name, value in said.items()}

    def request(
        self,
        path: str,
        body: bytes,
        request_id: str,
        passed_on: Sequence[tuple[bytes, bytes]] = (),
        key: Credential | None = None,
    ) -> list[bytes]:
        """The whole request, head and body, as pieces to be written together. `key`: one of `keys`, where there are
        any."""
        head = self._heads.get(path) if key is None else self._key_heads.get((path, key))
        if head is None:
            head = self._head(path, key)
        extra = b"".join([b"%b: %b\r\n" % header for header in passed_on]) if passed_on else b""
        return [
            b"%bx-request-id: %b\r\ncontent-length: %d\r\n%b\r\n" % (head, request_id.encode(), len(body), extra),
            body,
        ]

    def _head(self, path: str, key: Credential | None) -> bytes:
        lines = self._own_lines if key is None else _lines(self._key_headers[key])
        head = b"POST %b%b HTTP/1.1\r\n%b%b" % (self._path_prefix, path.encode(), self._fixed, lines)
        if key is None:
            self._heads[path] = head
        else:
            self._key_heads[path, key] = head
        return head

    def _usable_headers(self) -> Sequence[tuple[str, str]]:
        """For questions aside: with the first key that is not refused, whatever model it is limited for."""
        assert self.keys is not None
        now = time.monotonic()
        key = next((each for each in self.keys.keys if now >= each.until), self.keys.keys[0])
        return self._key_headers[key]

    def check_progress(self, engine_progressed: bool, now: float) -> None:
        """Look for progress on the requests whose silence would mean something; about once a second."""
        replica = self.replica
        replica.health.checked_progress(
            replica.in_flight if self.counts_work else replica.streams, engine_progressed, now
        )

    async def learn_adapters(self) -> None:
        """Ask which adapters the replica holds. Whoever asks meanwhile shares the answer. Raises `SideChannelError`."""
        learning = self._learning
        if learning is None or learning.done():
            learning = self._learning = asyncio.get_running_loop().create_task(self._learn_adapters())
            learning.add_done_callback(_seen)  # whoever asked may have gone by then
        await asyncio.shield(learning)

    async def _learn_adapters(self) -> None:
        try:
            self.holds(await self.dialect.adapters(self.side))
        except NotOffered:
            self.holds(())

    def holds(self, adapters: tuple[Adapter, ...]) -> None:
        """Take note of the adapters that the replica says it knows, without those that are about to go."""
        if self.dropping:
            adapters = tuple(each for each in adapters if each.name not in self.dropping)
        self.adapters = adapters
        replica = self.replica
        names = frozenset(each.name for each in adapters if each.resident)
        if names != replica.adapters:
            replica.shelf.begin(names, replica.adapters, time.monotonic())
            replica.adapters = names

    def begin_anew(self) -> None:
        """The engine has restarted: nothing is known of what it holds, and it may do now what it did not before."""
        self.adapters = ()
        self.replica.adapters = None
        self.replica.adapter_slots = self.adapter_slots
        self.replica.loadable = self.loadable
        self.replica.shelf.refused_until.clear()
        self.replica.limits = Pauses()  # what it has asked for is forgotten there as well

    async def abort(self, request_id: str) -> None:
        """Tell the engine to stop a request, where it can be told. Best effort: failure is logged, not raised."""
        asked = self.dialect.abort_request(request_id)
        if asked is None:
            return
        path, body = asked
        try:
            connection = await self.pool.acquire(_ABORT_TIMEOUT_S)
            connection.send(
                self.request(path, body, request_id),
                _Ignored(),
                head_timeout_s=_ABORT_TIMEOUT_S,
                idle_timeout_s=_ABORT_TIMEOUT_S,
            )
        except UpstreamError as error:
            logger.debug("abort of %s was not delivered: %s", request_id, error)

    def close_when_idle(self) -> None:
        """Take no new request; close each connection as soon as it is free."""
        self.pool.close_when_idle()

    async def aclose(self) -> None:
        """Close every connection now."""
        await self.pool.aclose(force=True)
        await self.side.aclose()


def _lines(headers: Sequence[tuple[str, str]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % (name.encode("latin-1"), value.encode("latin-1")) for name, value in headers)


def _seen(task: asyncio.Task[None]) -> None:
    """Nobody needs to be told of its error."""
    if not task.cancelled():
        task.exception()


class _Ignored:
    """A consumer for answers that nobody needs."""

    def on_head(self, status: int, headers: Headers) -> None: ...
    def on_data(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_error(self, error: UpstreamError) -> None: ...


def _secrets(headers: Sequence[Sequence[tuple[str, str]]]) -> re.Pattern[str] | None:
    """Finds what may be a credential in the values of these headers: any long word."""
    words = {word for each in headers for _, value in each for word in value.split() if len(word) >= _SECRET_LENGTH}
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True)))) if words else None
