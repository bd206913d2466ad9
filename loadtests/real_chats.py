"""Multi-turn chats with real engines behind the real gateway, policy against policy.

    python -m loadtests.real_chats                              llama.cpp, and SGLang where it is set up
    python -m loadtests.real_chats --engines llamacpp --write   the tables into docs/routing.md

Every run has a gateway of its own and empty caches: llama.cpp is started anew, SGLang is told to flush. Each round runs
every policy on the same conversations, every second round in the opposite order. What was cached and how long prompts
took is read from the engines' own counters, what clients saw is measured here, and what the gateway expected to be
cached comes from its answers' headers. Needs `make test-engines` once, for the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from loadtests import report
from loadtests.processes import ROOT
from loadtests.real_chats_plan import Plan, Session, sessions
from loadtests.real_engines import MODEL, Counts, EngineMissing, Engines, LlamaCpp, SGLang
from loadtests.replay_client import Answer, Target, ask, chat_body
from loadtests.requests import percentile

BEGIN, END = "<!-- real engines: written by loadtests.real_chats -->", "<!-- /real engines -->"
ALIAS = "chat"
POLICIES = ("cost", "round_robin", "least_outstanding")
LIMIT_S = 120.0
PLANS = {
    "llamacpp": Plan(),
    # Slower, and slow behind a cached prefix as well: its attention on a CPU works through the whole prompt again.
    "sglang": Plan(sessions=14, per_s=0.35),
}
Row = dict[str, Any]


async def talk(target: Target, session: Session, began_at: float) -> list[Answer]:
    """One conversation, each turn when the one before is answered and thought about. Ends with the first error."""
    await asyncio.sleep(max(0.0, began_at + session.at_s - time.perf_counter()))
    messages = [{"role": "system", "content": session.system}]
    answers: list[Answer] = []
    for turn in session.turns:
        await asyncio.sleep(turn.think_s)
        messages.append({"role": "user", "content": turn.text})
        body = chat_body(ALIAS, messages, turn.answer_tokens)
        answer = await ask(target, body, time.perf_counter(), LIMIT_S, keep_text=True)
        answers.append(answer)
        if answer.error is not None:
            break
        messages.append({"role": "assistant", "content": answer.text})
    return answers


async def talk_all(url: str, plan: Plan, seed: int) -> list[Answer]:
    target, began_at = Target.of(url), time.perf_counter()
    asked = await asyncio.gather(*(talk(target, session, began_at) for session in sessions(plan, seed)))
    return [answer for answers in asked for answer in answers]


def run(engines: Engines, policy: str, plan: Plan, seed: int, folder: Path) -> Row:
    """One policy, once, with empty caches."""
    from tests.engines.gateway_process import running_gateway

    folder.mkdir(parents=True)
    with engines.fresh(folder) as running:
        replicas = {f"r{number}": replica.url for number, replica in enumerate(running)}
        models = {ALIAS: {"backend": "pool", "upstream_model": MODEL, "policy": policy}}
        load_before = os.getloadavg()[0]
        with running_gateway(
            folder / "gateway", engine=engines.engine, upstream_model=MODEL, replicas=replicas, models=models
        ) as gateway:
            before = [engines.counts(replica) for replica in running]
            began = time.perf_counter()
            answers = asyncio.run(talk_all(gateway.url, plan, seed))
            took_s = time.perf_counter() - began
            own = sum((engines.counts(each) - old for each, old in zip(running, before, strict=True)), Counts())
    return {**figures(answers, own), "seconds": round(took_s, 1), "load": [round(load_before, 1), _load()]}


def _load() -> float:
    return round(os.getloadavg()[0], 1)


def figures(answers: Sequence[Answer], own: Counts) -> Row:
    """One run in numbers; times in milliseconds. Shares are of all prompt tokens."""
    good = [answer for answer in answers if answer.error is None]
    ttft = sorted(1000.0 * (answer.ttft_s or 0.0) for answer in good)
    total = sorted(1000.0 * (answer.total_s or 0.0) for answer in good)
    prompt = sum(answer.prompt_tokens for answer in good)
    return {
        "requests": len(good),
        "errors": dict(Counter(answer.error for answer in answers if answer.error is not None)),
        "prompt_tokens": prompt,
        "cached_share": own.cached_tokens / max(1.0, own.prompt_tokens),
        "usage_share": sum(answer.cached_tokens for answer in good) / max(1, prompt),
        "predicted_share": sum(answer.predicted_tokens or 0 for answer in good) / max(1, prompt),
        "engine_ms": 1000.0 * own.prompt_s / max(1, len(good)),
        "processor_ms": 1000.0 * own.processor_s / max(1, len(good)),
        "ttft_ms": fmean(ttft) if ttft else 0.0,
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_p99_ms": percentile(ttft, 0.99),
        "total_ms": fmean(total) if total else 0.0,
        "replicas": dict(sorted(Counter(answer.replica for answer in good).items())),
    }


def measure(engines: Engines, policies: Sequence[str], plan: Plan, rounds: int) -> list[Row]:
    """All runs of one engine."""
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="real-chats-") as folder:
        for number in range(rounds):
            for policy in policies if number % 2 == 0 else reversed(policies):
                row = run(engines, policy, plan, number, Path(folder, f"{number}-{policy}"))
                found.append({"engine": engines.engine, "policy": policy, "round": number + 1, **row})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


# -- the tables

Pick = Callable[[Row], float]
COLUMNS: tuple[tuple[str, str, Pick, int], ...] = (
    ("cached, engines' counters", " %", lambda row: 100 * row["cached_share"], 1),
    ("cached, expected by the gateway", " %", lambda row: 100 * row["predicted_share"], 1),
    ("prompt time, engines' counters", " ms", lambda row: row["engine_ms"], 0),
    ("engines' processor time", " ms", lambda row: row["processor_ms"], 0),
    ("TTFT mean", " ms", lambda row: row["ttft_ms"], 0),
    ("p50", " ms", lambda row: row["ttft_p50_ms"], 0),
    ("p99", " ms", lambda row: row["ttft_p99_ms"], 0),
    ("end to end", " ms", lambda row: row["total_ms"], 0),
)


def _spread(rows: Sequence[Row], pick: Pick, unit: str, digits: int) -> str:
    values = [pick(row) for row in rows]
    if not any(values):
        return "-"
    text = f"{median(values):.{digits}f}{unit}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(rows: Sequence[Row], policies: Sequence[str]) -> list[str]:
    """One engine's runs, a line per policy: the median of the rounds, in brackets the range."""
    heads = ["policy", *(head for head, *_ in COLUMNS), "requests per replica", "errors"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for policy in policies:
        own = [row for row in rows if row["policy"] == policy]
        cells = [policy, *(_spread(own, pick, unit, digits) for _, unit, pick, digits in COLUMNS)]
        cells.append(", ".join("/".join(str(count) for count in row["replicas"].values()) for row in own))
        cells.append(str(sum(sum(row["errors"].values()) for row in own)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(record: Row) -> str:
    """Every engine's table, and above it what a reader needs to judge them."""
    lines = [
        f"{record['date']}, commit {record['commit']}. {record['cpu']}, {record['cores']} cores, "
        f"Linux {record['kernel']}, Python {record['python']}. `{record['command']}`: {record['rounds']} rounds, "
        "medians, in brackets the range.",
    ]
    for name, engine in record["engines"].items():
        rows, plan = engine["runs"], engine["plan"]
        loads = [load for row in rows for load in row["load"]]
        tokens = fmean(row["prompt_tokens"] / max(1, row["requests"]) for row in rows)
        turns, answers = plan["turns"], plan["answer_tokens"]
        lines += [
            "",
            f"**{name}**: {engine['note']}. {plan['sessions']} conversations of {turns[0]} to {turns[1]} turns with "
            f"{plan['systems']} system prompts, {tokens:.0f} prompt tokens a request on the average, answers of "
            f"{answers[0]} to {answers[1]} tokens, {plan['per_s']:g} conversations begin in a second. "
            f"Load average of the machine before and after the runs, what they took included: {min(loads):.1f} to "
            f"{max(loads):.1f}.",
            "",
            *table(rows, record["policies"]),
        ]
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.real_chats", description="Policies on real engines.")
    parser.add_argument("--engines", nargs="+", choices=("llamacpp", "sglang"), default=["llamacpp", "sglang"])
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(POLICIES), metavar="NAME,...")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--sessions", type=int, help="conversations of a run")
    parser.add_argument("--prompt-cache-mib", type=int, default=0, help="llama.cpp's memory for finished prompts")
    parser.add_argument("--model", type=Path, help="a GGUF file for llama.cpp instead of the tests' tiny model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/routing.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Ends with 1 when any request failed, and 2 when no engine was there."""
    options = _arguments(argv)
    found: dict[str, Any] = {}
    for name in options.engines:
        plan = PLANS[name] if options.sessions is None else replace(PLANS[name], sessions=options.sessions)
        engines: Engines = (
            SGLang(options.replicas)
            if name == "sglang"
            else LlamaCpp(options.replicas, options.prompt_cache_mib, options.model)
        )
        try:
            runs = measure(engines, options.policies, plan, options.rounds)
        except EngineMissing as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
            continue
        finally:
            engines.close()
        found[name] = {"note": engines.note, "plan": asdict(plan), "runs": runs}
    if not found:
        return 2
    words = " ".join(sys.argv[1:] if argv is None else argv)
    record = {
        **report.machine(),
        "command": f"python -m loadtests.real_chats {words}".strip(),
        "rounds": options.rounds,
        "policies": options.policies,
        "engines": found,
    }
    text = markdown(record)
    print(text)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.write:
        report.insert(ROOT / "docs" / "routing.md", text, BEGIN, END)
    return 1 if any(row["errors"] for each in found.values() for row in each["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
