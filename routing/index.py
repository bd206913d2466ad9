"""Which replica is believed to hold how much of a prompt: one walk answers for all replicas.

A prompt is known by the keys at its checkpoints (`routing.prefix`). They are believed to be at a replica from the
moment its request is sent there, within a budget for each replica (`routing.beliefs`). Nothing here is certain: an
engine's own count of cached tokens corrects the budgets, and its cache events, where there are any, the keys.

Each replica has a dictionary of its own. Beside them there is one of keys that many replicas hold, the beginnings of
system prompts mostly: it maps a key to a mask of its holders, bit n for slot n, so that a walk over a thousand replicas
is one over the keys. A mask for every key would take twice the memory, most keys being held by one replica.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, count

from routing.beliefs import TOKENS_OF, Beliefs
from routing.prefix import Digest, Prefix

MANY = 16
"""Holders from which on a key's are kept as a mask."""
MAX_COMMON = 8192
"""Masks; at 1,024 replicas 1.5 MB. Beyond that all are made anew, as they are asked for."""
_BITS = bytes.maketrans(b"01", b"\x00\x01")


@dataclass(frozen=True, slots=True)
class TargetStats:
    """One replica at one moment."""

    keys: int
    tokens: int
    """What these stand for, to within a tenth."""
    budget_tokens: int
    factor: float
    """Budget now by budget at the start: what was learned, 1.0 nothing."""


@dataclass(frozen=True, slots=True)
class IndexStats:
    """An index at one moment, for metrics and pages."""

    pairs: int
    """Keys held, one that several replicas hold counted for each."""
    max_keys: int
    evicted_budget: int
    """Keys given up since the start because a replica's budget was exceeded."""
    evicted_cap: int
    """Because all together were more than `max_keys`."""
    evicted_engine: int
    """Because the engine said that it had dropped them, or so many tokens."""
    dropped: int
    """Because the request that brought them has failed."""
    targets: dict[int, TargetStats]
    """By slot."""


class PrefixIndex:
    """All replicas of a pool, each by its slot: the smallest number that was free when it came.

    Every method but `match`, `held` and `stats` changes something. A slot that is not in use is a mistake of the
    caller: `KeyError` or `IndexError`.
    """

    def __init__(self, max_keys: int = 2_000_000, many: int = MANY) -> None:
        """`max_keys`: pairs of a key and a replica in all; beyond them the replica with most gives up its oldest.

        A pair takes 90 to 150 bytes, so the default bounds an index to some 250 MB. Caches of a million tokens have
        about 5,000 pairs each.
        """
        self.renewed: Sequence[Digest] = ()
        """Keys that the last `insert` used for the first time in a twelfth of the replica's turnover. Whoever shares
        an index tells peers of these too, or they would take what is in use all the time for old."""
        self._max_keys = max_keys
        self._many = many
        self._values = list(range(4096))
        self._targets: dict[int, Beliefs] = {}
        self._held: list[dict[Digest, int]] = []
        """Of each slot; an empty one where it is not in use."""
        self._common: dict[Digest, int] = {}
        """Holders of keys that many hold, by the last look at them; kept exact until there are too many."""
        self._pairs = 0
        self._evicted_budget = 0
        self._evicted_cap = 0
        self._evicted_engine = 0
        self._dropped = 0

    def add_target(self, budget_tokens: int) -> int:
        """A new replica, of whose cache `budget_tokens` may be believed."""
        targets = self._targets
        slot = next(number for number in range(len(targets) + 1) if number not in targets)
        target = targets[slot] = Beliefs(budget_tokens, self._values)
        if slot == len(self._held):
            self._held.append(target.held)
        else:
            self._held[slot] = target.held
        return slot

    def remove_target(self, slot: int) -> None:
        """It is gone; its slot may be given to another."""
        self._pairs -= len(self._targets.pop(slot).held)
        self._held[slot] = {}
        self._common.clear()

    def reset(self, slot: int) -> None:
        """Its cache is empty."""
        target = self._targets[slot]
        self._pairs -= len(target.held)
        target.clear()
        self._held[slot] = target.held
        self._common.clear()

    def resize(self, slot: int, budget_tokens: int) -> None:
        """Its capacity has become known, or has changed; what was learned of it begins anew."""
        self._evicted_budget += self._gone(slot, self._targets[slot].resize(budget_tokens))

    def match(self, prefix: Prefix) -> dict[int, int]:
        """The longest believed match in units of the prefix, by slot; slots without one are left out.

        Costs a look-up for each replica, and for those that hold its beginning about log2 of the number of keys more,
        or one for all of them together where many do.
        """
        held, digests, ends = self._held, prefix.digests, prefix.ends
        found: dict[int, int] = {}
        if digests:
            digest = digests[0]
            mask = self._common.get(digest)
            if mask is not None:
                self._walk_masks(digests, ends, mask, found)
            else:
                holders = [slot for slot, keys in enumerate(held) if digest in keys]
                if len(holders) >= self._many:
                    self._walk_masks(digests, ends, self._make_common(digest), found)
                elif holders:
                    self._walk(digests, ends, 0, holders, found)
        reaches = prefix.reaches
        for place, (digest, end) in enumerate(prefix.tails):
            before = bisect_right(ends, end)
            reach = end if reaches is None else reaches[place]
            if before:
                # Who holds the tail holds the checkpoints before it.
                least = ends[before - 1]
                for slot, match in found.items():
                    if least <= match < reach and digest in held[slot]:
                        found[slot] = reach
            else:
                for slot, keys in enumerate(held):
                    if digest in keys and found.get(slot, 0) < reach:
                        found[slot] = reach
        return found

    def _walk(
        self, digests: list[Digest], ends: list[int], first: int, slots: list[int], found: dict[int, int]
    ) -> None:
        """Find the last key that each of these slots holds, all of which hold the one at `first`."""
        for slot in slots:
            keys = self._held[slot]
            low, high = first, len(digests) - 1
            while low < high:
                middle = (low + high + 1) >> 1
                if digests[middle] in keys:
                    low = middle
                else:
                    high = middle - 1
            found[slot] = ends[low]

    def _walk_masks(self, digests: list[Digest], ends: list[int], active: int, found: dict[int, int]) -> None:
        """The same for all slots of a mask, as long as they are many: step by step, for all of them at once."""
        held, common = self._held, self._common
        for place in range(1, len(digests)):
            digest = digests[place]
            mask = common.get(digest)
            if mask is None:
                slots = _slots(active)
                longer = [slot for slot in slots if digest in held[slot]]
                if len(longer) < self._many:
                    found.update(dict.fromkeys(slots, ends[place - 1]))
                    self._walk(digests, ends, place, longer, found)
                    return
                mask = self._make_common(digest)
            remaining = active & mask
            if remaining != active:
                found.update(dict.fromkeys(_slots(active ^ remaining), ends[place - 1]))
                if not remaining:
                    return
                active = remaining
        found.update(dict.fromkeys(_slots(active), ends[-1]))

    def _make_common(self, digest: Digest) -> int:
        """Note who holds a key, so that it need not be looked for at each of them again."""
        if len(self._common) >= MAX_COMMON:
            self._common.clear()
        mask = 0
        for slot, keys in enumerate(self._held):
            if digest in keys:
                mask |= 1 << slot
        self._common[digest] = mask
        return mask

    def insert(self, slot: int, prefix: Prefix) -> tuple[Digest, ...]:
        """Believe a prompt to be there: its checkpoints and its end. Returns the keys that were not, the longest first.

        See `renewed` for those of the others that had not been used for a while.
        """
        target = self._targets[slot]
        new, self.renewed = target.insert(prefix)
        if new:
            self._pairs += len(new)
            self._came(slot, new)
            if self._bound(slot, target):
                new = [digest for digest in new if digest in target.held]
        return tuple(new)

    def add(self, slot: int, digests: Sequence[Digest], tokens: Sequence[int], confirmed: bool = False) -> None:
        """Believe what a peer says: keys in the order of `insert`, and what each stands for (`weights`).

        `confirmed`: it is the engine that says so, not one who has only sent a request there.
        """
        target = self._targets[slot]
        self._pairs += target.add(digests, tokens, confirmed)
        self._came(slot, digests)
        self._bound(slot, target)

    def weights(self, slot: int, digests: Sequence[Digest]) -> Sequence[int]:
        """What each key stands for: tokens between it and the one before, to within a tenth; 0 if it is not held."""
        held = self._held[slot]
        return [TOKENS_OF[held[digest]] if digest in held else 0 for digest in digests]

    def drop(self, slot: int, digests: Sequence[Digest]) -> None:
        """The request has failed that `insert` returned these for. Those that another has used since stay."""
        self._dropped += self._gone(slot, self._targets[slot].drop(digests))

    def learn(self, slot: int, prefix: Prefix, predicted_tokens: int, reported_tokens: int) -> None:
        """What was predicted to be cached of a request's prompt and what the engine says was: see `Beliefs.learn`."""
        target = self._targets[slot]
        if target.learn(prefix, predicted_tokens, reported_tokens):
            self._evicted_budget += self._gone(slot, target.fit())

    def evict(self, slot: int, tokens: int) -> None:
        """The engine says that it has dropped so many tokens: the oldest go."""
        self._evicted_engine += self._gone(slot, self._targets[slot].give_up(tokens))

    def shrink(self, slot: int, tokens: int) -> None:
        """The engine says that it holds so many tokens now, all in all: the oldest beyond them go."""
        self.evict(slot, self._targets[slot].tokens - tokens)

    def discard(self, slot: int, digests: Sequence[Digest]) -> None:
        """The engine says that it has dropped these keys. Those that a request under way is bringing there stay."""
        self._evicted_engine += self._gone(slot, self._targets[slot].discard(digests))

    def held(self, slot: int) -> tuple[list[Digest], list[int]]:
        """All keys of a slot and what each stands for, the oldest first: for a snapshot. `add` takes it back."""
        keys = self._targets[slot].held
        return list(keys), [TOKENS_OF[value] for value in keys.values()]

    def tokens(self, slot: int) -> int:
        """What is believed to be there, in tokens."""
        return self._targets[slot].tokens

    def stats(self) -> IndexStats:
        """What it holds now, and what it gave up so far."""
        return IndexStats(
            self._pairs,
            self._max_keys,
            self._evicted_budget,
            self._evicted_cap,
            self._evicted_engine,
            self._dropped,
            {
                slot: TargetStats(len(each.held), each.tokens, each.budget, each.budget / each.start)
                for slot, each in self._targets.items()
            },
        )

    def _bound(self, slot: int, target: Beliefs) -> bool:
        """Keep within the target's budget and the cap. Returns whether anything had to go."""
        gone = 0
        if target.tokens > target.budget:
            gone = self._gone(slot, target.fit())
            self._evicted_budget += gone
        while self._pairs > self._max_keys:
            fullest = max(self._targets, key=lambda each: len(self._held[each]))
            # So many that looking for the fullest is worth it: with a thousand replicas each has few.
            most = max(self._pairs - self._max_keys, len(self._held[fullest]) // 64, len(self._targets) // 64)
            over = self._targets[fullest]
            over_gone = self._gone(fullest, over.give_up(over.tokens + 1, most))
            self._evicted_cap += over_gone
            gone += over_gone
        return gone > 0

    def _came(self, slot: int, digests: Sequence[Digest]) -> None:
        common = self._common
        if common:
            for digest in digests:
                if digest in common:
                    common[digest] |= 1 << slot

    def _gone(self, slot: int, digests: Sequence[Digest]) -> int:
        """Count what a slot holds no more. Returns how many."""
        self._held[slot] = self._targets[slot].held
        common = self._common
        if common:
            for digest in digests:
                if digest in common:
                    common[digest] &= ~(1 << slot)
        self._pairs -= len(digests)
        return len(digests)


def _slots(mask: int) -> list[int]:
    """The numbers of the bits that are set."""
    return list(compress(count(), bin(mask)[:1:-1].encode().translate(_BITS)))
