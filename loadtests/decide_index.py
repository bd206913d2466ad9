"""What the prefix index costs: microseconds per look-up and insertion, bytes per pair of a key and a replica.

``python -m loadtests.decide_index`` prints a table. The smallest of several rounds counts, as for anything on a machine
that others use as well.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from routing.index import PrefixIndex
from routing.keys import seed_of, text_prefix
from routing.prefix import Prefix

ROUNDS = 7
SEED = seed_of("model")
BUDGET_TOKENS = 1_500_000


@dataclass(frozen=True, slots=True)
class Figure:
    """One case, in microseconds."""

    name: str
    match_us: float
    insert_us: float


def prompt(kilobytes: int, number: int, common: float = 0.75) -> Prefix:
    """Keys of a chat of six messages, the first `common` of it equal for all numbers."""
    size = kilobytes << 10
    head = int(size * common)
    text = b"s" * head + b"%08d" % number * ((size - head) // 8 + 1)
    text = text[:size]
    parts = [text[begin : begin + size // 6 + 1] for begin in range(0, size, size // 6 + 1)]
    return text_prefix(parts, SEED, size // 4)


def filled(targets: int, kilobytes: int, holders: int, others: int = 20) -> PrefixIndex:
    """An index in which `holders` have prompts like the one that is asked for, and all have prompts of their own."""
    index = PrefixIndex()
    for slot in range(targets):
        index.add_target(BUDGET_TOKENS)
        for number in range(others):
            index.insert(slot, prompt(4, slot * others + number, 0.0))
        if slot < holders:
            index.insert(slot, prompt(kilobytes, 0))
            index.insert(slot, prompt(kilobytes, slot + 1))
    return index


def cost_us(call: Callable[[], object], repetitions: int) -> float:
    """Of one call, the best of `ROUNDS`."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(repetitions):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / repetitions * 1e6


def case(name: str, kilobytes: int, targets: int, holders: int) -> Figure:
    """Matches of a prompt that `holders` of `targets` have three quarters of, and insertions of such prompts."""
    index = filled(targets, kilobytes, holders)
    asked = prompt(kilobytes, 10_000_000)
    match_us = cost_us(lambda: index.match(asked), max(20, 20_000 // max(1, targets)))
    fresh: Sequence[Prefix] = [prompt(kilobytes, 20_000_000 + number) for number in range(200)]
    turn = iter(range(1 << 40))
    insert_us = cost_us(lambda: index.insert(0, fresh[next(turn) % len(fresh)]), 200)
    return Figure(name, match_us, insert_us)


def figures() -> list[Figure]:
    """The cases that budgets are set for."""
    return [
        case("1 KB, 2 replicas, both hold it", 1, 2, 2),
        case("4 KB, 8 replicas, all hold it", 4, 8, 8),
        case("64 KB, 64 replicas, 4 hold it", 64, 64, 4),
        case("64 KB, 64 replicas, all hold it", 64, 64, 64),
        case("64 KB, 1,024 replicas, 16 hold it", 64, 1024, 16),
        case("64 KB, 1,024 replicas, all hold it", 64, 1024, 1024),
        case("1 KB, 1,024 replicas, all hold it", 1, 1024, 1024),
    ]


def bytes_per_pair(pairs: int = 200_000, targets: int = 16, turnovers: int = 2) -> float:
    """Memory of a full index that has given up what it held several times over, by `tracemalloc`.

    Prompts are 8 KB long, each held by one replica only, which is the dearest case: keys are shared by nobody.
    """
    number = 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = PrefixIndex(pairs)
        for _ in range(targets):
            index.add_target(1 << 40)
        while index.stats().evicted_cap < turnovers * pairs:
            for _ in range(100):
                number += 1
                index.insert(number % targets, prompt(8, number, 0.0))
        return (tracemalloc.get_traced_memory()[0] - before) / index.stats().pairs
    finally:
        tracemalloc.stop()


def main() -> None:
    for each in figures():
        print(f"{each.name:40} match {each.match_us:8.1f} us   insert {each.insert_us:6.1f} us")
    print(f"memory: {bytes_per_pair():.0f} bytes a pair")


if __name__ == "__main__":
    main()
