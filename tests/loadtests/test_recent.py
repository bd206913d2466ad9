"""Recent requests as a workload for the simulator: what their keys say of shared beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.simulator.cache import BLOCK
from loadtests.simulator.recent import Tree, compared, workload_of
from routing.keys import seed_of, text_prefix

SEED = seed_of("m")
ENGINE = {
    "constants": {"prefill_ms": 0.1, "curve": 0.0, "step_ms": 5.0, "request_ms": 0.1, "kv_ms": 0.0, "chunk": 2048,
                  "kv_tokens": 60_000, "max_running": 16},
    "rtt_ms": 1.0,
}  # fmt: skip


def row(at: float, *parts: str, output: int = 8) -> dict[str, Any]:
    tokens = sum(map(len, parts)) // 4
    prefix = text_prefix([part.encode() for part in parts], SEED, tokens)
    return {
        "at": at,
        "prompt_tokens": tokens,
        "output_tokens": output,
        "priority": 1,
        "prefix": {
            "digests": prefix.digests,
            "ends": prefix.ends,
            "total": prefix.total,
            "tails": prefix.tails,
            "unit_tokens": prefix.unit_tokens,
        },
    }


def shared(left: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]]) -> int:
    found = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        found += one[1]
    return found


def test_the_next_turn_of_a_chat_shares_all_of_the_turn_before() -> None:
    system, question, answer, more = "s" * 3000, "q" * 500, "a" * 300, "m" * 700
    rows = [row(0, system, question), row(1, system, question, answer, more), row(2, "x" * 4000)]
    paths = [job.path for job in workload_of(rows).jobs]
    assert shared(paths[0], paths[1]) == sum(length for _, length in paths[0]) == 875
    assert shared(paths[1], paths[2]) == 0


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_equal_keys_are_equal_segments_of_equal_length(chats: list[list[int]], seed: int) -> None:
    lengths = [Random(seed + kind).randrange(80, 3000) for kind in range(3)]
    rows = [row(at, *(f"{kind}" * lengths[kind] for kind in chat)) for at, chat in enumerate(chats)]
    tree = Tree([each["prefix"] for each in rows], rows)
    length_of: dict[int, int] = {}
    above: dict[int, int] = {}
    for each in rows:
        path = tree.path(each["prefix"])
        total = sum(length for _, length in path)
        assert abs(total - each["prefix"]["total"] * tree.unit_tokens) <= 1
        for number, length in path:
            assert length_of.setdefault(number, length) == length
        for (upper, _), (lower, _) in pairwise(path):
            assert above.setdefault(lower, upper) == upper


def test_a_policy_that_looks_at_caches_finds_more_in_them() -> None:
    rng = Random(3)
    rows = [row(number * 0.02, f"{rng.randrange(30):02}" * 6_000, f"{number}" * 100) for number in range(300)]
    lines = list(compared({"rows": rows, "engines": [ENGINE, ENGINE], "policies": ["cost", "round_robin"], "seeds": 2}))
    assert lines[:-1] == [{"done": number, "of": 4} for number in (1, 2, 3, 4)]
    result = lines[-1]["result"]
    hits = {policy: figures["hit_rate"]["mean"] for policy, figures in result.items()}
    assert hits["cost"] > hits["round_robin"] > 0.5
    assert result["cost"]["ttft_ms"]["mean"] < result["round_robin"]["ttft_ms"]["mean"]
    assert result["cost"]["failed"]["most"] == 0
    assert BLOCK == 16


def test_prompts_without_keys_are_like_no_other() -> None:
    rows = [{**row(number, "a" * 4000), "prefix": None} for number in range(3)]
    paths = [job.path for job in workload_of(rows).jobs]
    assert len({path[0][0] for path in paths}) == 3
