"""From an address to a connection that commands may be sent on: TLS, Sentinel, AUTH, SELECT."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from typing import Any

from gateway.store.protocol import StoreUnavailable
from gateway.store.redis.address import Address
from gateway.store.redis.link import Link, Owner, Refused, open_link, open_unix_link

SENTINEL_WITHIN_S = 0.3
"""For each sentinel: the next one is asked rather than waiting for one that is gone."""
ORDINARY = (OSError, Refused, StoreUnavailable)
"""How connecting fails. TimeoutError and SSLError are OSErrors."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who we are for Redis. Never shown."""

    username: str = ""
    password: str = field(default="", repr=False)
    sentinel_password: str = field(default="", repr=False)
    ca_file: str = ""
    """Certificates to trust instead of the system's, PEM."""


class Connector:
    """Opens connections to one address."""

    def __init__(self, address: Address, credentials: Credentials) -> None:
        self.address = address
        self._credentials = credentials
        self._tls: ssl.SSLContext | None = None
        self._sentinels = list(address.hosts) if address.service else []
        """The one that answered last comes first."""

    async def connect(self, owner: Owner, timeout_s: float) -> Link:
        """A connection on which Redis has answered. Raises `OSError` (connection, TLS), `Refused` (by Redis, or by
        no sentinel knowing a primary) and `StoreUnavailable` (it closed the connection)."""
        address = self.address
        if address.path:
            link = await open_unix_link(owner, timeout_s, address.path)
        else:
            host, port = await self._primary(owner) if address.service else address.hosts[0]
            link = await open_link(owner, timeout_s, host, port, self._context())
        try:
            await self._greet(link)
        except BaseException:
            link.close("the handshake failed")
            raise
        return link

    async def _greet(self, link: Link) -> None:
        given = self._credentials
        if given.password:
            words = (given.username, given.password) if given.username else (given.password,)
            await link.ask("AUTH", *words)
        if self.address.db:
            await link.ask("SELECT", self.address.db)
        if self.address.service:
            await _check_primary(link)
        # A frozen Redis accepts connections too (the kernel does), so one counts when Redis has said something.
        try:
            await link.ask("PING")
        except Refused as refused:
            if not str(refused).startswith("NOPERM"):
                raise

    async def _primary(self, owner: Owner) -> tuple[str, int]:
        said: list[str] = []
        for host, port in tuple(self._sentinels):
            try:
                async with asyncio.timeout(SENTINEL_WITHIN_S):
                    reply = await self._ask_sentinel(owner, host, port)
            except ORDINARY as error:
                said.append(f"{host}:{port}: {reason_of(error)}")
                continue
            if reply is None:
                said.append(f"{host}:{port}: it knows no {self.address.service}")
                continue
            self._sentinels.remove((host, port))
            self._sentinels.insert(0, (host, port))
            return reply[0].decode(), int(reply[1])
        raise Refused(f"no sentinel named a primary ({'; '.join(said)})")

    async def _ask_sentinel(self, owner: Owner, host: str, port: int) -> Any:
        link = await open_link(owner, SENTINEL_WITHIN_S, host, port, self._context())
        try:
            if self._credentials.sentinel_password:
                await link.ask("AUTH", self._credentials.sentinel_password)
            return await link.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.service)
        finally:
            link.close("it has answered")

    def _context(self) -> ssl.SSLContext | None:
        if self._tls is None and self.address.tls:
            self._tls = ssl.create_default_context(cafile=self._credentials.ca_file or None)
        return self._tls


async def _check_primary(link: Link) -> None:
    """A sentinel may still name one that has been demoted."""
    try:
        role = (await link.ask("ROLE"))[0]
    except Refused as refused:
        if str(refused).startswith("NOPERM"):
            return  # then a refused write will tell
        raise
    if role != b"master":
        raise Refused(f"it is no primary but a {role.decode()}")


def reason_of(error: Exception) -> str:
    """In a few words for a log line."""
    if isinstance(error, StoreUnavailable):
        return error.reason
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
