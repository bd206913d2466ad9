"""Who has registered, and for how much longer: the leases of one gateway, fed by what all gateways post.

A registration is a notice in the store with a time to live, which its replica renews. A store that has forgotten
everything (a Redis that was restarted empty) must not take replicas out of work that are well: so a notice that is
missing ends a lease only when the lease is over by our own clock, too, and the store was there all the time. What is
to end at once says so (`Posted.gone`).

Pure: `now_s` is any monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from backends.discovery.member import Member
from gateway.notices import MEMBER


class Posted(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a gateway tells the others of one renewal."""

    member: Member
    ttl_s: float
    renewal: str
    """Another one each time, so that a renewal without news can be told from none."""
    gone: bool = False
    """It has left; kept for a while, so that nobody goes on believing an older one."""


@dataclass(slots=True)
class Lease:
    """One replica's registration."""

    member: Member
    ttl_s: float
    renewal: str
    until_s: float
    since_s: float


Key = tuple[str, str]
"""Pool and name."""


def notice_key(pool: str, name: str) -> str:
    """Where a registration stands among the notices."""
    return f"{MEMBER}/{pool}/{name}"


class Registry:
    """The leases that hold."""

    def __init__(self) -> None:
        self.leases: dict[Key, Lease] = {}
        self._ahead: dict[Key, tuple[str, float]] = {}
        """What this gateway has taken in and the notices do not show yet: its renewal, and until when others there
        are older ones."""
        self._checked_s: float | None = None

    def of(self, pool: str) -> dict[str, Lease]:
        """Those of one pool, by name."""
        return {name: lease for (each, name), lease in self.leases.items() if each == pool}

    def take_first(self, pool: str, name: str, posted: Posted, now_s: float) -> bool:
        """As `take`, before the store is told. What it has until then is older, and does not count: somebody who has
        just left must not be brought back by a notice that is still under way. An older one holds for no longer than
        its own lease."""
        self._ahead[pool, name] = (posted.renewal, now_s + posted.ttl_s)
        return self.take(pool, name, posted, now_s)

    def told(self, pool: str, name: str, posted: Posted, now_s: float) -> None:
        """The store has been told, so that notices show it in a moment, or what another gateway has said since."""
        renewal, until_s = self._ahead.get((pool, name), ("", 0.0))
        if renewal == posted.renewal:
            self._ahead[pool, name] = (renewal, min(until_s, now_s + SHOWN_S))

    def take(self, pool: str, name: str, posted: Posted, now_s: float) -> bool:
        """One renewal, or one that has left; whether the members have changed by it."""
        key = (pool, name)
        known = self.leases.get(key)
        if posted.gone:
            if known is None or known.renewal == posted.renewal:
                return False
            return self.leases.pop(key, None) is not None
        if known is None:
            self.leases[key] = Lease(posted.member, posted.ttl_s, posted.renewal, now_s + posted.ttl_s, now_s)
            return True
        if known.renewal == posted.renewal:
            return False
        changed = known.member != posted.member
        known.member, known.ttl_s, known.renewal = posted.member, posted.ttl_s, posted.renewal
        known.until_s = now_s + posted.ttl_s
        return changed

    def recall(self, pool: str, members: Iterable[Member], ttl_s: float, now_s: float) -> None:
        """Those of this gateway's last run: they have one lease to be heard of again."""
        for member in members:
            self.leases.setdefault((pool, member.name), Lease(member, ttl_s, "", now_s + ttl_s, now_s))

    def read(self, notices: Mapping[str, bytes], now_s: float) -> bool:
        """All notices as they are now; whether the members have changed by them."""
        changed = False
        for key, value in notices.items():
            kind, _, rest = key.partition("/")
            pool, _, name = rest.partition("/")
            posted = decoded(value)
            if kind == MEMBER and name and posted is not None and not self._is_older((pool, name), posted, now_s):
                changed |= self.take(pool, name, posted, now_s)
        return changed

    def _is_older(self, key: Key, posted: Posted, now_s: float) -> bool:
        renewal, until_s = self._ahead.get(key, ("", 0.0))
        if renewal and (renewal == posted.renewal or until_s <= now_s):
            del self._ahead[key]
            return False
        return bool(renewal)

    def expire(self, now_s: float, *, store_is_there: bool) -> list[Key]:
        """End the leases that are over, and say which. While the store is away, and where this process did not run
        for a while, time does not count: renewals could not be heard."""
        last, self._checked_s = self._checked_s, now_s
        gap_s = 0.0 if last is None else now_s - last
        if not store_is_there or gap_s > MAX_GAP_S:
            for lease in self.leases.values():
                lease.until_s = max(lease.until_s + gap_s, now_s + min(lease.ttl_s, GRACE_S))
            return []
        self._ahead = {key: ahead for key, ahead in self._ahead.items() if ahead[1] > now_s}
        over = [key for key, lease in self.leases.items() if lease.until_s <= now_s]
        for key in over:
            del self.leases[key]
        return over


SHOWN_S = 3.0
"""Within which a busy worker has read what the store was told."""
MAX_GAP_S = 5.0
"""Between two looks: beyond that, this process was stopped, or its machine asleep."""
GRACE_S = 15.0
"""At least as long has everybody, after an outage, to be heard of again."""


def decoded(value: bytes) -> Posted | None:
    """What was posted; None when it is of another form: another version of Tidegate may have written it."""
    try:
        return msgspec.json.decode(value, type=Posted)
    except msgspec.MsgspecError:
        return None
