"""Readers of traces, and the prefix keys that come of them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from loadtests.simulator.scenarios import TRACES, scenarios
from loadtests.simulator.traces import Row, TraceError, quantum, read_trace, segments, workload_of
from loadtests.simulator.traffic import prefix_of


def test_a_line_of_mooncakes_is_a_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 3000, "input_length": 700, "output_length": 9, "hash_ids": [4, 8]}
    path.write_text(f"{json.dumps(row)}\n\n")
    assert read_trace(path) == [Row(3.0, 700, 9, (4, 8))]


def test_a_line_of_azures_is_a_request_that_shares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:47.1805900,374,109\n"
    )
    rows = read_trace(path)
    assert [(row.prompt_tokens, row.output_tokens, row.blocks) for row in rows] == [(374, 44, ()), (374, 109, ())]
    assert rows[1].at - rows[0].at == pytest.approx(0.5)
    first, second = workload_of("azure", rows, 1.0, Random(1)).jobs
    assert first.path != second.path
    assert not set(first.prefix.digests) & set(second.prefix.digests)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\n",
        "nothing\n",
        '{"timestamp": 1, "input_length": "many"}\n',
        "[1]\n",
        '{"timestamp": 1, "input_length": -5, "output_length": 1, "hash_ids": []}\n',
        '{"timestamp": 1, "input_length": 5, "output_length": -1, "hash_ids": []}\n',
        '{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}\n',
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError, match=r"other\.jsonl"):
        read_trace(path)
    with pytest.raises(TraceError, match="missing"):
        read_trace(tmp_path / "missing.jsonl")


def test_blocks_become_the_longest_stretches_that_nobody_branches_off_within() -> None:
    found = segments([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 6], [9], []], [2048, 1500, 2100, 100, 50])
    assert found[:4] == [
        ((1, 1024), (3, 1024)),
        ((1, 1024), (5, 476)),
        ((1, 1024), (3, 1024), (6, 52)),
        ((9, 100),),
    ]
    assert sum(length for _, length in found[4]) == 50
    assert found[4][0][0] not in {1, 2, 3, 4, 5, 6, 9}


def test_times_in_steps_are_spread_and_others_are_left_alone() -> None:
    stepped = [Row(3.0 * (number // 10), 10, 1, (number,)) for number in range(100)]
    assert quantum(stepped) == 3.0
    jobs = workload_of("w", stepped, 2.0, Random(1)).jobs
    assert len({job.at for job in jobs}) == 100
    assert [job.index for job in jobs] == list(range(100))
    assert jobs[-1].at == pytest.approx(50.0)
    assert quantum([Row(float(number), 10, 1) for number in range(100)]) == 0.0


def test_keys_are_equal_where_prompts_are_and_nowhere_else() -> None:
    first = prefix_of(((1, 1000), (2, 500)))
    second = prefix_of(((1, 1000), (3, 500)), ends=(1000,))
    shared = [end for end in first.ends if end <= 1000]
    equal = sum(mine == other for mine, other in zip(first.digests, second.digests, strict=True))
    assert equal == len(shared) == 7
    assert first.tails[0][1] == second.tails[0][1] == 1500
    # The next turn finds the whole former prompt among its own tails.
    assert prefix_of(((1, 1000),)).tails[0] in second.tails
    assert len(prefix_of(((1, 128_000),)).digests) < 60


def test_the_excerpt_that_comes_along_can_be_read() -> None:
    scenario = scenarios()["synthetic-excerpt"]
    workload = scenario.source(100, 5.0, Random(1))
    assert len(workload.jobs) == 100
    assert (TRACES / "mooncake_synthetic_excerpt.jsonl").stat().st_size <= 150_000
    for job in workload.jobs:
        assert sum(length for _, length in job.path) == job.prompt_tokens == job.prefix.total
