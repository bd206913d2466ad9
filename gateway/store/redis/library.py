"""What is redis-py's here: finding the primary through Sentinel, and the connection on which messages come.

Its defaults (5 s without an answer, ten retries, RESP3, `CLIENT SETINFO`) are never used: all of it is set below.
Importing it takes 190 ms and 14 MB, so only a process that has a `RedisClient` imports this module.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Sequence
from typing import Any, cast

from redis import exceptions
from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from gateway.store.redis.link import Refused

AWAY = (exceptions.ConnectionError, exceptions.TimeoutError)
"""How redis-py says that there is no connection. A wrong password is one of these too."""
Host = tuple[str, int]


class _Trusting(SSLConnection):
    """TLS by a context of ours: `ssl_ca_certs` would be trusted besides the system's authorities, not instead of
    them, and would have redis-py read all of those again for each connection."""

    def __init__(self, *, context: ssl.SSLContext, **settings: Any) -> None:
        super().__init__(**settings)
        self.ssl_context.context = context


class _Sentinel(Redis):
    """One that remembers why it did not answer, of which redis-py's `Sentinel` only tells the kind. One that refuses
    to answer (rights) is passed over as one that is gone."""

    trouble = ""

    async def sentinel_masters(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().sentinel_masters(*args, **options)
        except exceptions.RedisError as error:
            self.trouble = str(error)
            raise exceptions.ConnectionError(self.trouble) from None

    @property
    def host(self) -> Host:
        given = self.connection_pool.connection_kwargs
        return given["host"], given["port"]


def client_of(
    host: Host | str,
    *,
    kind: type[Redis] = Redis,
    within_s: float,
    db: int = 0,
    username: str = "",
    password: str = "",
    tls: ssl.SSLContext | None = None,
) -> Redis:
    """A client of a host, or of the Unix socket at a path, which tries everything once and for `within_s` at most.

    It is not connected yet. Closing it closes its connections.
    """
    settings: dict[str, Any] = {
        "db": db,
        "username": username if password else "",
        "password": password,
        "socket_timeout": within_s,
        "socket_connect_timeout": within_s,
        # No errors to retry: with `Retry(NoBackoff(), 0)` alone redis-py connects anew before it tells of the first.
        "retry": Retry(NoBackoff(), 0, supported_errors=()),
        "health_check_interval": 0,
        "protocol": 2,
        "driver_info": None,
    }
    if isinstance(host, str):
        return kind.from_pool(ConnectionPool(connection_class=UnixDomainSocketConnection, path=host, **settings))
    settings |= {"host": host[0], "port": host[1]}
    if tls is not None:
        return kind.from_pool(ConnectionPool(connection_class=_Trusting, context=tls, **settings))
    return kind.from_pool(ConnectionPool(connection_class=Connection, **settings))


async def find_primary(
    service: str, hosts: Sequence[Host], *, within_s: float, password: str = "", tls: ssl.SSLContext | None = None
) -> tuple[Host, Host]:
    """The primary, and which of the sentinels named it. Each is asked for `within_s` at most, one after the other.

    Raises `Refused` when none names one.
    """
    sentinel = Sentinel(())  # type: ignore[no-untyped-call]
    asked = [
        cast(_Sentinel, client_of(host, kind=_Sentinel, within_s=within_s, password=password, tls=tls))
        for host in hosts
    ]
    sentinel.sentinels = list(asked)
    try:
        host, port = await sentinel.discover_master(service)
    except exceptions.RedisError:
        said = (f"{each.host[0]}:{each.host[1]}: {each.trouble or f'it knows no primary {service}'}" for each in asked)
        raise Refused(f"no sentinel named a primary ({'; '.join(said)})") from None
    finally:
        with contextlib.suppress(*AWAY):  # closing took too long: it is closed
            await sentinel.aclose()
    first = sentinel.sentinels[0]  # where redis-py puts the one that has answered
    return (host, port), next(each.host for each in asked if each is first)
