"""SGLang's cache_aware as it really behaves: thresholds, one tenant to a node, its switch, its tree and eviction."""

from __future__ import annotations

from collections import Counter
from random import Random

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

from routing.policies import make_policy
from routing.policies.sglang import COMMAND_LINE, FORGET_S, LIBRARY, CacheAware, Settings, Tree
from routing.prefix import Prefix
from routing.types import Replica
from tests.routing.policies.examples import BLOCK, NOW, prompt, replica, replicas, request, view


def policy(settings: Settings = LIBRARY) -> CacheAware:
    return CacheAware("sglang_cache_aware", settings, Random(1))


def test_the_two_sets_of_defaults() -> None:
    assert Settings(0.5, 32, 1.1, 30.0, 10_000) == LIBRARY
    assert Settings(0.3, 64, 1.5, 120.0, 67_108_864) == COMMAND_LINE
    for name, settings in (("sglang_cache_aware", LIBRARY), ("sglang_cache_aware_cli", COMMAND_LINE)):
        made = make_policy(name, Random(1))
        assert isinstance(made, CacheAware)
        assert (made.name, made.settings) == (name, settings)


def test_a_match_decides_when_it_is_more_than_the_threshold_and_not_when_it_is_just_that() -> None:
    fleet = replicas(2)
    chooser = policy()
    chooser.tree.insert(prompt("ab"), fleet[0])
    fleet[0].in_flight = 5
    assert chooser(request("abXY"), fleet, view()) is fleet[1]  # 200 of 400 are not more than 0.5
    chooser = policy()
    chooser.tree.insert(prompt("abc"), fleet[0])
    assert chooser(request("abcXY"), fleet, view()) is fleet[0]  # 300 of 500


def test_the_command_lines_threshold_is_lower() -> None:
    fleet = replicas(2)
    fleet[0].in_flight = 5
    for settings, expected in ((LIBRARY, fleet[1]), (COMMAND_LINE, fleet[0])):
        chooser = policy(settings)
        chooser.tree.insert(prompt("ab"), fleet[0])
        assert chooser(request("abXYZ"), fleet, view()) is expected  # 0.4


def test_a_ratio_decides_and_not_what_it_would_save() -> None:
    fleet = replicas(2)
    chooser = policy(COMMAND_LINE)
    long, short = "abcdefghijklmnopqrst", "XY"
    chooser.tree.insert(prompt(long), fleet[0])
    chooser.tree.insert(prompt(short), fleet[0])
    fleet[0].in_flight = 1
    assert chooser(request(short + "Z"), fleet, view()) is fleet[0]  # saves 200
    assert chooser(request(long + "1" * 50), fleet, view()) is fleet[1]  # would save 2,000 of 7,000


def test_out_of_balance_takes_both_the_difference_and_the_ratio() -> None:
    def chosen(most: int, least: int, settings: Settings = LIBRARY) -> str:
        holder, other = replica("holder", in_flight=most), replica("other", in_flight=least)
        chooser = policy(settings)
        chooser.tree.insert(prompt("abc"), holder)
        return chooser(request("abc"), [holder, other], view()).name

    assert chosen(32, 0) == "holder"  # 32 is not more than 32
    assert chosen(33, 0) == "other"
    assert chosen(363, 330) == "holder"  # 363 is not more than 1.1 x 330
    assert chosen(364, 330) == "other"
    assert chosen(64, 0, COMMAND_LINE) == "holder"
    assert chosen(65, 0, COMMAND_LINE) == "other"
    assert chosen(195, 130, COMMAND_LINE) == "holder"  # 195 is 1.5 x 130
    assert chosen(196, 130, COMMAND_LINE) == "other"


def test_out_of_balance_the_shortest_queue_is_chosen_and_learned() -> None:
    fleet = replicas(3)
    fleet[0].in_flight, fleet[1].in_flight, fleet[2].in_flight = 50, 3, 2
    chooser = policy()
    assert chooser(request("abc"), fleet, view()) is fleet[2]
    fleet[0].in_flight = 3
    assert chooser(request("abc"), fleet, view()) is fleet[2]  # in balance again, and by its match


def test_a_node_names_one_tenant_only_who_came_first() -> None:
    fleet = replicas(3)
    chooser = policy()
    for each in fleet:
        chooser.tree.insert(prompt("abc"), each)
    fleet[0].in_flight = 20
    # All three hold it and two are idle, but the tree says the first.
    assert {chooser(request("abc"), fleet, view()) for _ in range(10)} == {fleet[0]}


def test_who_came_first_is_named_again_when_it_comes_back_before_anybody_looked() -> None:
    first, second = replicas(2)
    tree = Tree()
    tree.insert(prompt("abc"), first)
    tree.insert(prompt("abc"), second)
    tree.evict(1000, gone=[first])
    tree.insert(prompt("abc"), first)
    assert tree.match(prompt("abc")) == (300, first)
    tree.evict(1000, gone=[first])
    assert tree.match(prompt("abc")) == (300, second)
    tree.insert(prompt("abc"), first)
    assert tree.match(prompt("abc")) == (300, second)


def test_the_deepest_node_decides_whoever_else_holds_most_of_it() -> None:
    fleet = replicas(2)
    chooser = policy()
    chooser.tree.insert(prompt("abcdefgh"), fleet[0])
    chooser.tree.insert(prompt("abcdefghX"), fleet[1])
    fleet[1].in_flight = 9
    assert chooser(request("abcdefghXY"), fleet, view()) is fleet[1]
    assert chooser(request("abcdefghY"), fleet, view()) is fleet[0]


def test_below_the_threshold_the_least_loaded_and_among_equals_who_has_had_fewest() -> None:
    fleet = replicas(3)
    chooser = policy()
    assert [chooser(request(letter), fleet, view()).name for letter in "abcdef"] == ["r0", "r1", "r2"] * 2
    fleet[0].in_flight = 1
    assert [chooser(request(letter), fleet, view()).name for letter in "ghij"] == ["r1", "r2"] * 2


def test_when_the_tenant_may_not_be_used_the_first_candidate_gets_all_of_it_and_nobody_learns() -> None:
    fleet = replicas(4)
    chooser = policy()
    chooser.tree.insert(prompt("abc"), fleet[3])
    fleet[0].in_flight = 30
    for _ in range(5):
        assert chooser(request("abc"), fleet[:3], view()) is fleet[0]
    assert chooser.tree.match(prompt("abc")) == (3 * BLOCK, fleet[3])
    assert fleet[0] not in chooser.tree.sizes


def test_a_conversations_next_turn_is_matched_to_the_end_of_the_last_one() -> None:
    fleet = replicas(2)
    chooser = policy()
    first = prompt("ab", total=290)
    assert chooser.tree.match(first) == (0, None)
    chooser.tree.insert(first, fleet[1])
    assert chooser.tree.match(first) == (290, fleet[1])
    grown = prompt("abcd")
    next_turn = Prefix(grown.digests, grown.ends, 450, [(1, 450), first.tails[0]], 1.0)
    assert chooser.tree.match(next_turn) == (290, fleet[1])
    chooser.tree.insert(next_turn, fleet[0])
    assert chooser.tree.sizes == {fleet[1]: 290, fleet[0]: 450}
    assert chooser.tree.match(next_turn) == (450, fleet[0])


def test_a_prompt_of_nothing_matches_nothing() -> None:
    chooser, fleet = policy(), replicas(2)
    empty = Prefix([], [], 0, [], 1.0)
    used = {chooser(request(), fleet, view()) for _ in range(4)}
    one = request()
    one.prefix = empty
    used |= {chooser(one, fleet, view()) for _ in range(4)}
    assert used == set(fleet)
    assert chooser.tree.sizes == {}


def test_a_part_of_the_tree_is_cut_down_leaves_first_the_longest_unused_first() -> None:
    one, other = replicas(2)
    tree = Tree()
    for path in ("ax", "ay", "az"):
        tree.insert(prompt(path), one)
    tree.insert(prompt("ax"), other)
    tree.insert(prompt("ay"), one)  # used again
    assert tree.sizes == {one: 400, other: 200}
    tree.evict(200)
    assert tree.sizes == {one: 200, other: 200}
    assert tree.match(prompt("ay")) == (200, one)
    assert tree.match(prompt("az")) == (100, one)
    assert tree.match(prompt("ax")) == (200, other)  # held by another now, who is named from now on
    tree.evict(100)
    assert tree.match(prompt("ay"))[0] == 100


def test_a_branch_goes_whole_before_a_younger_leaf() -> None:
    one = replica("one")
    tree = Tree()
    tree.insert(prompt("abcd"), one)
    tree.insert(prompt("xy"), one)
    tree.evict(300)
    assert tree.match(prompt("xy")) == (200, one)
    assert tree.match(prompt("abcd")) == (100, one)


def test_eviction_runs_by_its_interval_and_keeps_the_tree_bounded() -> None:
    fleet = replicas(2)
    chooser = policy()
    letters = "abcdefghijklmnopqrstuvwxyz"
    rng = Random(1)
    for number in range(400):
        chooser(request("".join(rng.choices(letters, k=8))), fleet, view(now=NOW + number / 10))
    before = max(chooser.tree.sizes.values())
    assert before > LIBRARY.max_tree_size  # 10 s after the last one
    chooser(request("q"), fleet, view(now=NOW + 61.0))
    assert max(chooser.tree.sizes.values()) <= LIBRARY.max_tree_size + 8 * BLOCK
    assert len(chooser.tree._nodes) <= sum(chooser.tree.sizes.values()) / BLOCK


def test_replicas_long_gone_leave_the_tree() -> None:
    fleet = replicas(3)
    chooser = policy()
    for number, letter in enumerate("abcdef"):
        chooser(request(letter), fleet, view(now=NOW + number))
    for number in range(2):
        chooser(request("x"), fleet[:2], view(now=NOW + (FORGET_S + 60.0) * (number + 1)))
    assert set(chooser.tree.sizes) <= set(fleet[:2])
    assert all(set(node.tenants) <= set(fleet[:2]) for node in chooser.tree._nodes.values())


@hypothesis.settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=5), st.integers(0, 2), st.none() | st.integers(0, 900)),
        max_size=25,
    )
)
def test_sizes_are_what_the_nodes_hold_whatever_happens(steps: list[tuple[str, int, int | None]]) -> None:
    fleet, tree = replicas(3), Tree()
    for path, index, limit in steps:
        tree.insert(prompt(path, total=len(path) * BLOCK + 50 * (index == 1)), fleet[index])
        if limit is not None:
            tree.evict(limit)
            assert all(size <= limit for size in tree.sizes.values())
        held: Counter[Replica] = Counter()
        for node in tree._nodes.values():
            assert node.tenants
            for tenant in node.tenants:
                held[tenant] += node.length
        assert held == {tenant: size for tenant, size in tree.sizes.items() if size}
        matched, named = tree.match(prompt(path))
        assert (named is None) == (matched == 0)
