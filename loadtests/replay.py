"""Replays the arrivals of a trace through real sockets, whatever becomes of those before: ``make load`` runs it.

    python -m loadtests.replay                                        fake engines, a real gateway for each policy
    python -m loadtests.replay --trace conversation_trace.jsonl --speed 2.0 --limit 1000 --policies cost,lmetric
    python -m loadtests.replay --url http://gateway:7400 --model chat --scale 0.1 --json out.json

Traces are Mooncake's JSON lines or Azure's CSV (`loadtests.simulator.traces`); an excerpt comes with the source.
Prompts are made up: equal blocks of a Mooncake trace become equal text, Azure's rows are all different.
Times count from the moment a request was due, so a load generator that is late shows up as slowness and not as less
load; how late it was is a column of its own. A request is good when its first token and its time per token keep the
limits that are given.
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
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from loadtests import report
from loadtests.engine import run
from loadtests.pacing import Speed, speed_arguments, speed_of
from loadtests.processes import LOAD_CORE, ROOT, StartFailed, pinned
from loadtests.replay_client import Answer, Target, ask, chat_body
from loadtests.replay_fleet import MODEL, fleet
from loadtests.replay_prompts import Arrival, from_trace
from loadtests.requests import percentile
from loadtests.simulator.traces import TraceError
from routing.policies import POLICY_NAMES, PolicyError, make_policy

EXCERPT = ROOT / "loadtests" / "simulator" / "traces" / "mooncake_synthetic_excerpt.jsonl"
POLICIES = "cost,round_robin,least_outstanding"
Row = dict[str, Any]


async def replay(target: Target, model: str, requests: Sequence[Arrival], limit_s: float) -> list[Answer]:
    """Send each when it is due; the answers in the order they were due. A request may take `limit_s`."""
    began_at = time.perf_counter()
    tasks: list[asyncio.Task[Answer]] = []
    async with asyncio.TaskGroup() as group:
        for each in requests:
            body = chat_body(model, each.messages(), each.output_tokens, ignore_eos=True)
            due_at = began_at + each.at_s
            wait_s = due_at - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(ask(target, body, due_at, limit_s)))
    return [task.result() for task in tasks]


def figures(answers: Sequence[Answer], seconds: float, ttft_limit_ms: float, token_limit_ms: float) -> Row:
    """One run in numbers. Times in milliseconds, of whole answers only; shares 0..1."""
    whole = [answer for answer in answers if answer.error is None]
    ttft = sorted(1000.0 * (answer.ttft_s or 0.0) for answer in whole)
    total = sorted(1000.0 * (answer.total_s or 0.0) for answer in whole)
    lag = sorted(1000.0 * answer.lag_s for answer in answers)
    prompt = sum(answer.prompt_tokens for answer in whole)
    good = sum(
        1
        for answer in whole
        if 1000.0 * (answer.ttft_s or 0.0) <= ttft_limit_ms and 1000.0 * answer.per_token_s <= token_limit_ms
    )
    told = [answer.predicted_tokens for answer in whole if answer.predicted_tokens is not None]
    return {
        "requests": len(answers),
        "errors": dict(Counter(answer.error for answer in answers if answer.error is not None)),
        "seconds": round(seconds, 2),
        "ttft_ms": fmean(ttft) if ttft else None,
        "ttft_p50_ms": percentile(ttft, 0.5) if ttft else None,
        "ttft_p99_ms": percentile(ttft, 0.99) if ttft else None,
        "total_ms": fmean(total) if total else None,
        "total_p50_ms": percentile(total, 0.5) if total else None,
        "total_p99_ms": percentile(total, 0.99) if total else None,
        "prompt_tokens": prompt,
        "output_tokens": sum(answer.output_tokens for answer in whole),
        "cached_share": sum(answer.cached_tokens for answer in whole) / prompt if prompt else None,
        "predicted_share": sum(told) / prompt if told and prompt else None,
        "good_share": good / len(answers) if answers else 0.0,
        "good_per_s": good / seconds if seconds else 0.0,
        "lag_p99_ms": percentile(lag, 0.99),
        "replicas": dict(sorted(Counter(answer.replica for answer in whole if answer.replica).items())),
    }


COLUMNS = (
    ("TTFT ms", "ttft_ms", 1, 0),
    ("p50", "ttft_p50_ms", 1, 0),
    ("p99", "ttft_p99_ms", 1, 0),
    ("e2e ms", "total_ms", 1, 0),
    ("p50", "total_p50_ms", 1, 0),
    ("p99", "total_p99_ms", 1, 0),
    ("cached %", "cached_share", 100, 1),
    ("expected %", "predicted_share", 100, 1),
    ("good/s", "good_per_s", 1, 2),
    ("good %", "good_share", 100, 1),
    ("late p99 ms", "lag_p99_ms", 1, 1),
)
"""Heading, figure, factor, digits."""


def table(rows: Sequence[tuple[str, Row]]) -> str:
    """A line for each target or policy."""
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{'':{width}}{'requests':>9}" + "".join(f"{head:>{len(head) + 4}}" for head, *_ in COLUMNS) + "  errors"]
    for name, row in rows:
        cells = [
            f"{'-' if row[figure] is None else f'{row[figure] * factor:.{digits}f}':>{len(head) + 4}}"
            for head, figure, factor, digits in COLUMNS
        ]
        errors = ", ".join(f"{count} x {error}" for error, count in row["errors"].items()) or "0"
        lines.append(f"{name:{width}}{row['requests']:>9}{''.join(cells)}  {errors}")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.replay", description="Replay a trace's arrivals, open-loop, through real sockets."
    )
    parser.add_argument("--trace", type=Path, default=EXCERPT, metavar="FILE", help="Mooncake's .jsonl or Azure's .csv")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N requests only")
    parser.add_argument("--speed", type=_positive, default=3.0, help="times the trace's own pace (default 3)")
    parser.add_argument("--scale", type=_positive, default=0.25, help="times the prompts' lengths (default 0.25)")
    parser.add_argument("--output-scale", type=_positive, default=0.25, help="times the answers' (default 0.25)")
    parser.add_argument("--ttft-limit-ms", type=_positive, default=2000.0, help="of a good request (default 2000)")
    parser.add_argument("--token-limit-ms", type=_positive, default=50.0, help="per token, likewise (default 50)")
    parser.add_argument("--timeout", type=_positive, default=120.0, metavar="S", help="per request (default 120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, and each request's")
    given = parser.add_argument_group("backends of your own")
    given.add_argument("--url", help="a gateway or an engine that speaks OpenAI's API")
    given.add_argument("--model", help="what to ask it for")
    given.add_argument("--key-file", type=Path, metavar="FILE", help="holds the API key")
    fake = parser.add_argument_group("the fake fleet")
    fake.add_argument("--policies", default=POLICIES, metavar="NAME,...", help=f"of {', '.join(POLICY_NAMES)}")
    fake.add_argument("--replicas", type=int, default=4, metavar="N", help="default 4")
    speed_arguments(fake)
    options = parser.parse_args(argv)
    if (options.url is None) != (options.model is None):
        parser.error("--url and --model go together")
    if options.replicas < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--replicas and --limit are at least 1")
    return options


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _measure(url: str, model: str, requests: Sequence[Arrival], options: argparse.Namespace) -> tuple[Row, list[Row]]:
    """One run's figures, and every request's."""
    key = options.key_file.read_text().strip() if options.key_file else None
    answers: list[Answer] = []
    target = Target.of(url, key)
    load_before, began = os.getloadavg()[0], time.perf_counter()

    async def asked() -> None:
        answers.extend(await replay(target, model, requests, options.timeout))

    with pinned(LOAD_CORE):
        run(asked())
    found = figures(answers, time.perf_counter() - began, options.ttft_limit_ms, options.token_limit_ms)
    found["load_average"] = [round(load_before, 2), round(os.getloadavg()[0], 2)]
    return found, [_line(each, answer) for each, answer in zip(requests, answers, strict=True)]


def _line(request: Arrival, answer: Answer) -> Row:
    return {
        "row": request.number,
        "due_s": round(request.at_s, 4),
        "lag_s": round(answer.lag_s, 5),
        "ttft_s": answer.ttft_s and round(answer.ttft_s, 5),
        "total_s": answer.total_s and round(answer.total_s, 5),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "predicted_tokens": answer.predicted_tokens,
        "output_tokens": answer.output_tokens,
        "replica": answer.replica,
        "error": answer.error,
    }


def _runs(requests: Sequence[Arrival], options: argparse.Namespace) -> list[tuple[str, Row, list[Row]]]:
    """The given backends once, or the fake fleet once for each policy."""
    if options.url is not None:
        return [(options.url, *_measure(options.url, options.model, requests, options))]
    found: list[tuple[str, Row, list[Row]]] = []
    engine: Speed = speed_of(options)
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        for policy in options.policies.split(","):
            print(f"{policy}: {len(requests)} requests in {requests[-1].at_s:.0f} s", file=sys.stderr, flush=True)
            with fleet(policy, options.replicas, engine, Path(folder, policy.replace("/", "_"))) as url:
                found.append((policy, *_measure(url, MODEL, requests, options)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Ends with 1 when any request failed, and 2 when it could not begin."""
    options = _arguments(argv)
    try:
        if options.url is None:
            for policy in options.policies.split(","):
                make_policy(policy, Random(0))
        requests = from_trace(
            options.trace,
            limit=options.limit,
            speed=options.speed,
            scale=options.scale,
            output_scale=options.output_scale,
        )
        runs = _runs(requests, options)
    except (PolicyError, TraceError, StartFailed, ValueError, OSError) as error:
        print(f"loadtests.replay: {error}", file=sys.stderr)
        return 2
    words = " ".join(sys.argv[1:] if argv is None else argv)
    about = {**report.machine(), "command": f"python -m loadtests.replay {words}".strip(), "trace": options.trace.name}
    print(
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, {options.trace.name} at {options.speed:g} times its"
    )
    print(f"pace, prompts scaled by {options.scale:g}, answers by {options.output_scale:g}")
    print(table([(name, row) for name, row, _ in runs]))
    if options.json is not None:
        record = {**about, "runs": [{"name": name, **row, "answers": lines} for name, row, lines in runs]}
        options.json.write_text(json.dumps(record) + "\n")
    return 1 if any(row["errors"] for _, row, _ in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
