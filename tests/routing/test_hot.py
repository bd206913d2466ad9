"""The most used beginnings of prompts: found, kept within bounds, and forgotten when they are no longer used."""

from __future__ import annotations

import itertools
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.hot import (
    HALF_LIFE_S,
    MAX_NODES,
    MAX_SAMPLE_BYTES,
    MAX_SAMPLES,
    MAX_SAMPLES_BYTES,
    NEW_NODES,
    HotPrefixes,
)

_unique = itertools.count(1_000_000)


def note(
    hot: HotPrefixes[str], path: list[int], text: str = "body", *, now: float = 0.0, regions: tuple[str, ...] = (),
    size: int = 100,
) -> None:  # fmt: skip
    digest = hot.count(path, now)
    if digest is not None and hot.wants(digest, regions, size, now):
        hot.keep(digest, regions, text, size, now)


def own(count: int = 3) -> list[int]:
    """Checkpoints that no other prompt has."""
    return [next(_unique) for _ in range(count)]


def ends(hot: HotPrefixes[str], most: int = 8, now: float = 0.0, region: str | None = None) -> list[int]:
    return [each.sample.digest for each in hot.hottest(most, now, region)]


def test_a_common_beginning_is_found_to_its_end() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for _ in range(20):
        note(hot, [1, 2, 3, 4, 5, 6, 7, 8, 9, *own()])
    assert ends(hot) == [9]
    assert hot.hottest(1, 0.0)[0].uses == 20 - 2  # a long one grows by `NEW_NODES` at a time
    assert NEW_NODES == 4


def test_prompts_that_nobody_shares_are_not_kept() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for _ in range(500):
        note(hot, own(10))
    assert (ends(hot), hot.sample_count) == ([], 0)


def test_a_beginning_goes_as_deep_as_half_of_the_prompts_do() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for number in range(60):
        branch = [2, 3] if number % 3 else [7, 8]  # two thirds and one third
        note(hot, [1, *branch, *own()])
    # 1 is the beginning of both, and is not read by itself.
    assert ends(hot) == [3, 8]


def test_applications_that_share_a_greeting_are_told_apart() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for number in range(200):
        note(hot, [1, 10 + number % 10, *own()])
    assert ends(hot, 64)[0] == 1  # none has half of those with the greeting
    assert set(ends(hot, 64)[1:]) == set(range(10, 20))


def test_nested_beginnings_are_read_once() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for _ in range(10):
        note(hot, [1, 2, *own()], "short")
    for _ in range(12):
        note(hot, [1, 2, 3, 4, *own()], "long")
    assert ends(hot) == [4]
    assert [each.sample.request for each in hot.hottest(8, 0.0)] == ["long"]


def test_the_hottest_come_first_and_no_more_than_asked_for() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for prefix in range(1, 11):
        for _ in range(prefix * 3):
            note(hot, [prefix * 100, *own()])
    assert ends(hot, 3) == [1000, 900, 800]
    assert ends(hot, 0) == []


def test_the_shortest_request_is_kept() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for size in (500, 400, 300, 800):
        note(hot, [1, 2, *own()], f"{size}", size=size)
    assert hot.hottest(1, 0.0)[0].sample.request == "300"
    assert hot.sample_bytes == 300


def test_a_request_that_is_bound_to_regions_goes_nowhere_else() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for _ in range(5):
        note(hot, [1, *own()], "eu only", regions=("eu",))
    assert [ends(hot, region=region) for region in ("eu", "us", None)] == [[1], [], []]
    for _ in range(5):
        note(hot, [1, *own()], "anywhere")
    assert [each.sample.request for each in hot.hottest(8, 0.0, "us")] == ["anywhere"]
    assert [each.sample.request for each in hot.hottest(8, 0.0, "eu")] == ["anywhere"]  # one is enough


def test_what_is_no_longer_used_fades() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for _ in range(100):
        note(hot, [1, *own()])
    later = 5 * HALF_LIFE_S
    for _ in range(10):
        note(hot, [2, *own()], now=later)
    assert ends(hot, now=later) == [2, 1]
    assert ends(hot, now=20 * HALF_LIFE_S) == []


def test_counting_goes_on_for_weeks() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for day in range(0, 60):
        for _ in range(5):
            note(hot, [day // 30 + 1, *own()], now=day * 86_400.0)
    assert ends(hot, now=59 * 86_400.0) == [2]


def test_memory_is_bounded_and_the_hot_ones_survive() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    rng = Random(5)
    for _ in range(20_000):
        path = [rng.randrange(1, 4), *own(6)] if rng.random() < 0.3 else own(7)
        note(hot, path, size=1000)
        assert len(hot._nodes) <= MAX_NODES
    assert set(ends(hot, 3)) == {1, 2, 3}
    assert hot.sample_count <= MAX_SAMPLES
    assert set(digest for digest, _ in hot._samples) <= set(hot._nodes)


def test_bytes_are_bounded_and_the_least_used_make_room() -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    for prefix in range(1, 21):
        for _ in range(prefix + 2):
            note(hot, [prefix, *own()], size=MAX_SAMPLE_BYTES)
    assert hot.sample_bytes <= MAX_SAMPLES_BYTES
    assert ends(hot, 64) == list(range(20, 12, -1))
    for _ in range(50):
        note(hot, [99, *own()], size=MAX_SAMPLE_BYTES + 1)
    assert 99 not in ends(hot, 64)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 40), max_size=6), st.integers(0, 2**21), st.floats(0, 1e5)), max_size=200
    )
)
def test_any_traffic_keeps_the_books_straight(traffic: list[tuple[list[int], int, float]]) -> None:
    hot: HotPrefixes[str] = HotPrefixes()
    now = 0.0
    for path, size, later in traffic:
        now += later
        note(hot, path, now=now, size=size)
        assert hot.sample_bytes == sum(each.size_bytes for each in hot._samples.values())
        assert all(node.count >= node.inherited >= 0.0 for node in hot._nodes.values())
    assert len(hot.hottest(5, now)) <= 5
