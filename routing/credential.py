"""Which of a backend's keys is used: one until it is refused or limited, then the next.

When a key is refused, the key is at fault, not the server that said so; when it is limited, neither is. Keys are not
used in turn: providers keep their prompt caches by account, so whatever goes back and forth between two accounts finds
half as much in either. For the same reason a model stays at the key that it has come to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from routing.pause import Pauses

FIRST_PAUSE_S = 30.0
MAX_PAUSE_S = 300.0
FORBIDDEN_IN_A_ROW = 3
_DOUBLINGS = 4
"""30 s doubled four times is past the maximum."""


class Credential:
    """What is known of one key; never the key itself.

    401 says that the key is wrong, so it pauses at once: 30 s, 60 s, 120 s, 240 s, then 300 s. 403 is also said
    about single models or prompts, so only three in a row without an accepted request do. After each pause real
    requests find out whether it has been put right. Refusals during a pause do not lengthen it.
    """

    __slots__ = ("_forbidden", "limits", "pauses", "position", "proven", "until")

    def __init__(self, position: int = 0) -> None:
        self.position = position
        """Its place in the configuration, from 0: what logs and operators know it by."""
        self.until = 0.0
        """End of the last pause, in the caller's seconds."""
        self.pauses = 0
        """Pauses in a row."""
        self.proven = False
        """A request was served with it since the last pause began; what a mere question is told weighs less."""
        self.limits = Pauses()
        """Models that it is limited for just now."""
        self._forbidden = 0

    def refused(self, now: float, status: int = 401) -> bool:
        """Note a 401 or 403; True when a pause begins with it, which is the moment to log."""
        if now < self.until:
            return False
        if status == 403:
            self._forbidden += 1
            if self._forbidden < FORBIDDEN_IN_A_ROW:
                return False
        self.until = now + min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self.pauses, _DOUBLINGS))
        self.pauses += 1
        self.proven = False
        return True

    def accepted(self) -> None:
        """A request with this key was served, which ends the pause and forgets the refusals.

        It does not end a rate limit: the request may have been let in before that began.
        """
        self.until = 0.0
        self.pauses = 0
        self.proven = True
        self._forbidden = 0

    def unavailable_reason(self, now: float) -> str | None:
        return "credential_refused" if now < self.until else None

    def usable(self, model: str, now: float) -> bool:
        """Whether a request for this model may be sent with it."""
        return now >= self.until and not (now < self.limits.latest and self.limits.until(model, now))


class Credentials:
    """The keys of one backend, shared by all replicas that are called with them. Belongs to one event loop."""

    __slots__ = ("_chosen", "keys", "until")

    def __init__(self, keys: Sequence[Credential]) -> None:
        """`keys`: one or more, in the order in which they are used."""
        self.keys = tuple(keys)
        self.until = min(key.until for key in self.keys)
        """Before this time every key is refused. A plain number: every request looks at it."""
        self._chosen: dict[str, Credential] = {}
        """The key that each model has come to, where it is not the first."""

    def chosen(self, model: str) -> Credential:
        """The key that was last used for this model."""
        return self._chosen.get(model, self.keys[0])

    def pick(self, model: str, now: float, avoided: Collection[Credential] = ()) -> Credential | None:
        """The key for a request: the last one, or the next one after it that may be used; None when none may.

        `avoided`: keys that this request was refused with.
        """
        last = self.chosen(model)
        start = self.keys.index(last)
        for key in (*self.keys[start:], *self.keys[:start]):
            if key not in avoided and key.usable(model, now):
                if key is not last and not last.usable(model, now):
                    self._chosen[model] = key
                return key
        return None

    def refused(self, now: float, status: int = 401, key: Credential | None = None) -> bool:
        """Note that a key was refused (None: the first); True when a pause of it begins, which is the moment to log."""
        paused = (key or self.keys[0]).refused(now, status)
        self.until = min(each.until for each in self.keys)
        return paused

    def accepted(self, key: Credential | None = None) -> None:
        """A request was served with this key (None: the first)."""
        key = key or self.keys[0]
        if key.until or not key.proven or key._forbidden or key.pauses:
            key.accepted()
            self.until = min(each.until for each in self.keys)

    def limited_until(self, model: str, now: float) -> float:
        """When the first of the keys that are limited for this model may be used again; 0.0 when one may be used now,
        or when all are refused, which no waiting mends."""
        ends: list[float] = []
        for key in self.keys:
            if now < key.until:
                continue
            end = key.limits.until(model, now)
            if not end:
                return 0.0
            ends.append(end)
        return min(ends, default=0.0)

    def carry(self, keys: Sequence[Credential]) -> Credentials:
        """A ring of other keys, some of them the same: models stay at theirs where it is still there."""
        ring = Credentials(keys)
        ring._chosen = {model: key for model, key in self._chosen.items() if key in ring.keys}
        return ring
