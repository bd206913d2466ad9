"""Makes the prefix keys of a prompt (`routing.prefix.Prefix`): from its canonical text, its tokens or a trace's blocks.

Each key is XXH3-64 of what stands between two checkpoints, seeded with the key before it, the first one with
`seed_of`; so it covers everything up to its position. Checkpoints stand at blocks 1 to 8 and from there on at every
eighth block more (9, 10, ... 16, 18, 20, 22, 24, 27, ...), so that a prompt of 1,024 blocks, 512 KB of text, has 52 of
them and a match is known to within an eighth. A tail is a key at a place that is no checkpoint, taken from the
checkpoint before it.

The keys are hints: whoever makes two prompts collide (XXH3 is not meant to withstand that) sends a request to a replica
where nothing is cached. An engine compares tokens.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from xxhash import xxh3_64_intdigest

from routing.prefix import Digest, Prefix

BLOCK_BYTES = 512
"""Of text: about as many tokens as `BLOCK_TOKENS`."""
BLOCK_TOKENS = 128
"""Whole pages of the engines' caches (1 to 64 tokens in SGLang, 16 to 128 in vLLM)."""
SEPARATOR = b"\xff"
"""Between parts. UTF-8 has no such byte, so that no text can imitate the end of a part."""
ANSWER = b"\x01"
"""First byte of the parts that the model itself has written."""
TAILS = 4
MAX_BLOCKS = 1 << 22
"""Beyond this, 2 GiB of text, no further checkpoints are set; the largest body that can be configured has 4 GiB."""

_LOOK_BACK = 64
"""Parts that are looked at for the model's answers: a turn of an agent may have dozens of tool results."""


def checkpoints(most: int = MAX_BLOCKS) -> list[int]:
    """The numbers of blocks after which a key is taken, up to `most`.

    >>> checkpoints(40)
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 27, 30, 33, 37]
    """
    found: list[int] = []
    block = 1
    while block <= most:
        found.append(block)
        block += max(1, block // 8)
    return found


_BLOCKS = checkpoints()
_TEXT_ENDS = [block * BLOCK_BYTES for block in _BLOCKS]
_TOKEN_ENDS = [block * BLOCK_TOKENS for block in _BLOCKS]
_TEXT_ENDS_UP_TO = [_TEXT_ENDS[:count] for count in range(len(_TEXT_ENDS) + 1)]
"""The first so many of them: prompts share these lists, which nobody changes."""
_TEXT_SLICES = [slice(begin, end) for begin, end in pairwise([0, *_TEXT_ENDS])]
_TOKEN_SLICES = [slice(4 * begin, 4 * end) for begin, end in pairwise([0, *_TOKEN_ENDS])]


def seed_of(model: str, weights: str = "", adapter: str | None = None, scope: str | None = None) -> int:
    """What the keys of all prompts begin with that may share a cache: 64 bits, the same in every process.

    `weights` is the version of the model's weights, `scope` the tenant where caches are not shared between tenants.
    """
    pieces = [model.encode(), weights.encode()]
    pieces += [b"\xfe" if optional is None else optional.encode() for optional in (adapter, scope)]
    return xxh3_64_intdigest(SEPARATOR.join(pieces))


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as unsigned 32-bit integers, little-endian.

    Raises `OverflowError` for ids that do not fit, `TypeError` for what is no integer.
    """
    ids = array("I", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def text_prefix(parts: Sequence[bytes], seed: int, tokens: int) -> Prefix:
    """Keys of a prompt in canonical pieces, in the order in which the model reads them, one for each message.

    `parts` are UTF-8, or bytes that UTF-8 has not, except `SEPARATOR`. `tokens` is the length of the prompt as far as
    it is known; it only scales matches. No parts: a prefix without any key.

    Tails are the whole prompt and the last three places where a former prompt of the conversation has ended: before
    parts that begin with `ANSWER`, or, where none does, at the ends of the three parts before the last.
    """
    text = SEPARATOR.join(parts)
    total = len(text)
    if not total:
        return Prefix([], [], 0, [])
    count = bisect_right(_TEXT_ENDS, total)
    ends = _TEXT_ENDS_UP_TO[count]
    digests: list[Digest] = []
    digest = seed
    for piece in _TEXT_SLICES[:count]:
        digest = xxh3_64_intdigest(text[piece.start : piece.stop], digest)
        digests.append(digest)
    # The last tail, written out: most prompts have no other, or two.
    last = ends[-1] if count else 0
    if last < total:
        digest = xxh3_64_intdigest(text[last:], digest)
    tails = [(digest, total)]
    if len(parts) < 2:
        return Prefix(digests, ends, total, tails, tokens / total)
    reaches = [total]
    for end, reach in _turns(parts, total):
        tails.append((_digest_at(text, end, 1, seed, ends, digests), end))
        reaches.append(reach)
    return Prefix(digests, ends, total, tails, tokens / total, reaches)


def token_prefix(tokens: Sequence[int] | bytes, seed: int, turns: Sequence[int] = ()) -> Prefix:
    """Keys of a prompt in tokens: their ids, or the same as unsigned 32-bit integers, little-endian.

    `turns` are the positions, in tokens and in any order, where former prompts of the conversation have ended, as far
    as somebody knows; up to three of them, the last, become tails.

    Raises `ValueError` for bytes that are not a whole number of tokens, `OverflowError` for ids beyond 32 bits.
    """
    data = tokens if isinstance(tokens, bytes) else packed(tokens)
    if len(data) % 4:
        raise ValueError("token ids take four bytes each")
    total = len(data) // 4
    if not total:
        return Prefix([], [], 0, [], 1.0)
    count = bisect_right(_TOKEN_ENDS, total)
    ends = _TOKEN_ENDS[:count]
    digests: list[Digest] = []
    digest = seed
    for piece in _TOKEN_SLICES[:count]:
        digest = xxh3_64_intdigest(data[piece.start : piece.stop], digest)
        digests.append(digest)
    before = sorted((end for end in set(turns) if 0 < end < total), reverse=True)[: TAILS - 1]
    tails = [(_digest_at(data, end, 4, seed, ends, digests), end) for end in (total, *before)]
    return Prefix(digests, ends, total, tails, 1.0)


def block_prefix(block_ids: Sequence[int], block_tokens: int, total_tokens: int, seed: int) -> Prefix:
    """Keys of a prompt that is known by its blocks only, as in Mooncake's traces (FAST'25, `hash_ids` of 512 tokens).

    Each id stands for its block and all before it; equal ids mean equal prefixes. The last block may be shorter than
    `block_tokens`. Tails are the whole prompt and the ends of the last three full blocks, for nobody knows where the
    turns of the conversation were.
    """
    if not block_ids or total_tokens <= 0:
        return Prefix([], [], 0, [], 1.0)
    full = min(len(block_ids), total_tokens // block_tokens)
    numbers = _BLOCKS[: bisect_right(_BLOCKS, full)]
    digests = [_block_digest(block_ids[number - 1], seed) for number in numbers]
    tails = [(_block_digest(block_ids[-1], seed), total_tokens)]
    for number in range(full, max(0, full - TAILS), -1):
        if number * block_tokens < total_tokens and len(tails) < TAILS:
            tails.append((_block_digest(block_ids[number - 1], seed), number * block_tokens))
    return Prefix(digests, [number * block_tokens for number in numbers], total_tokens, tails, 1.0)


def _turns(parts: Sequence[bytes], total: int) -> list[tuple[int, int]]:
    """Where former prompts have ended, in bytes of the joined text, the latest first; and where their answers have."""
    found: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    after = total
    for number in range(len(parts) - 1, max(0, len(parts) - 1 - _LOOK_BACK), -1):
        part = parts[number]
        end = after - len(part) - 1
        if end <= 0:
            break
        if part[:1] == ANSWER:
            found.append((end, after))
            if len(found) == TAILS - 1:
                break
        elif len(others) < TAILS - 1:
            others.append((end, end))
        after = end
    return found or others


def _digest_at(data: bytes, end: int, unit_bytes: int, seed: int, ends: list[int], digests: list[Digest]) -> Digest:
    """The key at any position, in units, from the checkpoints before it."""
    before = bisect_right(ends, end) - 1
    if before < 0:
        return xxh3_64_intdigest(data[: end * unit_bytes], seed)
    if ends[before] == end:
        return digests[before]
    return xxh3_64_intdigest(data[ends[before] * unit_bytes : end * unit_bytes], digests[before])


def _block_digest(block_id: int, seed: int) -> Digest:
    return xxh3_64_intdigest((block_id & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little"), seed)
