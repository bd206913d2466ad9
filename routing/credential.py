"""When a key that a backend refuses is left unused: the key is at fault, not the server that said so."""

from __future__ import annotations

FIRST_PAUSE_S = 30.0
MAX_PAUSE_S = 300.0
FORBIDDEN_IN_A_ROW = 3
_DOUBLINGS = 4
"""30 s doubled four times is past the maximum."""


class Credential:
    """One key, shared by all replicas that are called with it.

    401 says that the key is wrong, so it pauses at once: 30 s, 60 s, 120 s, 240 s, then 300 s. 403 is also said
    about single models or prompts, so only three in a row without an accepted request do. After each pause real
    requests find out whether it has been put right. Refusals during a pause do not lengthen it.
    """

    __slots__ = ("_forbidden", "pauses", "proven", "until")

    def __init__(self) -> None:
        self.until = 0.0
        """End of the last pause, in the caller's seconds."""
        self.pauses = 0
        """Pauses in a row."""
        self.proven = False
        """A request was served with it since the last pause began; what a mere question is told weighs less."""
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
        """A request with this key was served, which ends the pause and forgets the refusals."""
        self.until = 0.0
        self.pauses = 0
        self.proven = True
        self._forbidden = 0

    def unavailable_reason(self, now: float) -> str | None:
        return "credential_refused" if now < self.until else None
