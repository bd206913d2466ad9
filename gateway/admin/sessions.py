"""Sessions of people who have logged in with a browser: opaque, kept here, over when they are said to be over.

The browser holds 256 random bits in a cookie that scripts cannot read; this process holds their digest and who it is.
Nothing in the cookie means anything, so that ending a session here ends it, whoever has copied the cookie. Sessions are
in the memory of the one process that answers operators: a restart ends them all.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator

from gateway.config.operators import Sessions as SessionSettings
from gateway.policy import Who

COOKIE = "__Host-tidegate"
"""The prefix has browsers refuse it without Secure, with a Domain, or with another Path
(https://www.rfc-editor.org/rfc/rfc6265bis, 4.1.3.2): no other host, and no page over plain HTTP, can plant one."""
MAX_SESSIONS = 1000
"""Of all names together; at an identity provider there may be many. The one not used for longest makes room."""


class Session:
    """Somebody who has logged in."""

    __slots__ = ("began_at", "began_unix_s", "ended", "key", "name", "role", "timer", "used_at")

    def __init__(self, key: bytes, name: str, role: Who, now: float) -> None:
        self.key = key
        self.name = name
        self.role = role
        self.began_at = self.used_at = now
        self.began_unix_s = time.time()
        self.ended = asyncio.Event()
        """Set when the session is over: by logging out, by being revoked, by its time. What is open ends with it."""
        self.timer: asyncio.TimerHandle | None = None


class Sessions:
    """All sessions of one gateway. To be used from its event loop."""

    def __init__(self, settings: Callable[[], SessionSettings], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that only go on."""
        self._settings = settings
        self._clock = clock
        self._by_key: dict[bytes, Session] = {}
        """The least recently used first."""

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._by_key.values()))

    def open(self, name: str, role: Who) -> tuple[str, Session]:
        """A new session, and what the browser is to keep of it. Never one that the browser has named itself."""
        of_name = [session for session in self if session.name == name]
        for session in of_name[: max(0, len(of_name) + 1 - self._settings().max_per_name)]:
            self.end(session)
        while len(self._by_key) >= MAX_SESSIONS:
            self.end(next(iter(self._by_key.values())))
        id = secrets.token_urlsafe(32)
        session = Session(_digest(id), name, role, self._clock())
        self._by_key[session.key] = session
        self._arm(session)
        return id, session

    def find(self, id: str) -> Session | None:
        """The session whose browser shows this; being looked for is what keeps one from being idle."""
        session = self._by_key.pop(_digest(id), None)
        if session is None:
            return None
        self._by_key[session.key] = session
        now = self._clock()
        if self.left_s(session, now) <= 0:  # its timer is late
            self.end(session)
            return None
        session.used_at = now
        return session

    def left_s(self, session: Session, now: float | None = None) -> float:
        """Seconds until it ends if it is not used any more."""
        settings = self._settings()
        now = self._clock() if now is None else now
        return min(session.began_at + settings.lifetime_s, session.used_at + settings.idle_s) - now

    def end(self, session: Session) -> None:
        """Now, and for good. Ending it twice does nothing."""
        self._by_key.pop(session.key, None)
        if session.timer is not None:
            session.timer.cancel()
            session.timer = None
        session.ended.set()

    def end_all(self) -> int:
        """How many there were."""
        count = len(self._by_key)
        for session in self:
            self.end(session)
        return count

    def _arm(self, session: Session) -> None:
        """Have it end in time even if nobody asks: what streams to it must stop."""
        left_s = self.left_s(session)
        if left_s <= 0:
            self.end(session)
        else:
            session.timer = asyncio.get_running_loop().call_later(left_s + 0.001, self._arm, session)


def cookie(id: str, lifetime_s: float) -> str:
    """The header that has a browser keep a session."""
    return f"{COOKIE}={id}; Path=/; Max-Age={int(lifetime_s)}; Secure; HttpOnly; SameSite=Strict"


def no_cookie(name: str = COOKIE) -> str:
    """The header that has a browser forget one."""
    return f"{name}=; Path=/; Max-Age=0; Secure; HttpOnly; SameSite=Strict"


def _digest(id: str) -> bytes:
    return hashlib.sha256(id.encode("latin-1", "replace")).digest()
