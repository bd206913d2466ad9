"""Tells one gateway of one replica: again before its lease ends, at once when something changes, and for as long as the
gateway is away, until it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from backends.discovery.member import Member
from backends.discovery.registrar import Lease, Registrar, RegistrarError, RegistrationRefused

FIRST_AGAIN_S = 0.5
AWAY_AGAIN_S = 5.0
"""Longest pause while a gateway is away. Short: it may have forgotten us when it comes back, and is told by one small
request."""
REFUSED_AGAIN_S = 30.0
"""Longest pause while it refuses us, which takes somebody to change something there."""
DRAINING_LOOK_S = 0.5
JITTER = 0.1
"""Part of a pause that is left to chance, so that a thousand replicas that began together do not come together."""
USUAL_TTL_S = 15.0
UNDRAINED_LOOKS = 20
"""Answers of a gateway in a row that the replica has no requests, and is not in its pool either: it has none there."""
_UNKNOWN_TOKEN, _UNKNOWN_POOL = 401, 404


@dataclass
class Telling:
    """One gateway's. `run` until cancelled."""

    registrar: Registrar
    pool: str
    name: str
    clock: Callable[[], float]
    """Seconds, monotonic."""
    rng: Random
    say: Callable[[str], None]
    changed: Callable[[], None] = lambda: None
    """Called after each answer, and each time there was none."""
    new_token: Callable[[], str | None] = lambda: None
    """Asked when the gateway does not know the token (any more): it may have been replaced in its file."""
    wanted: Member | None = None
    told: Member | None = None
    """What the gateway has taken in last."""
    known: bool = False
    """It may have a registration of ours."""
    lease: Lease | None = None
    """Its last answer to what is wanted now."""
    away_since_s: float | None = None
    refused: RegistrationRefused | None = None
    """Its last answer, where that was a refusal."""
    refused_since_s: float | None = None
    registered: bool = False
    """It has taken in at least one registration."""
    _ttl_s: float = USUAL_TTL_S
    _failures: int = 0
    _said: str = ""
    _idle_looks: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def want(self, member: Member | None) -> None:
        """What it is to be told from now on; None: that there is no such replica."""
        if member == self.wanted:
            return
        if member is None or self.wanted is None or member.state != self.wanted.state:
            self.lease, self._idle_looks = None, 0
        self.wanted = member
        self._wake.set()

    @property
    def settled(self) -> bool:
        """It knows what is wanted, or has nothing of us where nothing is."""
        return not self.known if self.wanted is None else self.told == self.wanted

    def empty(self) -> bool:
        """Whether this gateway has no request under way at the draining replica, and sends no more.

        One that has been away for longer than its lease lasts has forgotten the replica, or is not there; so has one
        that has refused it for as long, and one that has never done otherwise.
        """
        if self.away_since_s is not None:
            return self.clock() - self.away_since_s > self._ttl_s
        if self.refused is not None and self.refused_since_s is not None:
            over = self.clock() - self.refused_since_s > self._ttl_s
            return over or not self.registered or self.refused.status == _UNKNOWN_POOL
        lease = self.lease
        if lease is None or lease.state != "draining" or not lease.empty:
            return False
        return lease.draining or self._idle_looks >= UNDRAINED_LOOKS

    async def run(self) -> None:
        while True:
            self._wake.clear()
            pause_s = await self._once()
            self.changed()
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _once(self) -> float | None:
        """Tell it what is wanted; returns the seconds until the next time, None: only when that changes."""
        wanted = self.wanted
        try:
            if wanted is None:
                if self.known:
                    await self.registrar.remove(self.pool, self.name)
                    self._answered("removed the registration at")
                self.told, self.known, self.lease = None, False, None
                return None
            self.known = True  # from here on it may have it, also if the answer gets lost
            lease = await self.registrar.put(self.pool, wanted)
        except RegistrarError as error:
            return self._failed(error)
        self._answered(f"registered as {self.pool}/{self.name} ({wanted.state}) at")
        self._ttl_s = lease.ttl_s
        self.told, self.registered = wanted, True
        if self.wanted is not None and self.wanted.state == wanted.state:  # else it is about the state before
            self.lease = lease
        if wanted.state == "draining":
            self._idle_looks = self._idle_looks + 1 if lease.empty else 0
            return min(DRAINING_LOOK_S, lease.renew_in_s)
        return lease.renew_in_s * (1.0 - JITTER * self.rng.random())

    def _answered(self, what: str) -> None:
        self.away_since_s, self.refused, self.refused_since_s, self._failures = None, None, None, 0
        self._say_once(f"{what} {self.registrar.address}")

    def _failed(self, error: RegistrarError) -> float:
        if isinstance(error, RegistrationRefused):
            self.away_since_s, self.refused, longest_s = None, error, REFUSED_AGAIN_S
            self.refused_since_s = self.clock() if self.refused_since_s is None else self.refused_since_s
            text = f"{self.registrar.address} refuses ({error.status}): {str(error).rstrip('.')}; trying on"
            if error.status == _UNKNOWN_TOKEN:
                self.registrar.token = self.new_token() or self.registrar.token
            if self.wanted is None:
                self.known = False  # it takes nothing back from us either; the lease ends by itself
        else:
            self.away_since_s = self.clock() if self.away_since_s is None else self.away_since_s
            self.refused, self.refused_since_s, longest_s, text = None, None, AWAY_AGAIN_S, f"{error}; trying on"
        self.lease = None
        self._say_once(text)
        self._failures = min(self._failures + 1, 20)
        pause_s = min(FIRST_AGAIN_S * 2.0 ** (self._failures - 1), longest_s)
        return pause_s * (1.0 - JITTER * self.rng.random())

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self.say(text)
