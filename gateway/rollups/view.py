"""The overview as JSON: what it was over a window, and what it is now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gateway.metrics import DURATION_FINE_S, TTFT_FINE_S
from gateway.rollups.findings import CRITICAL, NOTICE, Finding
from gateway.rollups.objective import served
from gateway.rollups.pulse import Pulse
from gateway.rollups.quantiles import quantiles
from gateway.rollups.series import Level
from gateway.rollups.tally import ModelTally, Tally

PERCENTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
MODELS_SHOWN = 20
_NONE = Tally()

Figures = dict[str, Any]


def verdict(findings: Sequence[Finding], pulses: Sequence[Pulse]) -> dict[str, str]:
    """One line: `healthy`, `degraded` or `failing`, and what is worst."""
    serious = [each for each in findings if each.severity != NOTICE]
    if not serious:
        replicas = sum(len(pool.replicas) for pulse in pulses[:1] for pool in pulse.pools)
        told = f"{replicas} replica{'s' * (replicas != 1)} in use or ready"
        return {"state": "healthy", "text": f"Everything works: {told}."}
    worst = serious[0]
    more = f" And {len(serious) - 1} more." if len(serious) > 1 else ""
    state = "failing" if worst.severity == CRITICAL else "degraded"
    return {"state": state, "text": f"{worst.what} ({worst.where}).{more}"}


def figures(tally: Tally) -> Figures:
    """Rates, shares and percentiles of a stretch of time; None of what did not happen."""
    seconds = tally.covered_s
    all_ = served(tally.requests, tally.refused)
    tokens = ModelTally()
    for model in tally.models.values():
        tokens.add(model)
    return {
        "seconds": round(seconds, 1),
        "requests": sum(tally.requests.values()) + sum(tally.refused.values()),
        "failed": all_.failed,
        "requests_per_s": _rate(sum(tally.requests.values()) + sum(tally.refused.values()), seconds),
        "errors_per_s": _rate(all_.failed, seconds),
        "error_ratio": round(all_.ratio, 6) if all_.total else None,
        "outcomes": tally.requests,
        "refused": tally.refused,
        "ttft_ms": _percentiles(tally.ttft, TTFT_FINE_S),
        "duration_ms": _percentiles(tally.duration, DURATION_FINE_S),
        "prompt_tokens": tokens.prompt_tokens,
        "cached_tokens": tokens.cached_tokens,
        "told_prompt_tokens": tokens.told_prompt_tokens,
        "completion_tokens": tokens.completion_tokens,
        "cached_ratio": _share(tokens.cached_ratio),
        "own_usd": round(tokens.own_usd, 6),
        "rented_usd": round(tokens.rented_usd, 6),
        "own_usd_per_hour": _rate(3600 * tokens.own_usd, seconds),
        "rented_usd_per_hour": _rate(3600 * tokens.rented_usd, seconds),
        "limits": tally.limits,
        "turned_away": tally.turned_away,
        "sheds": tally.sheds,
        "retries": tally.retries,
        "spilled": tally.spilled,
        "in_flight": tally.in_flight,
        "queue": tally.queue,
    }


def state(pulses: Sequence[tuple[int, Pulse | None]]) -> dict[str, Any]:
    """What is at this moment, of all workers together."""
    up = [pulse for _, pulse in pulses if pulse is not None]
    queue: dict[str, int] = {}
    ready: dict[tuple[str, str], bool] = {}
    for pulse in up:
        for name, count in pulse.queue.items():
            queue[name] = queue.get(name, 0) + count
        for pool in pulse.pools:
            for each in pool.replicas:
                at = (pool.name, each.name)
                ready[at] = ready.get(at, False) or each.reason in ("", "full")
    return {
        "in_flight": sum(pulse.in_flight for pulse in up),
        "queue": queue,
        "waiting": sum(pool.waiting for pulse in up for pool in pulse.pools),
        "replicas": len(ready),
        "replicas_ready": sum(ready.values()),
        "workers": len(pulses),
        "workers_up": len(up),
        "store_mode": _worst_mode(up),
        "loop_lag_ms": round(max((pulse.loop_lag_s for pulse in up), default=0.0) * 1000, 1),
    }


def series(level: Level, now_unix_s: float, since_unix_s: float = 0.0) -> dict[str, Any]:
    """The window slot by slot, a list for each line of a chart; None where nobody counted, or there is no such figure.

    The slot that is running is left out: half of it would look like a fall."""
    slots = [each for each in level.each(now_unix_s) if each[0] >= since_unix_s][:-1]
    tallies = [tally for _, tally in slots]
    made = [None if tally is None else figures(tally) for tally in tallies]
    return {
        "slot_s": level.width.slot_s,
        "times": [start for start, _ in slots],
        "requests_per_s": _column(made, lambda it: it["requests_per_s"]),
        "errors_per_s": _column(made, lambda it: it["errors_per_s"]),
        "error_ratio": _column(made, lambda it: it["error_ratio"]),
        "ttft_ms": _columns(made, "ttft_ms"),
        "duration_ms": _columns(made, "duration_ms"),
        "cached_ratio": _column(made, lambda it: it["cached_ratio"]),
        "prompt_tokens_per_s": _column(made, lambda it: _rate(it["prompt_tokens"], it["seconds"])),
        "completion_tokens_per_s": _column(made, lambda it: _rate(it["completion_tokens"], it["seconds"])),
        "own_usd_per_hour": _column(made, lambda it: it["own_usd_per_hour"]),
        "rented_usd_per_hour": _column(made, lambda it: it["rented_usd_per_hour"]),
        "in_flight": _column(made, lambda it: it["in_flight"]),
        "queue": _named(tallies, lambda tally: tally.queue),
        "limits": _named(tallies, lambda tally: tally.limits),
    }


def models(tally: Tally) -> list[dict[str, Any]]:
    """The busiest models of a stretch of time."""
    busiest = sorted(tally.models.items(), key=lambda item: item[1].requests, reverse=True)[:MODELS_SHOWN]
    return [
        {
            "model": name,
            "requests": each.requests,
            "failed": each.failed,
            "ttft_ms": round(each.ttft_s / each.answers * 1000, 1) if each.answers else None,
            "cached_ratio": _share(each.cached_ratio),
            "completion_tokens": each.completion_tokens,
            "own_usd": round(each.own_usd, 6),
            "rented_usd": round(each.rented_usd, 6),
        }
        for name, each in busiest
    ]


def _percentiles(counts: dict[int, int], bounds: Sequence[float]) -> dict[str, float | None]:
    found = quantiles(counts, bounds, [share for _, share in PERCENTILES])
    return {
        name: None if value is None else round(value * 1000, 1)
        for (name, _), value in zip(PERCENTILES, found, strict=True)
    }


def _share(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 4)


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def _column(made: Sequence[Figures | None], pick: Callable[[Figures], Any]) -> list[Any]:
    return [None if each is None else pick(each) for each in made]


def _columns(made: Sequence[Figures | None], key: str) -> dict[str, list[Any]]:
    return {name: [None if each is None else each[key][name] for each in made] for name, _ in PERCENTILES}


def _named(tallies: Iterable[Tally | None], pick: Callable[[Tally], dict[str, int]]) -> dict[str, list[int]]:
    """A list for each name that any of them has."""
    picked = [pick(_NONE if tally is None else tally) for tally in tallies]
    names = sorted({name for each in picked for name in each})
    return {name: [each.get(name, 0) for each in picked] for name in names}


def _worst_mode(pulses: Sequence[Pulse]) -> str | None:
    modes = {pulse.store_mode for pulse in pulses}
    return next((mode for mode in ("local", "redis", "memory") if mode in modes), None)
