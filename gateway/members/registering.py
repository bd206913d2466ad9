"""Takes registrations in: whether a replica may be where it says it is, its lease, and what it is told of itself.

What registers gets prompts, and the keys that the pool is called with. So a pool has to say that it takes
registrations, whoever registers needs a token, and only addresses in the pool's networks (or below its names) count;
a Unix socket never does, since that would be one of the gateway's own machine.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from pydantic_core import PydanticCustomError

from backends.discovery.member import Member
from backends.discovery.records import MAX_MEMBERS
from gateway.config import Backend, Settings
from gateway.config.discovery import Discovery
from gateway.config.urls import normal_url
from gateway.errors import GatewayError, InvalidRequest
from gateway.members.merge import REGISTRATION, placed
from gateway.members.places import accepting, not_here, ttl_of
from gateway.members.registry import Posted, notice_key
from gateway.members.service import Members
from gateway.notices import MEMBER
from gateway.roster import known_work
from gateway.sources import Silent, Source, ask_all

logger = logging.getLogger("tidegate")

RENEWALS_IN_A_LEASE = 3
LOOK_S = 0.5
"""How often notices of other gateways, and the ends of leases, are looked for."""
STATES_HOLD_S = 0.5
"""How long what workers say of their replicas is good enough for the next who asks, and is not about to go."""
STATES_TIMES, STATES_HOLD_MOST_S = 9, 5.0
"""Or so many times what asking took, for as long at most: of thousands of replicas it takes a good part of a second."""
SETTLE_S = 2.0
HOLDER = secrets.token_hex(6)
LIVENESS_S = 5.0


class UnknownPool(InvalidRequest):
    status = 404
    code = "unknown_pool"


class RegistrationRefused(InvalidRequest):
    status = 403
    code = "registration_refused"


class LeaseAnswer(msgspec.Struct, frozen=True):
    """What a replica is told that has registered."""

    ttl_s: float
    renew_in_s: float
    state: str
    in_flight: int
    """Requests under way there, this gateway's own."""
    empty: bool
    """Nothing is under way there, of any gateway."""
    draining: bool


class Registrations:
    """The registrations of one gateway. `run` until cancelled."""

    def __init__(self, members: Members, sources: Sequence[Source], settings: Callable[[], Settings]) -> None:
        self._members = members
        self._sources = sources
        self._settings = settings
        self._states: tuple[float, list[dict[str, Any] | None]] = (0.0, [])
        self._states_hold_s = STATES_HOLD_S
        self._asking = asyncio.Lock()
        self._store_is_there = True

    def before(self, pool: str, name: str) -> Member | None:
        """What is registered under this name."""
        lease = self._members.registry.leases.get((pool, name))
        return None if lease is None else lease.member

    def checked(self, pool: str, name: str, member: Member) -> Member:
        """The member as it is kept. Raises `InvalidRequest`."""
        backend = self._backend(pool)
        registration = accepting(backend)
        if registration is None:
            raise RegistrationRefused(
                f"The pool {pool!r} takes no registrations: set backends.{pool}.discovery.registration.", param="pool"
            )
        if member.name not in ("", name):
            raise InvalidRequest(f"The name is {name!r} in the path and {member.name!r} in the body.", param="name")
        try:
            url = normal_url(member.url)
        except PydanticCustomError as error:
            raise InvalidRequest(f"url: {error.message()}.", param="url") from error
        member = msgspec.structs.replace(member, name=name, url=url)
        problem = not_here(member, registration)
        if problem:
            raise RegistrationRefused(
                f"{problem} (backends.{pool}.discovery.registration.networks and .hosts).", param="url"
            )
        discovery = backend.discovery or Discovery()
        (one,) = placed(pool, discovery.defaults, {REGISTRATION: [member]})
        if one.refused:
            raise InvalidRequest(f"This cannot be a replica: {one.refused}.")
        before = self.before(pool, name)
        if before is not None and before.agent and before.agent == member.agent and _two_machines(before, member):
            # Both would take turns at one place, each with every renewal.
            raise RegistrationRefused(
                f"{name} of the agent {member.agent} is at {before.url} already: two machines have an agent of this "
                "name (tidegate fleet up --agent).",
                param="name",
            )
        if before is None and len(self._members.registry.of(pool)) >= MAX_MEMBERS:
            raise RegistrationRefused(f"{pool!r} has {MAX_MEMBERS} registrations, which is as many as can be.")
        return member

    async def take(self, pool: str, member: Member) -> LeaseAnswer:
        """Begin a registration, or renew it; `member` comes from `checked`."""
        backend = self._backend(pool)
        ttl_s = ttl_of(backend)
        posted = Posted(member, ttl_s, secrets.token_hex(6))
        is_new = self.before(pool, member.name) is None
        changed = self._members.registry.take_first(pool, member.name, posted, time.monotonic())
        if changed:
            self._members.recompute()
        await self._tell(pool, member.name, posted)
        # Of thousands that join at once each would wait for a reload, and a few at a time come to as many reloads. One
        # that was known before may be waited for: by a rolling restart, say.
        if changed and not (is_new and self._members.storming):
            await self._members.settled(SETTLE_S)
        in_flight, empty, draining = await self._at(pool, member)
        return LeaseAnswer(ttl_s, ttl_s / RENEWALS_IN_A_LEASE, member.state, in_flight, empty, draining)

    async def end(self, pool: str, name: str) -> bool:
        """End a registration; whether there was one."""
        self._backend(pool)
        lease = self._members.registry.leases.get((pool, name))
        if lease is None:
            return False
        posted = Posted(lease.member, lease.ttl_s, secrets.token_hex(6), gone=True)
        self._members.registry.take_first(pool, name, posted, time.monotonic())
        self._members.recompute()
        await self._tell(pool, name, posted)
        await self._members.settled(SETTLE_S)
        return True

    def _backend(self, pool: str) -> Backend:
        backends = self._settings().backends
        if pool not in backends:
            known = ", ".join(sorted(backends)[:20]) or "none"
            raise UnknownPool(f"There is no pool {pool[:80]!r}; there are: {known}.", param="pool")
        return backends[pool]

    async def _tell(self, pool: str, name: str, posted: Posted) -> None:
        """Post it for the other gateways. While the store is away this gateway goes by what it has heard itself."""
        for source in self._sources:
            try:
                await source.announce(notice_key(pool, name), msgspec.json.encode(posted), posted.ttl_s)
                self._members.registry.told(pool, name, posted, time.monotonic())
                return
            except Silent:
                continue
            except GatewayError as error:
                self._store(False, str(error))
                return

    def _store(self, is_there: bool, why: str = "") -> None:
        if self._store_is_there and not is_there:
            logger.warning("registrations are known to this gateway alone for now: %s", why)
        elif is_there and not self._store_is_there:
            logger.info("registrations are shared again")
        self._store_is_there = is_there

    async def _at(self, pool: str, member: Member) -> tuple[int, bool, bool]:
        """Requests under way at a member, whether it is empty, and whether it is drained, as all workers say."""
        found: list[dict[str, Any]] = []
        silent = False
        for answer in await self._fleet(0.0 if member.state == "draining" else self._states_hold_s):
            if answer is None:
                silent = True
                continue
            pools = (each for each in answer["pools"] if each["name"] == pool)
            found += [each for one in pools for each in one["replicas"] if each["url"] == member.url]
        in_flight = sum(each["in_flight"] for each in found)
        elsewhere = max(map(known_work, found), default=0)
        drained = bool(found) and all(each["draining"] for each in found)
        return in_flight, not silent and in_flight == 0 and elsewhere == 0, drained

    async def _fleet(self, age_s: float) -> list[dict[str, Any] | None]:
        async with self._asking:
            at_s, answers = self._states
            began_s = time.monotonic()
            if began_s - at_s > age_s or not answers:
                answers = [state for _, state in await ask_all(self._sources, lambda source: source.fleet())]
                self._states = (now_s := time.monotonic(), answers)
                hold_s = STATES_TIMES * (now_s - began_s)
                self._states_hold_s = min(max(STATES_HOLD_S, hold_s), STATES_HOLD_MOST_S)
            return answers

    # -- other gateways, and time

    async def run(self) -> None:
        """Hear of what other gateways were told, and end leases that nobody has renewed."""
        while True:
            try:
                await self._look()
            except Exception:
                logger.exception("registrations: a look around failed; it goes on in a moment")
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        registry, changed = self._members.registry, False
        if not any(accepting(backend) for backend in self._settings().backends.values()):
            registry.leases.clear()  # nobody renews them, and nobody would see them end
            return
        is_there = False
        for source in self._sources:
            try:
                # Notices stay as they were while the store is away; whether it is, an operation tells.
                await source.claim(f"members/{HOLDER}", HOLDER, LIVENESS_S)
                changed = registry.read(await source.notices(MEMBER), time.monotonic())
                is_there = True
                break
            except Silent:
                continue
            except GatewayError as error:
                self._store(False, str(error))
                break
        if is_there:
            self._store(True)
        for pool, name in registry.expire(time.monotonic(), store_is_there=is_there):
            logger.warning("%s: %s is gone: its registration was not renewed", pool, name)
            changed = True
        if changed:
            self._members.recompute()


def _two_machines(before: Member, now: Member) -> bool:
    """Whether these are two servers at work under one name: one that has moved has drained, or left, before."""
    return before.url != now.url and before.state == now.state == "ready"
