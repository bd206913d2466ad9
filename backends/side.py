"""Questions to a model server beside its inference requests: health, load, adapters.

They travel on connections of their own, so that a fleet busy to its last connection can still be asked how it is.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx2
import orjson

from backends.origin import Origin
from backends.ticker import Ticker
from backends.transport import LeanTransport

MAX_ANSWER_BYTES = 4 << 20
"""A Prometheus page of a large engine has some hundred kilobytes, OpenRouter's list of models over one megabyte. What
is let in is parsed on the event loop, for up to a tenth of a second."""
CONNECT_S = 2.0


class Trouble(StrEnum):
    """Why there was no usable answer."""

    REFUSED = "refused"
    """Nobody listens, or the address cannot be reached: hard evidence that the process is away."""
    TIMEOUT = "timeout"
    BROKEN = "broken"
    """The connection ended in the middle, or what came was not HTTP, not JSON, or too large."""
    STATUS = "status"
    """It answered with a status that the question does not expect."""


class SideChannelError(Exception):
    """A question that was not answered."""

    def __init__(self, trouble: Trouble, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.trouble = trouble
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply of any status."""

    url: str
    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> Any:
        """The body, parsed. Raises `SideChannelError`."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise SideChannelError(Trouble.BROKEN, f"{self.url} did not answer with JSON: {error}") from error

    def json_object(self) -> dict[str, Any]:
        """The body as an object. Raises `SideChannelError`."""
        tree = self.json()
        if not isinstance(tree, dict):
            raise SideChannelError(Trouble.BROKEN, f"{self.url} did not answer with a JSON object")
        return tree

    def expect(self) -> Answer:
        """Itself when the status is 200. Raises `SideChannelError` otherwise."""
        if not self.ok:
            raise SideChannelError(Trouble.STATUS, f"{self.url} answered {self.status}", self.status)
        return self


class SideChannel:
    """One replica, as it is asked aside. Belongs to one event loop."""

    def __init__(
        self,
        *,
        origin: str,
        path_prefix: str = "",
        headers: Sequence[tuple[str, str]] = (),
        headers_now: Callable[[], Sequence[tuple[str, str]]] | None = None,
        timeout_s: float = 5.0,
        ssl_context: ssl.SSLContext | None = None,
        ticker: Ticker | None = None,
    ) -> None:
        """`headers_now` is asked at each question for headers on top of `headers`."""
        address = Origin.parse(origin)
        transport = LeanTransport(uds=address.uds, max_connections=4, ssl_context=ssl_context, ticker=ticker)
        base = "http://localhost" if address.uds is not None else origin
        self.address = address.address
        """Host and port, or path of a socket, for messages and for addresses that are relative to the engine."""
        self.host = None if address.uds is not None else address.host
        """Name or address of the machine; None for a socket, which is on this one."""
        self._timeout_s = timeout_s
        self._headers_now = headers_now
        self._base = base + path_prefix
        # Bodies are read as they come: unless told otherwise, httpx asks for gzip, which proxies gladly send.
        own = [("accept-encoding", "identity"), ("user-agent", "tidegate")]
        self._client = httpx2.AsyncClient(
            transport=transport, trust_env=False, follow_redirects=False, headers=[*own, *headers]
        )

    async def get(self, path: str, *, timeout_s: float | None = None) -> Answer:
        """Ask; any status is an answer. Raises `SideChannelError`."""
        return await self._ask("GET", path, None, timeout_s)

    async def post(self, path: str, content: Any, *, timeout_s: float | None = None) -> Answer:
        """Ask with a JSON body. Raises `SideChannelError`."""
        return await self._ask("POST", path, orjson.dumps(content), timeout_s)

    async def _ask(self, method: str, path: str, content: bytes | None, timeout_s: float | None) -> Answer:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        timeout = httpx2.Timeout(limit_s, connect=min(CONNECT_S, limit_s))
        headers = {} if self._headers_now is None else dict(self._headers_now())
        if content is not None:
            headers["content-type"] = "application/json"
        url = self._base + path
        body = bytearray()
        # The base is kept out of messages where it is a socket: "localhost" would mislead.
        shown = f"{self.address}{path}"
        try:
            async with (
                asyncio.timeout(limit_s),  # over all; httpx's own limits are for each read
                self._client.stream(method, url, content=content, headers=headers, timeout=timeout) as reply,
            ):
                if reply.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
                    raise SideChannelError(Trouble.BROKEN, f"{shown} compressed its answer, which was not asked for")
                async for piece in reply.aiter_raw():
                    body += piece
                    if len(body) > MAX_ANSWER_BYTES:
                        raise SideChannelError(Trouble.BROKEN, f"{shown} answered with over {MAX_ANSWER_BYTES} bytes")
                return Answer(shown, reply.status_code, bytes(body))
        except httpx2.ConnectTimeout as error:
            raise SideChannelError(Trouble.TIMEOUT, f"{shown} could not be connected to in time") from error
        except httpx2.ConnectError as error:
            raise SideChannelError(Trouble.REFUSED, f"{shown} could not be connected to: {error}") from error
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise SideChannelError(Trouble.TIMEOUT, f"{shown} did not answer within {limit_s:g} s") from error
        except httpx2.HTTPError as error:
            raise SideChannelError(Trouble.BROKEN, f"{shown} broke off: {error}") from error

    async def aclose(self) -> None:
        await self._client.aclose()
