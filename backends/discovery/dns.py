"""Replicas by name: every address of a name, or every target of its SRV records, is one.

Addresses come from the system's resolver (`getaddrinfo`), so that /etc/hosts, search domains and mDNS count as they do
for every other program; it does not tell for how long they hold. SRV records, which it knows nothing of, are asked for
with dnspython.

Two kinds of "no" are kept apart. A name server that is away, or fails, has not answered: that is trouble, and what was
found last holds for as long as the caller likes. One that says that there is nothing has answered; it is believed at
the third time in a row (`records.Held`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from backends.discovery.aside import Aside
from backends.discovery.member import Member
from backends.discovery.records import EMPTY_BELIEVED_AFTER, MAX_MEMBERS, Held, Srv, chosen, members_at, usable

if TYPE_CHECKING:
    import dns.asyncresolver
    import dns.resolver

logger = logging.getLogger(__name__)

Record: TypeAlias = Literal["a", "srv"]
Scheme: TypeAlias = Literal["http", "https"]
_TYPE_A = 1
AT_ONCE = 32
"""Targets of SRV records that are resolved side by side."""
_NONE_THERE = frozenset(
    number for name in ("EAI_NONAME", "EAI_NODATA") if isinstance(number := getattr(socket, name, None), int)
)
"""What `getaddrinfo` fails with where a name has no address; its other errors are no answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """As `DnsSource` takes them."""

    pool: str
    name: str
    record: Record
    port: int | None
    scheme: Scheme
    interval_s: float
    timeout_s: float
    servers: tuple[str, ...]
    server_port: int


class NoAnswer(Exception):
    """Nobody says what there is; the message says why."""


@dataclass(frozen=True, slots=True)
class Found:
    """An answer: hosts with their ports, each with its SRV weight, and for how long it holds."""

    places: dict[tuple[str, int], float]
    ttl_s: float = 0.0


LookUp = Callable[[str, int], Sequence[str]]
"""The IP addresses of a name. Blocks; raises `OSError` or `UnicodeError`."""


class DnsSource:
    """Looks one name up again and again (`backends.discovery.member.Source`). One event loop's."""

    def __init__(
        self,
        name: str,
        *,
        record: Record = "a",
        port: int | None = None,
        scheme: Scheme = "http",
        interval_s: float = 5.0,
        timeout_s: float = 3.0,
        servers: Sequence[str] = (),
        server_port: int = 53,
        pool: str = "",
        look_up: LookUp | None = None,
    ) -> None:
        """As `discovery.dns` in the configuration. `port` is needed with `a`; with `srv` it stands for those of the
        records. `servers` are IP addresses, for `srv`; none: the system's. `pool`: what names begin with. Raises
        `ValueError`."""
        if record == "a" and port is None:
            raise ValueError(f"discovery.dns.port: addresses of {name} have no port; give that of the engines")
        self._settings = _Settings(
            pool=pool,
            name=name,
            record=record,
            port=port,
            scheme=scheme,
            interval_s=interval_s,
            timeout_s=timeout_s,
            servers=tuple(servers),
            server_port=server_port,
        )
        self._look_up = look_up or addresses_of
        self._aside: Aside[Sequence[str]] = Aside(f"resolve {name}")
        self._held: Held[dict[tuple[str, int], float]] = Held()
        self._targets: dict[str, Held[tuple[str, ...]]] = {}
        self._said: set[str] = set()

    async def run(self, tell: Callable[[Sequence[Member]], None], trouble: Callable[[str], None]) -> None:
        while True:
            pause_s = await self.look(tell, trouble)
            await asyncio.sleep(pause_s)

    async def look(self, tell: Callable[[Sequence[Member]], None], trouble: Callable[[str], None]) -> float:
        """Look it up once; returns the seconds until the next time."""
        settings = self._settings
        try:
            found = await (self._srv() if settings.record == "srv" else self._addresses())
        except NoAnswer as error:
            trouble(str(error))
            return settings.interval_s
        holds = self._held.take(found.places)
        if self._held.doubted:
            times = f"{self._held.empty_answers} of {EMPTY_BELIEVED_AFTER} times in a row"
            trouble(f"{settings.name} has nothing, {times}: believed at the last")
            return settings.interval_s
        if holds and len(holds) > MAX_MEMBERS:
            self._say_once(f"{settings.name} has {len(holds)} replicas; the first {MAX_MEMBERS} are used")
        tell(members_at(settings.pool, settings.scheme, holds or {}))
        return max(settings.interval_s, found.ttl_s)

    # -- addresses

    async def _addresses(self) -> Found:
        settings = self._settings
        assert settings.port is not None
        name, port = settings.name, settings.port
        try:
            hosts = await self._aside.ask(lambda: self._look_up(name, port), settings.timeout_s)
        except TimeoutError:
            raise NoAnswer(f"the resolver does not answer within {settings.timeout_s:g} s for {name}") from None
        except socket.gaierror as error:
            if error.errno in _NONE_THERE:
                return Found({})
            raise NoAnswer(f"{name} cannot be looked up: {error.strerror}") from error
        except (OSError, UnicodeError) as error:
            raise NoAnswer(f"{name} cannot be looked up: {error}") from error
        return Found({(host, port): 1.0 for host in self._usable(name, hosts)})

    def _usable(self, name: str, hosts: Sequence[str]) -> list[str]:
        good = [each for each in map(usable, hosts) if each is not None]
        if len(good) < len(hosts):
            self._say_once(f"{name} has addresses that no replica can have (link-local, multicast): they are left out")
        return list(dict.fromkeys(good))

    # -- SRV records

    async def _srv(self) -> Found:
        settings = self._settings
        resolver = self._resolver()
        answer = await self._ask(resolver, settings.name, "SRV")
        if answer is None or answer.rrset is None:
            return Found({})
        ttl_s = float(answer.chaining_result.minimum_ttl)
        records = chosen(
            Srv(str(each.target).rstrip("."), settings.port or each.port, each.priority, each.weight)
            for each in answer.rrset
        )[:MAX_MEMBERS]
        if settings.scheme == "https":  # a certificate is for a name
            return Found({(each.target.lower(), each.port): float(each.weight) for each in records}, ttl_s)
        names = sorted({each.target.lower() for each in records})
        self._targets = {name: self._targets.get(name) or Held() for name in names}
        glue = _additional(answer)
        limit = asyncio.Semaphore(AT_ONCE)
        told = await asyncio.gather(*(self._target(resolver, name, glue.get(name), limit) for name in names))
        hosts = dict(zip(names, (each for each, _ in told), strict=True))
        ttl_s = min([ttl_s, *(each for _, each in told)])
        places: dict[tuple[str, int], float] = {}
        for record in records:
            several = hosts[record.target.lower()]
            for host in several:  # the weight is the target's, not each of its addresses'
                place, weight = (host, record.port), record.weight / len(several)
                places[place] = max(weight, places.get(place, 0.0))
        if records and not places:
            raise NoAnswer(f"none of the {len(records)} targets of {settings.name} has a known address")
        return Found(places, ttl_s)

    async def _target(
        self, resolver: dns.asyncresolver.Resolver, name: str, glue: Found | None, limit: asyncio.Semaphore
    ) -> tuple[Sequence[str], float]:
        """The addresses of one target and for how long they hold: those it had before, where nobody says now.

        IPv6 only where there is no IPv4: a machine that has both is one replica and not two.
        """
        held, ttl_s = self._targets[name], math.inf
        hosts: list[str] = []
        try:
            for kind in ("A", "AAAA"):
                if glue is None or not glue.places:
                    async with limit:
                        answer = await self._ask(resolver, name, kind)
                    if answer is not None and answer.rrset is not None:
                        hosts = [str(each.address) for each in answer.rrset]
                        ttl_s = float(answer.chaining_result.minimum_ttl)
                else:
                    hosts, ttl_s = [host for host, _ in glue.places], glue.ttl_s
                if hosts:
                    break
        except NoAnswer as error:
            self._say_once(f"target of {self._settings.name}: {error}; its last addresses are used on")
            return held.last or (), 0.0
        return held.take(tuple(self._usable(name, hosts))) or (), ttl_s if hosts else 0.0

    def _resolver(self) -> dns.asyncresolver.Resolver:
        """New each time: the system's name servers may change while we run."""
        import dns.asyncresolver
        import dns.resolver

        settings = self._settings
        try:
            resolver = dns.asyncresolver.Resolver(configure=not settings.servers)
            if settings.servers:
                resolver.nameservers = list(settings.servers)
                resolver.port = settings.server_port
        except (dns.resolver.NoResolverConfiguration, OSError, ValueError) as error:
            raise NoAnswer(f"no name server can be asked for {settings.name}: {error}") from error
        resolver.lifetime = settings.timeout_s
        # All of them get a turn, also where the first is silent.
        resolver.timeout = min(2.0, settings.timeout_s / max(1, len(resolver.nameservers)))
        return resolver

    async def _ask(self, resolver: dns.asyncresolver.Resolver, name: str, kind: str) -> dns.resolver.Answer | None:
        """None: the name does not exist. An answer may be without records. Raises `NoAnswer`."""
        import dns.exception
        import dns.name
        import dns.resolver

        try:
            whole = dns.name.from_text(name)
            return await resolver.resolve(whole, kind, raise_on_no_answer=False, search=False)
        except dns.resolver.NXDOMAIN:
            return None
        except dns.resolver.LifetimeTimeout:
            limit = f"{self._settings.timeout_s:g} s"
            raise NoAnswer(f"no name server answers within {limit} for {kind} {name}") from None
        except (dns.exception.DNSException, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NoAnswer(f"{kind} {name} cannot be looked up: {reason[:300]}") from error

    def _say_once(self, text: str) -> None:
        if text not in self._said and len(self._said) < MAX_MEMBERS:
            self._said.add(text)
            logger.warning("%s", text)


def _additional(answer: dns.resolver.Answer) -> dict[str, Found]:
    """IPv4 addresses that a name server has sent along with SRV records, which saves a question for each target."""
    found: dict[str, Found] = {}
    for rrset in answer.response.additional:
        if rrset.rdtype == _TYPE_A:
            name = str(rrset.name).rstrip(".").lower()
            found[name] = Found({(str(each.address), 0): 1.0 for each in rrset}, float(rrset.ttl))
    return found


def addresses_of(host: str, port: int) -> list[str]:
    """What the system's resolver says, IPv4 and IPv6. Blocks; raises `OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
