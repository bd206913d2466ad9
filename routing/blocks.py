"""From an engine's names of its KV blocks to our prefix keys: what a stream of stored and removed blocks means for us.

Engines tell which blocks they have stored, each with its tokens and the block before it. Their hashes are their own and
differ between versions, so they only serve as names here; the tokens are hashed as `routing.keys.token_prefix` does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from routing.keys import BLOCK_TOKENS, checkpoints, packed
from routing.prefix import Digest

Name: TypeAlias = int | bytes

_ENDS = [block * BLOCK_TOKENS for block in checkpoints(1 << 14)]
"""Up to two million tokens; no keys are made of what lies beyond."""
MAX_MEDIA = 16


@dataclass(slots=True, eq=False)
class _Block:
    """One block that the engine holds, or that came before one."""

    before: _Block | None
    """None at the beginning, and where a checkpoint lies in this one."""
    anchor: _Block | None
    """The nearest block before it in which a checkpoint lies, None if there is none; its digest continues here."""
    end: int
    """Position of its end in tokens."""
    tokens: bytes
    seed: int
    """Of the prompt."""
    keys: list[Digest] = field(default_factory=list)
    """Of the checkpoints that lie in it."""
    weights: list[int] = field(default_factory=list)
    """Tokens that each key stands for."""
    checkpoint: int = 0
    """Position of the last of these."""
    media: int = 0
    """Where it is held, a bit for each medium."""


class BlockKeys:
    """The blocks of one rank of an engine."""

    def __init__(self, max_blocks: int = 131_072) -> None:
        """`max_blocks`: those beyond are not followed, nor what continues them. One takes some 300 bytes."""
        self._max_blocks = max_blocks
        self._blocks: dict[Name, _Block] = {}
        self._media: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        self._blocks.clear()

    def stored(
        self,
        names: Sequence[Name],
        parent: Name | None,
        tokens: Sequence[int],
        block_tokens: int,
        seed: int,
        medium: str,
    ) -> tuple[list[Digest], list[int]]:
        """Take in blocks that continue one another. Returns the keys of the whole prompt up to there, the longest
        first, and the tokens each stands for; nothing for what does not continue anything known.

        `seed`: see `routing.keys.seed_of`; only read where a prompt begins.
        """
        bit = self._bit(medium)
        before = None if parent is None else self._blocks.get(parent)
        if not bit or (before is None and parent is not None):
            return [], []
        try:
            data = packed(tokens)
        except OverflowError:
            return [], []
        if len(data) != 4 * block_tokens * len(names):
            # Nothing says which tokens are whose. What is known already is held in another place as well.
            for name in names:
                if name in self._blocks:
                    self._blocks[name].media |= bit
            return [], []
        size = 4 * block_tokens
        rest: bytearray | None = None
        for number, name in enumerate(names):
            block = self._blocks.get(name)
            if block is None:
                if len(self._blocks) >= self._max_blocks or (before is not None and before.end >= _ENDS[-1]):
                    break
                rest = _rest(before) if rest is None else rest
                block = _next(before, rest, data[number * size : (number + 1) * size], block_tokens, seed)
                self._blocks[name] = block
            else:
                rest = None
            block.media |= bit
            before = block
        return _keys_up_to(before)

    def removed(self, names: Sequence[Name], medium: str) -> list[Digest]:
        """Forget blocks. Returns the keys that the engine holds nowhere now."""
        bit = self._bit(medium)
        gone: list[Digest] = []
        for name in names:
            block = self._blocks.get(name)
            if block is not None:
                block.media &= ~bit
                if not block.media:
                    del self._blocks[name]
                    gone += block.keys
        return gone

    def _bit(self, medium: str) -> int:
        """0 for one of too many."""
        bit = self._media.get(medium)
        if bit is None:
            if len(self._media) >= MAX_MEDIA:
                return 0
            bit = self._media[medium] = 1 << len(self._media)
        return bit


def _next(before: _Block | None, rest: bytearray, tokens: bytes, block_tokens: int, seed: int) -> _Block:
    """The block after `before`. `rest`: the tokens since the last checkpoint; those of this block are put to them."""
    anchor = None if before is None else before if before.keys else before.anchor
    if before is not None:
        seed = before.seed
    end = block_tokens + (0 if before is None else before.end)
    block = _Block(before, anchor, end, tokens, seed)
    rest += tokens
    at, digest = (0, seed) if anchor is None else (anchor.checkpoint, anchor.keys[-1])
    for limit in _ENDS[bisect_right(_ENDS, at) :]:
        if limit > end:
            break
        digest = xxh3_64_intdigest(bytes(rest[: 4 * (limit - at)]), digest)
        del rest[: 4 * (limit - at)]
        block.keys.append(digest)
        block.weights.append(limit - at)
        at = block.checkpoint = limit
    if block.keys:
        block.before = None  # nobody looks further back, and it would keep alive what the engine has long removed
    return block


def _rest(block: _Block | None) -> bytearray:
    """The tokens since the last checkpoint before the end of a block, or in it."""
    pieces: list[bytes] = []
    while block is not None:
        if block.keys:
            pieces.append(block.tokens[len(block.tokens) - 4 * (block.end - block.checkpoint) :])
            break
        pieces.append(block.tokens)
        block = block.before
    return bytearray().join(reversed(pieces))


def _keys_up_to(block: _Block | None) -> tuple[list[Digest], list[int]]:
    keys: list[Digest] = []
    weights: list[int] = []
    while block is not None:
        keys += reversed(block.keys)
        weights += reversed(block.weights)
        block = block.anchor
    return keys, weights
