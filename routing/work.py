"""How much a replica has to do, as far as this gateway and its peers know: counted at dispatch, in tokens.

Four totals per replica, each the sum of this worker's own and of what its peers said last. Peers send absolute values,
never differences, so that a lost message is repaired by the next one and a dead worker's part can be dropped whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

AT_ONCE_TOKENS = 1_500
"""A dispatch with so much prefill is told to peers at once: one that overlooked it would wait behind it for long."""


class Totals(NamedTuple):
    """One worker's work at one replica."""

    queued: int = 0
    """Requests dispatched whose first token has not come."""
    queued_tokens: int = 0
    """Prompt tokens of those that are not believed to be in the replica's cache: prefill still to be done."""
    running: int = 0
    """Requests past their first token."""
    running_tokens: int = 0
    """KV tokens that those hold: prompt and output so far, estimated."""


NOTHING = Totals()


class Work:
    """The totals of one replica. `own` is changed by this worker's router only, `peers` by what peers say."""

    __slots__ = (
        "_own",
        "_peers",
        "changed",
        "on_change",
        "queued",
        "queued_tokens",
        "running",
        "running_tokens",
        "since",
    )

    def __init__(self) -> None:
        self.queued = 0
        self.queued_tokens = 0
        self.running = 0
        self.running_tokens = 0
        self.since = 0.0
        """When the prefill that is going on began, as far as first tokens show: seconds of the router's clock."""
        self.changed = False
        """The own part changed since it was last told to peers; whoever tells it sets this to False."""
        self.on_change: Callable[[Work, int], None] | None = None
        """Told when the own part begins to differ from what peers know, and of every dispatch of `AT_ONCE_TOKENS`."""
        self._own = [0, 0, 0, 0]
        self._peers: dict[str, Totals] = {}

    @property
    def own(self) -> Totals:
        return Totals(*self._own)

    @property
    def peers(self) -> Iterable[tuple[str, Totals]]:
        return self._peers.items()

    def queue(self, uncached_tokens: int, now: float) -> None:
        """A request was dispatched."""
        if not self.queued:
            self.since = now
        self.queued += 1
        self.queued_tokens += uncached_tokens
        own = self._own
        own[0] += 1
        own[1] += uncached_tokens
        if not self.changed or uncached_tokens >= AT_ONCE_TOKENS:
            self._tell(uncached_tokens)

    def unqueue(self, uncached_tokens: int, now: float) -> None:
        """It ended, one way or the other, before its first token."""
        self.queued -= 1
        self.queued_tokens -= uncached_tokens
        own = self._own
        own[0] -= 1
        own[1] -= uncached_tokens
        self.since = now
        if not self.changed:
            self._tell()

    def begin(self, uncached_tokens: int, tokens: int, now: float) -> None:
        """Its first token came; from now on it holds `tokens` of KV cache."""
        self.unqueue(uncached_tokens, now)
        self.running += 1
        self.running_tokens += tokens
        own = self._own
        own[2] += 1
        own[3] += tokens

    def end(self, tokens: int) -> None:
        """It ended after its first token; `tokens` as given to `begin`."""
        self.running -= 1
        self.running_tokens -= tokens
        own = self._own
        own[2] -= 1
        own[3] -= tokens
        if not self.changed:
            self._tell()

    def _tell(self, uncached_tokens: int = 0) -> None:
        self.changed = True
        if self.on_change is not None:
            self.on_change(self, uncached_tokens)

    def peer(self, name: str, totals: Totals | None, now: float) -> None:
        """What a peer says of its own work here; None: it has none any more, or has died."""
        before = self._peers.pop(name, NOTHING)
        after = NOTHING if totals is None else totals
        if totals is not None and totals != NOTHING:
            self._peers[name] = totals
        if not self.queued or after.queued < before.queued:
            self.since = now
        self.queued += after.queued - before.queued
        self.queued_tokens += after.queued_tokens - before.queued_tokens
        self.running += after.running - before.running
        self.running_tokens += after.running_tokens - before.running_tokens
