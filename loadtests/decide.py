"""What a routing decision costs: ``python -m loadtests.decide`` prints microseconds, medians of many rounds.

Each round times a batch of calls; the median over rounds ignores the machine's other work as far as that can be
done, and the 90th percentile beside it says how much of it there was.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import orjson

from backends.dialects.protocol import CHAT
from gateway.prompt import prompt_parts
from routing.keys import seed_of, text_prefix

SIZES = {"1 KB, 2 messages": (1024, 2), "1 KB, 4 messages": (1024, 4), "4 KB": (4096, 6), "64 KB": (65_536, 20)}
"""Text of a prompt in bytes, and the messages it is in."""
TARGETS_US = {"1 KB, 2 messages": 6.0, "1 KB, 4 messages": 6.0, "4 KB": 12.0, "64 KB": 60.0}
"""For pieces and keys together."""


def chat(size_bytes: int, messages: int, rng: random.Random) -> dict[str, Any]:
    """A conversation as the parser gives it: a system message, then user and assistant in turn."""
    each = size_bytes // messages
    text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz     ", k=size_bytes))
    roles = ["system", *("user" if number % 2 else "assistant" for number in range(1, messages))]
    body = {
        "model": "chat",
        "messages": [
            {"role": role, "content": text[number * each : (number + 1) * each]} for number, role in enumerate(roles)
        ],
        "max_tokens": 100,
    }
    fields: dict[str, Any] = orjson.loads(orjson.dumps(body))
    return fields


def timed_us(call: Callable[[], object], rounds: int, batch: int) -> tuple[float, float]:
    """Median and 90th percentile of a call's processor time over the rounds, in microseconds.

    Nothing that is timed here waits, so on an idle machine the wall would show the same.
    """
    took: list[float] = []
    for _ in range(rounds):
        begin = time.thread_time_ns()
        for _ in range(batch):
            call()
        took.append((time.thread_time_ns() - begin) / batch / 1000)
    return median(took), quantiles(took, n=10)[-1]


def keys_us(rounds: int) -> dict[str, dict[str, float]]:
    """Pieces and keys of a chat, by size."""
    seed = seed_of("chat")
    found: dict[str, dict[str, float]] = {}
    for name, (size_bytes, messages) in SIZES.items():
        fields = chat(size_bytes, messages, random.Random(size_bytes))
        parts = prompt_parts(CHAT, fields)
        tokens = size_bytes // 4
        batch = max(5, 200_000 // size_bytes)

        def both(fields: dict[str, Any] = fields, tokens: int = tokens) -> object:
            return text_prefix(prompt_parts(CHAT, fields), seed, tokens)

        p50, p90 = timed_us(both, rounds, batch)
        of_parts, _ = timed_us(lambda fields=fields: prompt_parts(CHAT, fields), rounds, batch)  # type: ignore[misc]
        found[name] = {
            "parts_and_keys_us": round(p50, 2),
            "p90_us": round(p90, 2),
            "parts_us": round(of_parts, 2),
            "target_us": TARGETS_US[name],
            "keys": len(text_prefix(parts, seed, tokens).digests),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    """Ends with 1 when a target is missed and `--check` is given."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.decide", description="Time a routing decision.")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    arguments = parser.parse_args(argv)
    found = keys_us(arguments.rounds)
    if arguments.json:
        print(json.dumps({"keys": found}))
    else:
        print(f"{'prompt':<20}{'µs':>8}{'p90':>8}{'target':>8}{'parts':>8}{'keys':>6}")
        for name, row in found.items():
            print(
                f"{name:<20}{row['parts_and_keys_us']:>8.2f}{row['p90_us']:>8.2f}{row['target_us']:>8.0f}"
                f"{row['parts_us']:>8.2f}{row['keys']:>6}"
            )
    missed = [name for name, row in found.items() if row["parts_and_keys_us"] > row["target_us"]]
    if missed and arguments.check:
        print(f"slower than the target: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
