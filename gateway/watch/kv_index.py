"""Has an engine's KV-cache events correct what routing believes of its cache.

What was sent there by this gateway and its peers is believed from dispatch on, events or not; events come later, and
only add to that or take from it. A stream that is not trusted takes nothing away: then what an engine has dropped is
learned from the cached tokens of its answers, as it is where there are no events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from backends.kvevents.decode import BlockRemoved, BlockStored
from backends.kvevents.stream import Doubt, KvSink
from backends.kvevents.view import DEFAULT_MEDIUM, KvView
from routing.blocks import BlockKeys
from routing.router import PoolState
from routing.types import Replica

Seeds: TypeAlias = Callable[[str | None, str | None], int | None]
"""The seed of keys over tokens for an adapter and a cache salt; None where prompts have no such keys."""

_LEAST_TOKENS = 512
"""Removals are passed on in lots of so many: an engine may tell of them token by token, and a key is some hundreds."""


class KvBridge:
    """The sink of one rank's stream that corrects the index of its pool (`KvSink`). To be told after the view."""

    def __init__(
        self,
        state: PoolState,
        replica: Replica,
        view: KvView,
        rank: int = 0,
        *,
        seeds: Seeds | None = None,
        on_trust: Callable[[], None] | None = None,
    ) -> None:
        """`view` holds all ranks of the replica, this one included.

        With `seeds` keys are over tokens: each block that is stored is believed to be there, and each that is removed
        is not. Without, it is only known how many tokens go, and the oldest do. `on_trust` is called when trust in the
        stream has changed.
        """
        self._state = state
        self._replica = replica
        self._view = view
        self._rank = view.rank(rank)
        self._seeds = seeds
        self._on_trust = on_trust
        self._blocks = BlockKeys()
        self._reason = str(Doubt.CONNECTING)
        self._held = 0
        self._owed = 0.0
        """Tokens that went and for which nothing has been given up yet."""
        state.slot(replica)

    def stored(self, event: BlockStored) -> None:
        self._held = self._rank.held_tokens
        slot = self._slot()
        if self._seeds is None or slot is None or event.opaque_content or event.group:
            return
        seed = 0 if event.parent_hash is not None else self._seeds(event.adapter, event.cache_salt)
        if seed is not None:
            keys, tokens = self._blocks.stored(
                event.block_hashes,
                event.parent_hash,
                event.token_ids,
                event.block_size,
                seed,
                event.medium or DEFAULT_MEDIUM,
            )
            self._state.index.add(slot, keys, tokens, confirmed=True)

    def removed(self, event: BlockRemoved) -> None:
        gone = self._held - self._rank.held_tokens
        self._held -= gone
        slot = self._slot()
        if slot is None:
            return
        if self._seeds is not None:
            if not event.group:
                keys = self._blocks.removed(event.block_hashes, event.medium or DEFAULT_MEDIUM)
                self._state.index.discard(slot, keys)
        elif self._view.trusted and not self._view.truncated:
            self._give_up(slot, gone)

    def cleared(self) -> None:
        self._blocks.clear()
        self._held = 0
        self._owed = 0.0
        # A stream that is being read from its past on tells of a flush that may be long ago.
        if self._reason != Doubt.CONNECTING and self._slot() is not None:
            self._state.begin_anew(self._replica)

    def trust(self, trusted: bool, reason: str) -> None:
        self._reason = reason
        if self._on_trust is not None:
            self._on_trust()

    def _give_up(self, slot: int, gone: int) -> None:
        """The engine has dropped so many tokens: of what is believed, the same part goes, and all beyond what is left.

        The rest of what it holds are answers, and prompts of others.
        """
        index = self._state.index
        held, believed = self._view.held_tokens, index.tokens(slot)
        self._owed += gone * min(1.0, believed / max(1, held + gone))
        if self._owed >= _LEAST_TOKENS:
            index.evict(slot, int(self._owed))
            self._owed -= believed - index.tokens(slot)
        index.shrink(slot, held)

    def _slot(self) -> int | None:
        """None once the replica has left the pool."""
        return self._state.slots.get(self._replica)


class Sinks:
    """Several sinks as one, told in this order."""

    def __init__(self, *sinks: KvSink) -> None:
        self._sinks = sinks

    def stored(self, event: BlockStored) -> None:
        for each in self._sinks:
            each.stored(event)

    def removed(self, event: BlockRemoved) -> None:
        for each in self._sinks:
            each.removed(event)

    def cleared(self) -> None:
        for each in self._sinks:
            each.cleared()

    def trust(self, trusted: bool, reason: str) -> None:
        for each in self._sinks:
            each.trust(trusted, reason)
