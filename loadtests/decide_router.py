"""What a whole decision costs, from the parsed body to the replica, and the events after it. ``make bench`` runs it.

    python -m loadtests.decide_router              prints the table
    python -m loadtests.decide_router --write      into docs/benchmarks.json and docs/benchmarks.md as well
    python -m loadtests.decide_router --check      ends with 1 when a limit is missed

The policy is the default one. Replicas are warm: all hold the beginning of the prompt, one in four more of it, and each
has requests of its own under way and speeds that differ, so that no short cut applies. Times are processor time:
nothing here waits, and the wall would tell of the machine's other work.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from backends.dialects.protocol import CHAT
from gateway.prompt import prompt_parts
from loadtests import report
from loadtests.decide import chat, timed_us
from loadtests.decide_index import bytes_per_pair
from loadtests.processes import ROOT
from routing.keys import seed_of, text_prefix
from routing.policies import make_policy
from routing.router import PoolState, Router
from routing.types import InferenceRequest, Replica

SEED = seed_of("chat")
POLICY = "cost"
EVENTS = ("dispatched", "first_token", "finished", "failed")
BYTES_PER_KEY_LIMIT = 150.0
UNDER_WAY = 3
"""Requests at each replica, on the average."""
BEGIN, END = "<!-- decisions: written by loadtests.decide_router -->", "<!-- /decisions -->"
SECTION = "decisions"
"""Of docs/benchmarks.json; the rest of that file is `loadtests.bench`'s."""
COLLECTOR = (20_000, 20, 20)
"""How often garbage is collected: as in the gateway's workers (`gateway.worker_process`)."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    size_bytes: int
    messages: int
    replicas: int
    limit_us: float


CASES = (
    Case("1 KB, 2 replicas", 1024, 2, 2, 25.0),
    Case("4 KB, 8 replicas", 4096, 6, 8, 60.0),
    Case("64 KB, 64 replicas", 65_536, 20, 64, 150.0),
    Case("4 KB, 1,024 replicas", 4096, 6, 1024, 2000.0),
    Case("64 KB, 1,024 replicas", 65_536, 20, 1024, 2000.0),
)


class Bench:
    """One case: a warm pool, and requests for it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._numbers = count()
        rng = Random(case.size_bytes + case.replicas)
        self.fields = chat(case.size_bytes, case.messages, rng)
        self.replicas = [
            Replica(f"r{number}", "pool", f"http://10.0.{number >> 8}.{number & 255}:30000", "sglang")
            for number in range(case.replicas)
        ]
        self.router = Router(make_policy(POLICY, rng), PoolState(), rng)
        self._warm(rng)

    def request(self, fields: dict[str, Any] | None = None) -> InferenceRequest:
        """What the gateway makes of a parsed body, hashing included."""
        tokens = self.case.size_bytes // 4
        prefix = text_prefix(prompt_parts(CHAT, fields or self.fields), SEED, tokens)
        return InferenceRequest(
            f"r{next(self._numbers)}", "chat", True, self.case.size_bytes, 100, prompt_tokens=tokens, prefix=prefix
        )

    def decide(self) -> object:
        return self.router.decide(self.request(), self.replicas, 1000.0)

    def _warm(self, rng: Random) -> None:
        messages = self.fields["messages"]
        for number, replica in enumerate(self.replicas):
            replica.speed.prefill_ms *= rng.uniform(0.8, 1.2)
            begun = self.fields | {"messages": messages[: -1 if number % 4 == 0 else max(1, len(messages) // 2)]}
            self._serve(self.request(begun), replica)
            for _ in range(rng.randint(0, 2 * UNDER_WAY)):
                under_way = InferenceRequest(f"r{next(self._numbers)}", "chat", True, 2000, prompt_tokens=500)
                self.router.dispatched(under_way, replica, 999.0)
                if rng.random() < 0.8:
                    self.router.first_token(under_way, replica, 999.2)

    def _serve(self, request: InferenceRequest, replica: Replica) -> None:
        self.router.dispatched(request, replica, 990.0)
        self.router.first_token(request, replica, 990.1)
        self.router.finished(request, replica, 991.0, prompt_tokens=request.prompt_tokens, output_tokens=100)

    def events_us(self, rounds: int, batch: int = 20) -> dict[str, float]:
        """Median time of each event, in microseconds. Each request is a turn of a conversation of its own."""
        took: dict[str, list[float]] = {name: [] for name in EVENTS}
        for _ in range(rounds):
            router, now = self.router, 1000.0
            made = [self._turn() for _ in range(2 * batch)]
            decided = [(each, router.decide(each, self.replicas, now)) for each in made]
            sent = [(each, decision.replica, decision) for each, decision in decided if decision.replica is not None]
            begin = time.thread_time_ns()
            for each, replica, decision in sent:
                router.dispatched(each, replica, now, decision)
            took["dispatched"].append(_each_us(begin, len(sent)))
            good, bad = sent[:batch], sent[batch:]
            begin = time.thread_time_ns()
            for each, replica, _ in good:
                router.first_token(each, replica, now + 0.1)
            took["first_token"].append(_each_us(begin, len(good)))
            begin = time.thread_time_ns()
            for each, replica, decision in good:
                held = decision.cached_tokens
                router.finished(
                    each, replica, now + 1, prompt_tokens=each.prompt_tokens, cached_tokens=held, output_tokens=100
                )
            took["finished"].append(_each_us(begin, len(good)))
            begin = time.thread_time_ns()
            for each, replica, _ in bad:
                router.failed(each, replica, now + 1)
            took["failed"].append(_each_us(begin, len(bad)))
        return {name: round(median(values), 2) for name, values in took.items()}

    def _turn(self) -> InferenceRequest:
        """The prompt with another end."""
        messages = list(self.fields["messages"])
        messages[-1] = {"role": "user", "content": f"{next(self._numbers)} {messages[-1]['content']}"}
        return self.request(self.fields | {"messages": messages})


def _each_us(begin_ns: int, calls: int) -> float:
    return (time.thread_time_ns() - begin_ns) / calls / 1000.0


def decisions(rounds: int, cases: Sequence[Case] = CASES) -> dict[str, dict[str, float]]:
    """Each case: pieces, keys and `decide` together, and the events; microseconds."""
    found: dict[str, dict[str, float]] = {}
    for case in cases:
        bench = Bench(case)
        large = case.replicas > 100
        p50, p90 = timed_us(bench.decide, max(10, rounds // 5) if large else rounds, 5 if large else 50)
        found[case.name] = {
            "decide_us": round(p50, 1),
            "p90_us": round(p90, 1),
            "limit_us": case.limit_us,
            **bench.events_us(max(3, rounds // 10)),
        }
    return found


@contextmanager
def _as_in_a_worker() -> Iterator[None]:
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(*COLLECTOR)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def measure(rounds: int, pairs: int = 200_000, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """Everything that limits are set for, as it stands in docs/benchmarks.json."""
    with _as_in_a_worker():
        decided = decisions(rounds, cases)
    return {
        "decisions": decided,
        "index_bytes_per_key": round(bytes_per_pair(pairs), 1),
        "index_bytes_per_key_limit": BYTES_PER_KEY_LIMIT,
    }


def missed(found: dict[str, Any]) -> list[str]:
    """Names of what is above its limit."""
    names = [name for name, row in found["decisions"].items() if row["decide_us"] > row["limit_us"]]
    if found["index_bytes_per_key"] > found["index_bytes_per_key_limit"]:
        names.append("index memory")
    return names


def markdown(record: dict[str, Any]) -> str:
    """The table, and above it what a reader needs to judge it. What misses its limit says so."""
    over = set(missed(record))

    def verdict(name: str) -> str:
        return "**missed**" if name in over else "kept"

    lines = [
        f"{record['date']}, commit {record['commit']}. {record['cpu']}, {record['cores']} cores, Linux "
        f"{record['kernel']}, Python {record['python']}, load average {record['load_average']:.1f}. "
        f"`{record['command']}`: medians of processor time, in microseconds.",
        "",
        "| prompt, replicas | decide | p90 | limit | | dispatched | first_token | finished | failed |",
        "|---|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for name, row in record["decisions"].items():
        figures = [f"{row['decide_us']:.1f}", f"{row['p90_us']:.1f}", f"{row['limit_us']:g}", verdict(name)]
        figures += [f"{row[event]:.1f}" for event in EVENTS]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    limit = record["index_bytes_per_key_limit"]
    lines += [
        "",
        f"Index memory: {record['index_bytes_per_key']:.0f} bytes per key and replica that holds it, of a full index "
        f"after two turnovers (limit {limit:g}: {verdict('index memory')}).",
    ]
    return "\n".join(lines)


def write(record: dict[str, Any], docs: Path) -> None:
    """Put the figures into benchmarks.json beside those of `loadtests.bench`, and the table into benchmarks.md."""
    path = docs / "benchmarks.json"
    whole = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**whole, SECTION: record}, indent=1) + "\n")
    report.insert(docs / "benchmarks.md", markdown(record), BEGIN, END)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.decide_router", description="Time routing decisions.")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=200_000, help="keys of the index whose memory is measured")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.json and docs/benchmarks.md")
    parser.add_argument("--check", action="store_true", help="fail when a limit is missed")
    options = parser.parse_args(argv)
    words = " ".join(sys.argv[1:] if argv is None else argv)
    record = {
        **report.machine(),
        "load_average": os.getloadavg()[0],
        "command": f"python -m loadtests.decide_router {words}".strip(),
        **measure(options.rounds, options.pairs),
    }
    print(markdown(record))
    if options.write:
        write(record, ROOT / "docs")
    return 1 if options.check and missed(record) else 0


if __name__ == "__main__":
    sys.exit(main())
