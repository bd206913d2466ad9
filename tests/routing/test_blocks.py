"""Keys made from an engine's blocks are those of the same prompts made whole."""

from __future__ import annotations

import gc
from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings

from routing.blocks import BlockKeys
from routing.keys import seed_of, token_prefix

SEED = seed_of("m")


@settings(deadline=None, max_examples=60)
@given(
    block_tokens=st.sampled_from([1, 16, 48, 64, 128, 256]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 3),
)
def test_keys_are_those_of_the_whole_prompt_however_it_was_stored(
    block_tokens: int, lengths: list[int], seed: int
) -> None:
    rng = Random(seed)
    blocks = BlockKeys()
    tokens: list[int] = []
    parent: int | None = None
    for length in lengths:
        new = [rng.randrange(150_000) for _ in range(length * block_tokens)]
        names = [hash((*tokens, *new[: (number + 1) * block_tokens])) for number in range(length)]
        tokens += new
        keys, weights = blocks.stored(names, parent, new, block_tokens, SEED, "GPU")
        expected = token_prefix(tokens, SEED)
        assert keys == expected.digests[::-1]
        assert sum(weights) == (expected.ends[-1] if expected.ends else 0)
        parent = names[-1]


def test_a_conversation_parts_where_its_blocks_do() -> None:
    blocks = BlockKeys()
    common, one, other = [1] * 300, [2] * 300, [3] * 300
    for number, rest in enumerate((one, other)):
        names = [*range(3), *range(10 * number + 3, 10 * number + 6)]
        keys, _ = blocks.stored(names, None, common + rest, 100, SEED, "GPU")
        assert keys == token_prefix(common + rest, SEED).digests[::-1]
    assert len(blocks) == 9
    keys, _ = blocks.stored([20], 2, [4] * 100, 100, SEED, "GPU")
    assert keys == token_prefix(common + [4] * 100, SEED).digests[::-1]


def test_a_removed_block_takes_the_keys_that_lie_in_it() -> None:
    blocks = BlockKeys()
    blocks.stored([1, 2, 3], None, [5] * 384, 128, SEED, "GPU")
    digests = token_prefix([5] * 384, SEED).digests
    assert blocks.removed([3], "GPU") == digests[2:]
    assert blocks.removed([3], "GPU") == []
    assert blocks.stored([3], 2, [5] * 128, 128, SEED, "GPU")[0] == digests[::-1]
    blocks.clear()
    assert blocks.removed([1, 2, 3], "GPU") == []


def test_what_is_kept_in_another_place_is_not_gone() -> None:
    blocks = BlockKeys()
    blocks.stored([1], None, [5] * 128, 128, SEED, "GPU")
    blocks.stored([1], None, [], 128, SEED, "CPU")
    assert blocks.removed([1], "GPU") == []
    assert blocks.removed([1], "CPU") == token_prefix([5] * 128, SEED).digests


def test_nothing_is_made_of_what_continues_nothing_known_or_can_not_be_read() -> None:
    blocks = BlockKeys(max_blocks=3)
    assert blocks.stored([2], 1, [5] * 128, 128, SEED, "GPU") == ([], [])
    assert blocks.stored([2], None, [5] * 100, 128, SEED, "GPU") == ([], [])
    assert blocks.stored([2], None, [-1] * 128, 128, SEED, "GPU") == ([], [])
    assert blocks.stored([2], None, [1 << 40] * 128, 128, SEED, "GPU") == ([], [])
    assert blocks.stored([], None, [], 128, SEED, "GPU") == ([], [])
    assert len(blocks) == 0
    keys, _ = blocks.stored(list(range(5)), None, [5] * 640, 128, SEED, "GPU")
    assert keys == token_prefix([5] * 384, SEED).digests[::-1], "as far as there is room"
    for number in range(40):
        blocks.stored([100], None, [5] * 128, 128, SEED, f"medium {number}")
    assert len(blocks) == 3


def test_what_an_engine_has_removed_is_not_kept_by_what_came_after_it() -> None:
    """With sliding windows the beginning of a prompt goes long before its end."""
    kept = BlockKeys()
    for number in range(4000):
        kept.stored([number], number - 1 if number else None, range(16), 16, SEED, "GPU")
        kept.removed([number - 1], "GPU")
    assert len(kept) == 1
    gc.collect()
    alive = sum(type(each).__name__ == "_Block" for each in gc.get_objects())
    assert alive < 1000, "those since the last checkpoint, an eighth of the prompt at most, and the checkpoints"
    keys, _ = kept.stored([4000], 3999, range(16), 16, SEED, "GPU")
    assert keys == token_prefix([*range(16)] * 4001, SEED).digests[::-1]
