"""Where a Redis is, parsed from one line of the configuration.

    redis://host[:port][/db]                      plain TCP
    rediss://host[:port][/db]                     TLS
    redis+sentinel://h1:p1,h2:p2/service[/db]     the primary that Sentinel names (plain TCP to both)
    rediss+sentinel://h1:p1,h2:p2/service[/db]    the same, TLS to both
    unix:///path[?db=n]                           a Unix socket

User name and password have settings of their own, so that an address may be logged and shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

REDIS_PORT = 6379
SENTINEL_PORT = 26379
MAX_DB = 1_000_000

_FORMS = "redis://host:port/db, rediss://…, redis+sentinel://host:port,host:port/service, rediss+sentinel://… or unix:///path"


@dataclass(frozen=True, slots=True)
class Address:
    """One Redis. Holds no secret."""

    hosts: tuple[tuple[str, int], ...] = ()
    """Host and port: of Redis (exactly one), or of the sentinels; empty for a Unix socket."""
    service: str = ""
    """The name of the primary with Sentinel; empty without it."""
    path: str = ""
    """Of a Unix socket."""
    db: int = 0
    tls: bool = False

    @property
    def shown(self) -> str:
        """The address for messages, in the form in which it is configured."""
        if self.path:
            return f"unix://{self.path}" + (f"?db={self.db}" if self.db else "")
        scheme = ("rediss" if self.tls else "redis") + ("+sentinel" if self.service else "")
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{scheme}://{hosts}" + (f"/{self.service}" if self.service else "") + (f"/{self.db}" if self.db else "")


def parse_address(url: str) -> Address:
    """Raises `ValueError`, whose message never has anything of the URL that may be a secret."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "unix"):
        raise ValueError(f"not the address of a Redis: it must look like {_FORMS}")
    if "#" in rest:
        raise ValueError("the address of a Redis has no fragment (#…)")
    place, _, query = rest.partition("?")
    if "@" in place.partition("/")[0]:
        raise ValueError(
            "user name and password do not belong into the address of a Redis: use redis.username and redis.password"
        )
    if scheme == "unix":
        return _unix(place, query)
    if query:
        raise ValueError(f"a {scheme}:// address has no parameters (?…)")
    hosts, _, path = place.partition("/")
    tls = scheme.startswith("rediss")
    if scheme.endswith("+sentinel"):
        service, _, db = path.partition("/")
        if not service:
            raise ValueError(f"{scheme}:// needs the name of the service: {scheme}://host:port,host:port/service")
        parsed = tuple(_host(host, SENTINEL_PORT) for host in hosts.split(","))
        return Address(parsed, service=unquote(service), db=_db(db), tls=tls)
    if "," in hosts:
        raise ValueError(f"several hosts need Sentinel: {scheme}+sentinel://host:port,host:port/service")
    return Address((_host(hosts, REDIS_PORT),), db=_db(path), tls=tls)


def _unix(path: str, query: str) -> Address:
    if not path.startswith("/") or path == "/":
        raise ValueError("a Unix socket needs an absolute path: unix:///run/redis.sock")
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(set(parameters) - {"db"}):
        raise ValueError(f"a unix:// address has no parameter {unknown[0]!r}, only db")
    return Address(path=unquote(path), db=_db(parameters.get("db", "")))


def _host(text: str, port: int) -> tuple[str, int]:
    if text.startswith("["):
        host, bracket, after = text[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise ValueError("an IPv6 address is written in brackets: [::1]:6379")
        number = after[1:] if after else str(port)
    else:
        host, colon, number = text.partition(":")
        number = number if colon else str(port)
    if not host or any(character.isspace() for character in host):
        raise ValueError("the address of a Redis has no host")
    if not (number.isascii() and number.isdecimal() and len(number) <= 5 and 0 < int(number) < 65536):
        raise ValueError("the port of a Redis must be 1 to 65535")
    return host, int(number)


def _db(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) <= 7 and int(text) <= MAX_DB):
        raise ValueError("the number of a Redis database must be a whole number, 0 or more")
    return int(text)
