"""From an address to a connection that commands may be sent on: TLS, AUTH, SELECT; Sentinel is redis-py's."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.store.protocol import StoreUnavailable
from gateway.store.redis.address import Address
from gateway.store.redis.link import Link, Owner, Refused, open_link, open_unix_link

if TYPE_CHECKING:
    from redis.asyncio import Redis

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
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    """Whom to trust, and who we are; None: the system's authorities, and nobody."""


class Connector:
    """Opens connections to one address."""

    def __init__(self, address: Address, credentials: Credentials) -> None:
        from gateway.store.redis import library  # here: a process without a Redis must not pay for it

        self.address = address
        self.away = library.AWAY
        """How a client of `listening` fails when Redis is away."""
        self._library = library
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
            host, port = await self._primary() if address.service else address.hosts[0]
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

    async def listening(self, within_s: float) -> Redis:
        """A client of redis-py's, for messages, not connected yet. Raises `Refused` as `connect` does."""
        address, given = self.address, self._credentials
        place = address.path or (await self._primary() if address.service else address.hosts[0])
        return self._library.client_of(
            place,
            within_s=within_s,
            db=address.db,
            username=given.username,
            password=given.password,
            tls=self._context(),
        )

    async def _primary(self) -> tuple[str, int]:
        primary, answered = await self._library.find_primary(
            self.address.service,
            self._sentinels,
            within_s=SENTINEL_WITHIN_S,
            password=self._credentials.sentinel_password,
            tls=self._context(),
        )
        self._sentinels.sort(key=lambda sentinel: sentinel != answered)
        return primary

    def _context(self) -> ssl.SSLContext | None:
        if self._tls is None and self.address.tls:
            self._tls = self._credentials.tls or ssl.create_default_context()
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
