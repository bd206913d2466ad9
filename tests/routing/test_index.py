"""What an index of prefixes promises, and what it learns from an engine's own counts."""

from __future__ import annotations

import tracemalloc
from collections import OrderedDict
from random import Random

import pytest

from routing.index import PrefixIndex
from routing.keys import block_prefix, seed_of, text_prefix, token_prefix
from routing.prefix import Prefix

SEED = seed_of("m")


def prompt(number: int, tokens: int = 2048, common: int = 1024) -> Prefix:
    """Keys over tokens of a prompt whose first `common` are the same for all numbers."""
    return token_prefix([7] * common + [1000 + number] * (tokens - common), SEED)


def test_nothing_is_believed_at_first() -> None:
    index = PrefixIndex()
    assert index.match(prompt(1)) == {}
    index.add_target(10_000)
    assert index.match(prompt(1)) == {}
    assert index.match(Prefix([], [], 0, [])) == {}


def test_a_match_ends_where_prompts_part_and_at_the_end_of_one_to_the_token() -> None:
    index = PrefixIndex()
    one, other = index.add_target(100_000), index.add_target(100_000)
    index.insert(one, prompt(1, 2000))
    assert index.match(prompt(2)) == {one: 1024}
    assert index.match(prompt(1, 2000)) == {one: 2000}
    longer = token_prefix([7] * 1024 + [1001] * 976 + [3] * 500, SEED, turns=[2000])
    assert index.match(longer) == {one: 2000}, "its last turn was the whole prompt"
    index.insert(other, prompt(2))
    assert index.match(longer) == {one: 2000, other: 1024}


def test_prompts_shorter_than_a_checkpoint_are_known_by_their_end() -> None:
    index = PrefixIndex()
    slot = index.add_target(100_000)
    index.insert(slot, token_prefix([1, 2, 3], SEED))
    assert index.match(token_prefix([1, 2, 3], SEED)) == {slot: 3}
    assert index.match(token_prefix([1, 2, 3, 4], SEED)) == {}
    assert index.match(token_prefix([1, 2, 3, 4], SEED, turns=[3])) == {slot: 3}


def test_text_is_matched_in_bytes() -> None:
    index = PrefixIndex()
    slot = index.add_target(100_000)
    index.insert(slot, text_prefix([b"s" * 1000, b"u" * 1000], SEED, 500))
    assert index.match(text_prefix([b"s" * 1000, b"v" * 1000], SEED, 500)) == {slot: 512}


def test_slots_are_the_smallest_free_numbers_and_nothing_is_left_in_them() -> None:
    index = PrefixIndex(many=2)
    assert [index.add_target(10_000) for _ in range(3)] == [0, 1, 2]
    for slot in range(3):
        index.insert(slot, prompt(1))
    assert index.match(prompt(1)) == dict.fromkeys(range(3), 2048)
    index.remove_target(1)
    assert set(index.match(prompt(1))) == {0, 2}
    assert index.add_target(10_000) == 1
    assert set(index.match(prompt(1))) == {0, 2}
    index.insert(1, prompt(1))
    assert set(index.match(prompt(1))) == {0, 1, 2}
    index.reset(1)
    assert set(index.match(prompt(1))) == {0, 2}
    index.reset(2)
    assert set(index.match(prompt(1))) == {0}
    assert index.stats().pairs == index.stats().targets[0].keys


def test_what_failed_is_forgotten_but_for_what_others_have_used() -> None:
    index = PrefixIndex()
    slot = index.add_target(100_000)
    first = index.insert(slot, prompt(1))
    second = index.insert(slot, prompt(2))
    assert set(first).isdisjoint(second)
    index.drop(slot, first)
    assert index.match(prompt(1)) == {slot: 1024}
    index.drop(slot, second)
    assert index.match(prompt(2)) == {slot: 1024}, "the first request's, used by the second"


def test_what_was_answered_is_not_forgotten_by_a_late_failure() -> None:
    index = PrefixIndex()
    slot = index.add_target(100_000)
    new = index.insert(slot, prompt(1))
    index.learn(slot, prompt(1), 0, 0)
    index.drop(slot, new)
    assert index.match(prompt(1)) == {slot: 2048}


def test_peers_believe_what_they_are_told_and_forget_it_when_told() -> None:
    index, peer = PrefixIndex(), PrefixIndex()
    slot = index.add_target(100_000)
    assert peer.add_target(100_000) == slot
    new = index.insert(slot, prompt(1))
    weights = index.weights(slot, new)
    assert sum(weights) == pytest.approx(2048, rel=0.1)
    assert index.weights(slot, [1, 2]) == [0, 0]
    peer.add(slot, new, weights)
    assert peer.match(prompt(1)) == {slot: 2048}
    assert peer.tokens(slot) == index.tokens(slot)
    peer.drop(slot, new)
    assert peer.match(prompt(1)) == {}


def test_a_snapshot_brings_back_keys_and_their_order() -> None:
    index, later = PrefixIndex(), PrefixIndex()
    slot = index.add_target(100_000)
    for number in range(10):
        index.insert(slot, prompt(number))
    later.add_target(100_000)
    later.add(slot, *index.held(slot))
    assert later.held(slot) == index.held(slot)


def test_what_is_in_use_all_the_time_is_told_again() -> None:
    index = PrefixIndex()
    slot = index.add_target(60_000)
    peer_age = 0
    told = 0
    for number in range(200):
        new = index.insert(slot, prompt(number))
        assert set(index.renewed).isdisjoint(new)
        if prompt(0).digests[0] in (*new, *index.renewed):
            told += 1
            peer_age = 0
        else:
            peer_age += sum(index.weights(slot, new))
        assert peer_age < 60_000 / 4, "a peer would have given it up"
    assert 20 < told < 100


def test_an_index_is_bounded_for_each_and_for_all() -> None:
    index = PrefixIndex(max_keys=300)
    slots = [index.add_target(80_000 if number == 0 else 6000) for number in range(8)]
    rng = Random(1)
    for number in range(2000):
        # The first gets most; it is the one that has to give.
        index.insert(rng.choice([*slots, *[slots[0]] * 6]), prompt(number, rng.randrange(10, 9000), 0))
        stats = index.stats()
        assert stats.pairs <= 300
        assert all(each.tokens <= each.budget_tokens for each in stats.targets.values())
    assert index.stats().evicted_budget > 0
    assert index.stats().evicted_cap > 0


def test_where_many_replicas_hold_little_each_the_fullest_is_not_looked_for_at_every_prompt() -> None:
    index = PrefixIndex(max_keys=256 * 40)
    slots = [index.add_target(10**9) for _ in range(256)]
    for number, slot in enumerate(slots):
        index.add(slot, range(1000 * number, 1000 * number + 40), [128] * 40)
    assert index.stats().evicted_cap == 0
    index.add(slots[0], [10**9], [128])
    assert index.stats().evicted_cap >= len(slots) // 64


def test_a_prompt_longer_than_the_budget_is_believed_in_its_beginning() -> None:
    index = PrefixIndex()
    slot = index.add_target(5000)
    new = index.insert(slot, prompt(1, 20_000))
    assert new
    assert set(new) <= set(index.held(slot)[0])
    assert 3000 <= index.match(prompt(1, 20_000))[slot] <= 5500


def test_a_thousand_replicas_are_told_apart() -> None:
    index = PrefixIndex()
    for _ in range(1024):
        index.add_target(100_000)
    for slot in range(1024):
        index.insert(slot, token_prefix([7] * (128 * (1 + slot % 8)), SEED))
    expected = {slot: 128 * (1 + slot % 8) for slot in range(1024)}
    asked = token_prefix([7] * 1024, SEED)
    for _ in range(3):  # without masks, and with them
        assert index.match(asked) == expected
    index.evict(5, 1 << 30)
    index.insert(6, asked)
    assert index.match(asked) == {**{slot: end for slot, end in expected.items() if slot != 5}, 6: 1024}
    index.remove_target(1023)
    assert 1023 not in index.match(asked)


@pytest.mark.parametrize(("targets", "holders"), [(9, 1), (64, 1), (16, 4)])
def test_a_pair_takes_at_most_150_bytes(targets: int, holders: int) -> None:
    """After two turnovers, when dictionaries are full of the holes that keys have left."""
    pairs = 50_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = PrefixIndex(pairs)
        for _ in range(targets):
            index.add_target(1 << 40)
        number = 0
        while index.stats().evicted_cap < 2 * pairs:
            for _ in range(200):
                number += 1
                # Of 40 blocks with two tails each, all in all 26 keys.
                new = block_prefix(range(number * 40, number * 40 + 40), 128, 40 * 128, SEED)
                for turn in range(holders):
                    index.insert((number + turn) % targets, new)
        taken = tracemalloc.get_traced_memory()[0] - before
        assert index.stats().pairs > 0.95 * pairs
        assert taken / index.stats().pairs <= 150
    finally:
        tracemalloc.stop()


class Engine:
    """A cache of blocks of 128 tokens, the end of a prompt dropped before its beginning."""

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity = capacity_tokens // 128
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def run(self, ids: list[int]) -> int:
        """Compute a prompt. Returns how much of it was there, in tokens."""
        cached = next((place for place, block in enumerate(ids) if block not in self.blocks), len(ids))
        for block in reversed(ids):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)
        return cached * 128


CAPACITY = 60_000


def chats(factor: float, learns: bool, requests: int = 4000) -> tuple[float, list[float]]:
    """Chats of 60 customers, each with a system prompt of its own, over two replicas whose caches are taken to hold
    `factor` of what they do. Returns the cached share in the second half, and budgets by capacity at the end."""
    rng = Random(3)
    index = PrefixIndex()
    engines = [Engine(CAPACITY), Engine(CAPACITY)]
    for _ in engines:
        index.add_target(int(CAPACITY * factor))
    chats: dict[int, list[int]] = {}
    load = [0.0, 0.0]
    cached = asked = 0
    for number in range(requests):
        customer = min(int(rng.expovariate(1 / 15)), 59)
        before = chats.get(customer)
        if before is None or len(before) > 60 or rng.random() < 0.2:
            before = [customer * 1000 + block for block in range(20)]
        ids = [*before, *(1_000_000 + number * 100 + block for block in range(rng.randint(1, 6)))]
        keys = block_prefix(ids, 128, 128 * len(ids), SEED)
        found = index.match(keys)
        slot = min((0, 1), key=lambda each: keys.total - found.get(each, 0) + load[each])
        index.insert(slot, keys)
        reported = engines[slot].run(ids)
        load = [0.7 * each for each in load]
        load[slot] += keys.total - reported
        if learns:
            index.learn(slot, keys, found.get(slot, 0), reported)
        chats[customer] = [*ids, 1_000_000 + number * 100 + 50]
        engines[slot].run(chats[customer])  # the answer is cached as well
        if number >= requests / 2:
            cached += reported
            asked += keys.total
    return cached / asked, [each.budget_tokens / CAPACITY for each in index.stats().targets.values()]


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5, 4.0, 20.0])
def test_a_wrong_budget_is_learned(factor: float) -> None:
    truth, _ = chats(1.0, learns=False)
    share, budgets = chats(factor, learns=True)
    assert all(0.7 < each < 1.4 for each in budgets), budgets
    assert share > 0.94 * truth
    if factor in (0.25, 4.0):
        wrong, _ = chats(factor, learns=False)
        assert share > wrong + 0.03


def test_what_is_still_being_computed_is_no_sign_of_a_small_cache() -> None:
    index = PrefixIndex()
    slot = index.add_target(100_000)
    for _ in range(16):
        index.insert(slot, prompt(1))
    for number in range(16):
        index.learn(slot, prompt(1), 2048 if number else 0, 0)
    assert index.stats().targets[slot].factor == 1.0


def test_an_engine_that_caches_nothing_is_soon_believed_to_hold_little() -> None:
    index = PrefixIndex()
    slot = index.add_target(1_000_000)
    for number in range(1000):
        asked = prompt(number % 50)
        predicted = index.match(asked).get(slot, 0)
        index.insert(slot, asked)
        index.learn(slot, asked, predicted, 0)
    assert index.stats().targets[slot].factor < 0.01


def test_answers_and_prompts_of_others_do_not_raise_a_budget() -> None:
    index = PrefixIndex()
    slot = index.add_target(10_000)
    for number in range(100):
        index.insert(slot, prompt(number, common=0))
        index.learn(slot, prompt(number, common=0), 0, 2000)
    assert index.stats().targets[slot].factor == 1.0
    assert index.stats().evicted_budget > 0


def test_a_new_capacity_begins_anew_and_the_same_one_does_not() -> None:
    index = PrefixIndex()
    slot = index.add_target(100_000)
    index.insert(slot, prompt(1))
    index.learn(slot, prompt(1), 0, 0)
    index.learn(slot, prompt(1), 2048, 0)
    assert index.stats().targets[slot].factor == pytest.approx(0.98)
    index.resize(slot, 100_000)
    assert index.stats().targets[slot].factor == pytest.approx(0.98)
    index.resize(slot, 1000)
    assert index.stats().targets[slot].factor == 1.0
    assert index.tokens(slot) <= 1000


def test_what_the_engine_says_it_dropped_is_forgotten_the_oldest_first() -> None:
    index = PrefixIndex()
    slot = index.add_target(100_000)
    for number in range(3):
        index.insert(slot, prompt(number, common=0))
    index.evict(slot, 2048)
    assert index.match(prompt(0, common=0)).get(slot, 0) < 512
    assert index.match(prompt(2, common=0)) == {slot: 2048}
    index.shrink(slot, 2500)
    assert index.match(prompt(1, common=0)).get(slot, 0) < 1024
    assert index.match(prompt(2, common=0)) == {slot: 2048}
    index.shrink(slot, 1 << 40)
    index.evict(slot, -5)
    assert index.match(prompt(2, common=0)) == {slot: 2048}
    assert index.stats().evicted_engine > 0


def test_whoever_has_answered_a_prompt_holds_the_answer_as_well() -> None:
    index = PrefixIndex()
    slot, other = index.add_target(100_000), index.add_target(100_000)
    index.insert(slot, Prefix([1], [512], 700, [(7, 700)], 0.25))
    index.insert(other, Prefix([1], [512], 600, [(6, 600)], 0.25))
    following = Prefix([1, 2], [512, 1024], 1200, [(9, 1200), (7, 700)], 0.25, [1200, 1000])
    assert index.match(following) == {slot: 1000, other: 512}
