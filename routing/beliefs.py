"""What one replica is believed to have in its cache: the keys of prompts, least recently used first, within a budget.

Engines drop what was not used for longest, the end of a prompt before its beginning. So does this: a prompt's keys are
touched from its end to its beginning, and the oldest go when the budget is exceeded. Hence whoever holds a key holds
all keys before it in the same prompt.

Ages are kept in sixteenths of a cache's turnover: a key's value tells in which `_GENERATIONS` of touches it was last
used, so that the tokens used since are a short sum. By them a budget that was wrong is corrected (`Beliefs.learn`).

Memory: a dictionary's entry and a part of an integer per key, no more. Its value is one of 4,096 integers that all
replicas share, with the tokens it stands for rounded to one of 64 sizes.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from routing.prefix import Digest, Prefix

SHRINK = 0.98
"""Of the budget, for a prompt that was believed to be there and was not."""
NEARER = 0.2
"""Part of the way from a budget to the age of what was found missing."""
GROWTH = 1.03
"""Of the budget, for a prompt that was there although it had been given up for want of budget."""
MAX_FACTOR = 8.0
"""A learned budget is at most so many times what it was at the start."""
MIN_FACTOR = 1 / 256
NEAR_TOKENS = 128
"""Differences up to this and a quarter (an eighth where there is more than predicted) are those of checkpoints, pages
and estimates: where tokens are estimated from the length of a text, its beginning may have fewer than its share."""
MAX_BYTES = 96
"""Of a dictionary for each of its keys. One that loses and gains keys is mostly holes, of 20 bytes each: up to five for
each key, for CPython makes it thrice as large as needed whenever it is full (`GROWTH_RATE`, `Objects/dictobject.c`)."""
SLACK = 64
"""One part of so many of the budget goes beyond what must, so that not every new key costs a search."""

_SIZES = [round(8 * 1.2**step) for step in range(64)]
"""Tokens a key may stand for, 8 to 780,000: each of them at most a tenth from the truth."""
_LIMITS = [(low + high) / 2 for low, high in pairwise(_SIZES)]
TOKENS_OF = [_SIZES[value >> 2 & 63] for value in range(4096)]
"""By value: bits 0 and 1 are `SHARED` and `CONFIRMED`, 2 to 7 the size, 8 to 11 the generation."""
SHARED = 1
"""Somebody else than the request that added it has used it since."""
CONFIRMED = 2
"""A request that had it has been answered, or the engine has said that it holds it."""
_REST = 0xFF
_GENERATIONS = 16
_SPAN = 12
"""A generation is closed after one part of so many of the budget, so that all of it lasts for less than 16."""
_GHOSTS = 4096
"""Places for what was given up, each by 16 bits of its key: some of the last of them are found again."""
_MAX_ASKED = 1024
_UNCONFIRMED = -1


def rounded(tokens: float) -> int:
    """The size that stands for so many tokens."""
    return _SIZES[bisect_right(_LIMITS, tokens)]


class Beliefs:
    """One replica's keys. `held` maps each to its value, the oldest first; it is replaced by another now and then."""

    __slots__ = (
        "_asked",
        "_ghosts",
        "_now",
        "_used",
        "_values",
        "budget",
        "held",
        "start",
        "tokens",
    )

    def __init__(self, budget_tokens: int, values: Sequence[int]) -> None:
        """`values`: the integers 0 to 4,095, shared by all that are made."""
        self.start = self.budget = max(1, budget_tokens)
        self._values = values
        self.clear()

    def clear(self) -> None:
        """The cache is empty. What was learned of its size stays."""
        self.held: dict[Digest, int] = {}
        self.tokens = 0
        self._now = 0
        """Generation, as it stands in values."""
        self._used = [0] * _GENERATIONS
        """Tokens of the keys of each generation."""
        self._ghosts: array[int] | None = None
        self._asked: dict[Digest, int] = {}
        """For prompts, by their last key: tokens used, at the last time they came, since what was found of them had
        been used before; nothing where it was in use. Requests with the same prompt share it."""

    def resize(self, budget_tokens: int) -> list[Digest]:
        """Another budget; what was learned of the old one is void. Returns the keys that it cost."""
        if budget_tokens != self.start:
            self.start = self.budget = max(1, budget_tokens)
        return self.fit()

    def insert(self, prefix: Prefix) -> tuple[list[Digest], list[Digest]]:
        """Use a prompt: its new keys, and those that had not been used in this generation; the longest first."""
        held, values, now = self.held, self._values, self._now
        pop = held.pop
        ends, digests, scale = prefix.ends, prefix.digests, prefix.unit_tokens
        new: list[Digest] = []
        renewed: list[Digest] = []
        tokens = 0
        found = None
        last = len(digests)
        keys = digests
        if prefix.tails and (not last or prefix.tails[0][0] != digests[-1]):
            keys = [*digests, prefix.tails[0][0]]
        place = len(keys)
        while place:
            place -= 1
            digest = keys[place]
            value = pop(digest, None)
            if value is None:
                begin = ends[place - 1] if place else 0
                end = ends[place] if place < last else prefix.tails[0][1]
                size = bisect_right(_LIMITS, (end - begin) * scale)
                tokens += _SIZES[size]
                value = now | size << 2
                new.append(digest)
            else:
                if found is None:
                    found = value
                if value & ~_REST != now:
                    renewed.append(digest)
                    value = self._moved(value)
                value |= SHARED
            held[digest] = values[value]
        if found is not None and (found & ~_REST != now or not found & CONFIRMED):
            self._remember(keys[-1], found)
        elif self._asked and keys:
            self._asked.pop(keys[-1], None)
        if tokens:
            self.tokens += tokens
            self._used[now >> 8] += tokens
        if renewed or tokens:
            self._turn()
        return new, renewed

    def add(self, digests: Sequence[Digest], tokens: Sequence[int], confirmed: bool) -> int:
        """Take over from somebody who knows, the oldest first. Returns how many were new.

        `confirmed`: it is the engine who knows.
        """
        held, values, now = self.held, self._values, self._now
        mark = CONFIRMED if confirmed else 0
        fresh = 0
        for digest, weight in zip(digests, tokens, strict=True):
            value = held.pop(digest, None)
            if value is None:
                fresh += 1
                size = bisect_right(_LIMITS, weight)
                self.tokens += _SIZES[size]
                self._used[now >> 8] += _SIZES[size]
                value = now | size << 2
            elif value & ~_REST != now:
                value = self._moved(value) | SHARED
            else:
                value |= SHARED
            held[digest] = values[value | mark]
        self._turn()
        return fresh

    def drop(self, digests: Sequence[Digest]) -> list[Digest]:
        """The request that added these has failed. Returns what has gone: not what others have used since."""
        return self._remove(digests, SHARED | CONFIRMED, 0)

    def discard(self, digests: Sequence[Digest]) -> list[Digest]:
        """The engine has dropped these. Returns what has gone: not what a request under way is bringing there."""
        return self._remove(digests, CONFIRMED, CONFIRMED)

    def learn(self, prefix: Prefix, predicted_tokens: int, reported_tokens: int) -> bool:
        """A request was answered: what of its prompt was believed to be there, and what was. Returns whether the budget
        has changed; the caller calls `fit`.

        Less than predicted: the engine gives things up sooner. Where what was missed had not been used for some time,
        it has kept less than was used since, so the budget goes part of the way to that. Nothing follows where no
        request with that prompt had been answered by then: it was still to be computed.

        More than predicted: the budget grows if the difference had been believed and was given up for want of budget.
        It does not where it was never known: answers of the model and prompts that came past other gateways are cached
        as well.
        """
        keys, ends, scale = prefix.digests, prefix.ends, prefix.unit_tokens
        last = prefix.tails[0][0] if prefix.tails else keys[-1] if keys else 0
        age = self._asked.get(last, 0)
        self._confirm(last, keys)
        before = self.budget
        if predicted_tokens - reported_tokens > NEAR_TOKENS + predicted_tokens / 4:
            if age != _UNCONFIRMED:
                budget = self.budget * SHRINK
                if age:
                    budget = min(budget, self.budget + (age + self.budget / _SPAN - self.budget) * NEARER)
                self.budget = int(max(budget, self.start * MIN_FACTOR, 1))
        elif reported_tokens - predicted_tokens > NEAR_TOKENS + reported_tokens / 8:
            for digest, end in zip(keys, ends, strict=True):
                if predicted_tokens < end * scale <= reported_tokens and self._was_given_up(digest):
                    self.budget = min(int(self.budget * GROWTH) + 1, int(self.start * MAX_FACTOR))
                    break
        return self.budget != before

    def fit(self) -> list[Digest]:
        """Give up the oldest keys if there are more than the budget. Returns what has gone."""
        if self.tokens <= self.budget:
            return []
        gone = self.give_up(self.tokens - self.budget + self.budget // SLACK)
        ghosts = self._ghosts
        if ghosts is None:
            ghosts = self._ghosts = array("H", bytes(2 * _GHOSTS))
        for digest in gone:
            ghosts[digest % _GHOSTS] = digest >> 40 & 0xFFFF
        return gone

    def give_up(self, tokens: int, most: int | None = None) -> list[Digest]:
        """Forget the oldest keys, of so many tokens at least or all of them, and of `most` keys at most."""
        gone: list[Digest] = []
        left = tokens
        used = self._used
        for digest, value in self.held.items():
            if left <= 0 or len(gone) == most:
                break
            size = TOKENS_OF[value]
            used[value >> 8] -= size
            left -= size
            gone.append(digest)
        held = self.held
        if len(gone) == len(held):
            held.clear()
        else:
            # Taken from the front one by one, each would be searched behind the holes that those before have left.
            for digest in gone:
                del held[digest]
        self.tokens -= tokens - left
        if sys.getsizeof(held) > MAX_BYTES * len(held) + 1000:
            self.held = dict(held)
        return gone

    def age(self, digest: Digest) -> int | None:
        """Tokens that were used since this key was, to within a generation; None when it is not held."""
        value = self.held.get(digest)
        return None if value is None else self._since(value)

    def _remove(self, digests: Sequence[Digest], marks: int, wanted: int) -> list[Digest]:
        """Forget those of which the `marks` are as `wanted`."""
        gone = []
        held, used = self.held, self._used
        for digest in digests:
            value = held.get(digest)
            if value is not None and value & marks == wanted:
                del held[digest]
                size = TOKENS_OF[value]
                self.tokens -= size
                used[value >> 8] -= size
                gone.append(digest)
        return gone

    def _moved(self, value: int) -> int:
        """The value of a key that is used now."""
        size = TOKENS_OF[value]
        self._used[value >> 8] -= size
        self._used[self._now >> 8] += size
        return value & _REST | self._now

    def _turn(self) -> None:
        """Begin another generation when this one is full, unless that would be taken for the oldest."""
        now = self._now >> 8
        following = (now + 1) % _GENERATIONS
        if self._used[now] > self.budget // _SPAN and not self._used[following]:
            self._now = following << 8

    def _since(self, value: int) -> int:
        """Tokens of the generations after a value's own."""
        generation, now = value >> 8, self._now >> 8
        used = self._used
        if generation <= now:
            return sum(used[generation + 1 : now + 1])
        return sum(used[generation + 1 :]) + sum(used[: now + 1])

    def _remember(self, last: Digest, found: int) -> None:
        asked = self._asked
        if len(asked) >= _MAX_ASKED:
            asked.clear()  # most of them have been answered
        asked[last] = self._since(found) if found & CONFIRMED else _UNCONFIRMED

    def _confirm(self, last: Digest, keys: Sequence[Digest]) -> None:
        held, values = self.held, self._values
        value = held.get(last)
        if value is not None:
            held[last] = values[value | CONFIRMED]
        for digest in reversed(keys):
            value = held.get(digest)
            if value is not None:
                if value & CONFIRMED and digest != last:
                    break  # so are those before it
                held[digest] = values[value | CONFIRMED]

    def _was_given_up(self, digest: Digest) -> bool:
        return self._ghosts is not None and self._ghosts[digest % _GHOSTS] == digest >> 40 & 0xFFFF
