"""`tidegate overview`: whether a running gateway is healthy, and if not, where; and its figures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gateway.operate import DONE, INTERRUPTED, Gateway, Problem, find

WATCHED_EVERY_S = 2.0
_CLEAR = "\x1b[H\x1b[2J"
_MODELS = 10


def run(options: argparse.Namespace, environ: Mapping[str, str], pause: Callable[[float], None] = time.sleep) -> int:
    """Show it once, or with `--watch` again and again; returns the exit code."""
    try:
        gateway = find(options, environ)
        while True:
            _show(gateway, options)
            if not options.watch:
                return DONE
            pause(WATCHED_EVERY_S)
    except Problem as problem:
        print(f"tidegate overview: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _show(gateway: Gateway, options: argparse.Namespace) -> None:
    _, answer = gateway.ask("GET", f"/admin/overview?window={options.window}")
    if options.json:
        print(json.dumps(answer), flush=True)
        return
    clear = _CLEAR if options.watch and sys.stdout.isatty() else ""
    print(clear + "\n".join(lines(answer, time.time())), flush=True)


def lines(answer: Mapping[str, Any], now_unix_s: float) -> Iterator[str]:
    """For people: the verdict, what is wrong, the figures."""
    verdict, now, totals, slo = answer["verdict"], answer["now"], answer["totals"], answer["slo"]
    yield f"{verdict['state'].upper()}  {verdict['text']}"
    for each in answer["health"]:
        yield ""
        yield f"{each['severity'].upper():<8}  {each['what']}"
        yield f"          {each['where']}, since {_ago(now_unix_s - each['since_unix_s'])}"
        yield f"          {each['advice']}"
    yield ""
    window = answer["window"]
    yield f"{'':<22}{'now':>14}{'5 minutes' if window == 'live' else window:>14}"
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("requests per second", lambda it: _number(it["requests_per_s"])),
        ("failed", lambda it: _percent(it["error_ratio"])),
        ("first token p50", lambda it: _ms(it["ttft_ms"]["p50"])),
        ("first token p95", lambda it: _ms(it["ttft_ms"]["p95"])),
        ("first token p99", lambda it: _ms(it["ttft_ms"]["p99"])),
        ("end to end p50", lambda it: _ms(it["duration_ms"]["p50"])),
        ("end to end p95", lambda it: _ms(it["duration_ms"]["p95"])),
        ("end to end p99", lambda it: _ms(it["duration_ms"]["p99"])),
        ("prompt from cache", lambda it: _percent(it["cached_ratio"])),
        ("own dollars", lambda it: f"{it['own_usd']:.4f}"),
        ("rented dollars", lambda it: f"{it['rented_usd']:.4f}"),
    ]
    for name, show in rows:
        yield f"{name:<22}{show(now):>14}{show(totals):>14}"
    queue = ", ".join(f"{count} {name}" for name, count in now["queue"].items()) or "nobody"
    yield f"{'waiting in line':<22}{queue:>14}"
    left = "-" if slo["budget_left"] is None else f"{slo['budget_left']:.0%}"
    yield f"{'error budget left':<22}{left:>14}  of a {slo['window']}'s; {slo['availability']:.3%} have to be served"
    replicas, workers = f"{now['replicas_ready']} of {now['replicas']}", f"{now['workers_up']} of {now['workers']}"
    yield f"{'replicas':<22}{replicas:>14}  take work"
    yield f"{'workers':<22}{workers:>14}  answer; what decides about limits: {now['store_mode'] or '-'}"
    if answer["models"]:
        yield ""
        yield f"{'MODEL':<30}{'REQUESTS':>10}{'FAILED':>8}{'FIRST TOKEN':>13}{'CACHED':>8}"
    for model in answer["models"][:_MODELS]:
        yield (
            f"{model['model']:<30}{model['requests']:>10}{model['failed']:>8}{_ms(model['ttft_ms']):>13}"
            f"{_percent(model['cached_ratio']):>8}"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def _ago(seconds: float) -> str:
    """
    >>> _ago(5), _ago(600), _ago(7200)
    ('5 s', '10 min', '2 h')
    """
    if seconds < 120:
        return f"{max(0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
