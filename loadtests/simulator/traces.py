"""Readers of public traces.

Mooncake's (FAST'25, github.com/kvcache-ai/Mooncake, FAST25-release/traces, Apache-2.0): one JSON object a line with
`timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one for each 512 tokens; equal ids mean equal prefixes
up to and including that block. Azure's (github.com/Azure/AzurePublicDataset, 2023, CC-BY-4.0): a CSV file with the
columns TIMESTAMP, ContextTokens and GeneratedTokens; it says nothing of prefixes, so all prompts are distinct.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from random import Random

from loadtests.simulator.cache import Path as Segments
from loadtests.simulator.traffic import Job, Workload, prefix_of
from routing.keys import block_prefix, seed_of

BLOCK_TOKENS = 512


class TraceError(Exception):
    """The file cannot be read as a trace; the text says which line."""


@dataclass(frozen=True, slots=True)
class Row:
    at: float
    """Seconds."""
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int] = ()


def read_trace(path: Path, limit: int | None = None) -> list[Row]:
    """Rows of either kind in order of time, the first `limit` of them. Raises `TraceError`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = _azure(lines) if path.suffix == ".csv" else _mooncake(lines)
            found: list[Row] = []
            for row in rows:
                if limit is not None and len(found) == limit:
                    break
                if min(row.prompt_tokens, row.output_tokens) < 0:
                    raise ValueError("a number of tokens below 0")
                found.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise TraceError(f"{path} is not a trace that is known here: {error!r}") from error
    if not found:
        raise TraceError(f"{path} holds no requests")
    found.sort(key=lambda row: row.at)
    return found


def _mooncake(lines: Iterable[str]) -> Iterator[Row]:
    for line in lines:
        if line.strip():
            row = json.loads(line)
            tokens, blocks = int(row["input_length"]), tuple(row["hash_ids"])
            if blocks and tokens > len(blocks) * BLOCK_TOKENS:
                raise ValueError(f"{len(blocks)} hash_ids of {BLOCK_TOKENS} tokens for a prompt of {tokens}")
            yield Row(row["timestamp"] / 1000.0, tokens, int(row["output_length"]), blocks)


def _azure(lines: Iterable[str]) -> Iterator[Row]:
    for row in csv.DictReader(lines):
        at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        yield Row(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def workload_of(name: str, rows: Sequence[Row], per_s: float, rng: Random) -> Workload:
    """The rows at another mean rate. Times that come in steps (of 3 s in Mooncake's) are spread over the step."""
    step = quantum(rows)
    times = sorted((row.at + rng.random() * step, number) for number, row in enumerate(rows))
    start, span = times[0][0], max(times[-1][0] - times[0][0], 1e-9)
    scale = len(rows) / per_s / span
    paths = segments([row.blocks for row in rows], [row.prompt_tokens for row in rows])
    seed = seed_of(name)
    jobs: list[Job] = []
    for index, (at, number) in enumerate(times):
        row, path = rows[number], paths[number]
        tokens = max(1, row.prompt_tokens)
        keys = block_prefix(row.blocks, BLOCK_TOKENS, tokens, seed) if row.blocks else prefix_of(path)
        jobs.append(
            Job(
                index,
                (at - start) * scale,
                path,
                tokens,
                max(1, row.output_tokens),
                -1 - index,
                keys,
                gateway=rng.random(),
            )
        )
    return Workload(name, jobs)


def quantum(rows: Sequence[Row]) -> float:
    """The step that all times are multiples of, in seconds; 0 where there is none worth speaking of."""
    times = sorted({row.at for row in rows})
    gaps = [after - before for before, after in pairwise(times)]
    if not gaps or len(times) > len(rows) / 2:
        return 0.0
    return min(gaps)


def segments(prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[Segments]:
    """Each prompt as stretches of blocks that no other prompt ends or branches off within."""
    parents: dict[int, int | None] = {}
    branches: dict[int | None, int] = {}
    ends: set[int] = set()
    for blocks in prompts:
        before: int | None = None
        for block in blocks:
            if block not in parents:
                parents[block] = before
                branches[before] = branches.get(before, 0) + 1
            before = block
        if before is not None:
            ends.add(before)
    found: list[Segments] = []
    for number, (blocks, total) in enumerate(zip(prompts, tokens, strict=True)):
        if not blocks:  # nothing is known of it: like no other, with a number that no block has
            found.append(((-(1 << 40) - number, max(1, total)),))
            continue
        path: list[tuple[int, int]] = []
        first, length = blocks[0], 0
        for position, block in enumerate(blocks):
            length += min(BLOCK_TOKENS, max(1, total - position * BLOCK_TOKENS))
            if position == len(blocks) - 1 or block in ends or branches.get(block, 0) > 1:
                path.append((first, length))
                if position < len(blocks) - 1:
                    first, length = blocks[position + 1], 0
        found.append(tuple(path))
    return found
