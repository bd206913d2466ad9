"""Prefix keys: equal for equal prefixes and only for these, few, and where they are said to be."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.keys import (
    ANSWER,
    BLOCK_BYTES,
    BLOCK_TOKENS,
    MAX_BLOCKS,
    SEPARATOR,
    TAILS,
    block_prefix,
    checkpoints,
    packed,
    seed_of,
    text_prefix,
    token_prefix,
)
from routing.prefix import Prefix

SEED = seed_of("chat")
texts = st.text(max_size=40).map(str.encode)
pieces = st.lists(st.one_of(texts, st.binary(min_size=1, max_size=4).map(lambda piece: piece.hex().encode() * 300)))


def shared(a: Prefix, b: Prefix) -> int:
    """Units that two prompts have in common as far as their keys tell: what an index would say of the first for the
    second."""
    known = {*a.digests, a.tails[0][0]} if a.tails else set()
    found = [end for digest, end in zip(b.digests, b.ends, strict=True) if digest in known]
    found += [end for digest, end in b.tails if digest in known]
    return max(found, default=0)


def common(a: bytes, b: bytes) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_checkpoints_are_never_more_than_an_eighth_apart() -> None:
    blocks = checkpoints()
    assert blocks[:19] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22]
    assert blocks[-1] > MAX_BLOCKS * 8 // 9
    for before, after in pairwise(blocks[7:]):
        assert before < after <= before * 9 / 8


def test_a_prompt_of_128k_tokens_has_about_fifty_keys() -> None:
    prefix = text_prefix([b"x" * 524_288], SEED, 131_072)
    assert 45 <= len(prefix.digests) <= 55
    assert prefix.unit_tokens == 0.25
    tokens = token_prefix(range(131_072), SEED)
    assert len(tokens.digests) == len(prefix.digests)
    assert tokens.ends == [end // 4 for end in prefix.ends]


def test_a_short_prompt_has_no_checkpoint_but_its_tail() -> None:
    prefix = text_prefix([b"abc"], SEED, 1)
    assert (prefix.digests, prefix.ends, prefix.total) == ([], [], 3)
    assert [end for _, end in prefix.tails] == [3]


def test_no_prompt_has_no_keys() -> None:
    for prefix in (text_prefix([], SEED, 0), text_prefix([b""], SEED, 7), token_prefix([], SEED), token_prefix(b"", 1)):
        assert (prefix.digests, prefix.tails, prefix.total) == ([], [], 0)
    assert block_prefix([], 512, 0, SEED).tails == []


@given(parts=pieces, tokens=st.integers(0, 10_000))
def test_positions_grow_and_stay_inside_the_prompt(parts: list[bytes], tokens: int) -> None:
    prefix = text_prefix(parts, SEED, tokens)
    assert prefix.total == len(SEPARATOR.join(parts))
    assert prefix.ends == sorted(set(prefix.ends))
    assert all(end % BLOCK_BYTES == 0 and 0 < end <= prefix.total for end in prefix.ends)
    positions = [end for _, end in prefix.tails]
    assert positions == sorted(set(positions), reverse=True)
    assert len(positions) <= TAILS
    if prefix.total:
        assert positions[0] == prefix.total
        assert positions[-1] > 0
        assert prefix.total * prefix.unit_tokens == pytest.approx(tokens)
        assert len(prefix.digests) == len(prefix.ends)
    for digest in (*prefix.digests, *(digest for digest, _ in prefix.tails)):
        assert 0 <= digest < 2**64


@given(head=pieces, one=pieces, other=pieces)
def test_keys_are_equal_just_as_far_as_the_text_is(head: list[bytes], one: list[bytes], other: list[bytes]) -> None:
    a, b = text_prefix([*head, *one], SEED, 1), text_prefix([*head, *other], SEED, 1)
    same = common(SEPARATOR.join([*head, *one]), SEPARATOR.join([*head, *other]))
    positions = {end: digest for digest, end in zip(a.digests, a.ends, strict=True)}
    for digest, end in zip(b.digests, b.ends, strict=True):
        if end <= a.total:
            assert (positions[end] == digest) == (end <= same)


@given(parts=st.lists(texts, min_size=1, max_size=12), more=st.lists(texts, min_size=1, max_size=3))
def test_the_next_turn_finds_the_whole_of_the_last_one(parts: list[bytes], more: list[bytes]) -> None:
    before = text_prefix([b"\x03" + part for part in parts], SEED, 1)
    grown = [*(b"\x03" + part for part in parts), ANSWER + b"yes", *(b"\x03" + part for part in more)]
    assert before.tails[0] in text_prefix(grown, SEED, 1).tails


def test_the_last_turn_is_found_before_many_tool_results() -> None:
    asked = [b"\x03system", b"\x03question" * 100]
    answered = [*asked, ANSWER + b"calls", *(b"\x03result %d" % number for number in range(20))]
    before, after = text_prefix(asked, SEED, 1), text_prefix(answered, SEED, 1)
    assert before.tails[0] in after.tails
    assert shared(before, after) == before.total
    once_more = text_prefix([*answered, ANSWER + b"done", b"\x03thanks"], SEED, 1)
    assert {before.tails[0], after.tails[0]} <= set(once_more.tails)


def test_without_answers_tails_are_at_the_last_four_parts() -> None:
    parts = [b"part %d" % number for number in range(9)]
    prefix = text_prefix(parts, SEED, 1)
    assert prefix.tails == [text_prefix(parts[:count], SEED, 1).tails[0] for count in (9, 8, 7, 6)]


def test_a_tail_at_a_checkpoint_is_that_checkpoint() -> None:
    prefix = text_prefix([b"x" * BLOCK_BYTES, b"y" * 9], SEED, 1)
    assert prefix.tails[1] == (prefix.digests[0], BLOCK_BYTES)
    whole = text_prefix([b"x" * BLOCK_BYTES], SEED, 1)
    assert whole.tails == [(prefix.digests[0], BLOCK_BYTES)]


@given(parts=st.lists(texts, min_size=2, max_size=5), data=st.data())
def test_moving_a_character_over_a_boundary_changes_the_keys(parts: list[bytes], data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(parts) - 2))
    parts[number] += b"x"
    moved = [*parts]
    moved[number] = moved[number][:-1]
    moved[number + 1] = b"x" + moved[number + 1]
    assert text_prefix(parts, SEED, 1).tails[0] != text_prefix(moved, SEED, 1).tails[0] or parts == moved
    assert text_prefix([b"".join(parts)], SEED, 1).tails[0] != text_prefix(parts, SEED, 1).tails[0]


def test_what_must_not_share_a_cache_has_other_keys() -> None:
    seeds = [
        seed_of("a"),
        seed_of("b"),
        seed_of("a", "2"),
        seed_of("a2"),
        seed_of("a", adapter="2"),
        seed_of("a", scope="2"),
        seed_of("a", adapter="2", scope="2"),
        seed_of("a", adapter=""),
        seed_of("a", scope=""),
    ]
    assert len(set(seeds)) == len(seeds)
    parts = [b"x" * 2000]
    keys = [set(text_prefix(parts, seed, 1).digests) for seed in seeds]
    assert len(set.union(*keys)) == sum(map(len, keys))


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "from routing.keys import *; seed = seed_of('m', 'w', 'a', 's');"
        "print(seed, text_prefix([b'x' * 700, b'y'], seed, 9), token_prefix(range(300), seed),"
        "block_prefix(range(5), 512, 2500, seed))"
    )
    outputs = set()
    for hash_seed in ("0", "1", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    # Gateways of two versions share one index: a change here needs a new name for what they share.
    assert seed_of("m", "w", "a", "s") == 3_844_165_675_339_337_523


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=600), cut=st.integers(0, 600))
def test_token_ids_may_come_as_numbers_or_packed(tokens: list[int], cut: int) -> None:
    prefix = token_prefix(tokens, SEED, [cut])
    assert prefix == token_prefix(packed(tokens), SEED, [cut])
    assert prefix.unit_tokens == 1.0
    assert prefix.ends == [end for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)]
    if 0 < cut < len(tokens):
        assert prefix.tails[1] == token_prefix(tokens[:cut], SEED).tails[0]


def test_of_many_turns_the_last_are_tails() -> None:
    prefix = token_prefix(range(1000), SEED, [5, 1, 900, 7, 900, 1000, 2000, -3, 300])
    assert [end for _, end in prefix.tails] == [1000, 900, 300, 7]


def test_odd_token_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="four bytes"):
        token_prefix(b"12345", SEED)
    for odd in ([-1], [2**32]):
        with pytest.raises(OverflowError):
            token_prefix(odd, SEED)
    assert packed([1, 258]) == b"\x01\0\0\0\x02\x01\0\0"
    assert array("I").itemsize == 4


@given(ids=st.lists(st.integers(0, 2**63), min_size=1, max_size=300), last=st.integers(1, 512), cut=st.integers(1, 300))
def test_blocks_of_a_trace_match_as_far_as_their_ids_do(ids: list[int], last: int, cut: int) -> None:
    total = (len(ids) - 1) * 512 + last
    a = block_prefix(ids, 512, total, SEED)
    assert (a.total, a.unit_tokens) == (total, 1.0)
    assert a.tails[0][1] == total
    assert all(end % 512 == 0 and end <= total for end in a.ends)
    positions = [end for _, end in a.tails]
    assert positions == sorted(set(positions), reverse=True)
    head = ids[:cut]
    b = block_prefix([*head, *range(2**63 + 1, 2**63 + 40)], 512, (len(head) + 39) * 512, SEED)
    if len(set(ids)) == len(ids):
        # As far as the thinned checkpoints, or one of the last full blocks, tell.
        found = shared(b, a)
        assert found <= len(head) * 512
        assert found >= min(len(head), total // 512) * 512 * 8 // 9 - 512


def test_a_trace_of_many_blocks_is_thinned() -> None:
    prefix = block_prefix(range(1024), 512, 1024 * 512, SEED)
    assert len(prefix.digests) == len(checkpoints(1024)) == 52
    assert [end for _, end in prefix.tails] == [1024 * 512, 1023 * 512, 1022 * 512, 1021 * 512]
    assert prefix == block_prefix(list(range(1024)), 512, 1024 * 512, SEED)


def test_a_tail_reaches_to_the_end_of_the_answer_that_followed_it() -> None:
    asked = [b"system", b"user: one"]
    answer = ANSWER + b"the answer"
    grown = text_prefix([*asked, answer, b"user: two"], SEED, 1)
    before = text_prefix(asked, SEED, 1)
    assert grown.reaches is not None
    place = grown.tails.index(before.tails[0])
    assert grown.reaches[place] == before.total + 1 + len(answer)
    assert grown.reaches[0] == grown.total
    assert len(grown.reaches) == len(grown.tails)
