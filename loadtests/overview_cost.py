"""What the overview costs: a worker's pulse, the rollups of several workers, findings, and what is sent to viewers.

    python -m loadtests.overview_cost [--replicas 200] [--models 10] [--workers 4] [--viewers 5] [--per-s 500]

Runs the real code of a worker and of the process that answers operators in this one, on replicas that nobody asks, with
settled requests made up between two samples; prints milliseconds of CPU for each part, and seconds of CPU an hour with
somebody looking (a sample a second) and with nobody (one in ten seconds).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from backends.usage import Usage
from gateway.config import Settings
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.record import Exchange, Outcome
from gateway.rollups import kept
from gateway.rollups.hub import Hub, Viewer
from gateway.rollups.pulse import Pulse
from gateway.rollups.pulser import Pulser
from gateway.rollups.series import WIDTHS
from gateway.rollups.service import Rollups
from gateway.runtime import Runtime

ROUNDS = 120
"""As many samples as two minutes have."""


def fleet_settings(replicas: int, models: int) -> Settings:
    """One pool of so many replicas, and so many models that it serves."""
    urls = [{"url": f"http://127.0.0.1:{20_000 + number}"} for number in range(replicas)]
    sections: dict[str, Any] = {
        "models": {f"model-{number}": {"backend": "pool"} for number in range(models)},
        "backends": {"pool": {"engine": "openai", "replicas": urls}},
    }
    return Settings(**sections)


def settle(runtime: Runtime, count: int, models: int, replicas: int, rng: random.Random) -> None:
    """As many requests as are settled between two samples."""
    for _ in range(count):
        now = 1000.0 * rng.random()
        ttft_s = rng.lognormvariate(-1.5, 0.6)
        exchange = Exchange(
            "req_1", "/v1/chat/completions", now, 0.0, model=f"model-{rng.randrange(models)}", stream=True
        )
        exchange.pool, exchange.replica, exchange.attempts = "pool", f"pool-{rng.randrange(replicas)}", 1
        exchange.dispatched_at, exchange.first_content_at = now + 0.001, now + ttft_s
        exchange.finished_at, exchange.outcome = now + ttft_s + rng.random(), Outcome.COMPLETED
        exchange.usage, exchange.cost_usd = Usage(1000, 100, 400), 0.001
        runtime.metrics.observe(exchange)
        runtime.ledger.record(exchange)


class Stopwatch:
    """CPU milliseconds by name."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = {}

    def of(self, name: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        found = work()
        self.ms.setdefault(name, []).append(1000 * (time.process_time() - begun))
        return found

    def median(self, name: str) -> float:
        values = sorted(self.ms[name])
        return values[len(values) // 2]


def _put(viewers: Sequence[Viewer], event: bytes) -> None:
    for viewer in viewers:
        viewer.put("overview", event)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of CPU by part; seconds of CPU an hour."""
    settings = fleet_settings(options.replicas, options.models)
    rng, watch = random.Random(7), Stopwatch()
    runtimes = [Runtime(settings, None, Metrics(), Ledger(None)) for _ in range(options.workers)]
    pulsers = [Pulser(runtime, index) for index, runtime in enumerate(runtimes)]
    hub = Hub()
    rollups = Rollups([], lambda: settings, None, hub)
    now, now_unix_s = time.monotonic(), 1_700_000_000.0
    sent = 0
    viewers = [hub.join([]) for _ in range(options.viewers)]
    for _ in range(ROUNDS):
        now, now_unix_s = now + 1.0, now_unix_s + 1.0
        answers: list[tuple[int, Pulse | None]] = []
        for index, (runtime, pulser) in enumerate(zip(runtimes, pulsers, strict=True)):
            settle(runtime, options.per_s // options.workers, options.models, options.replicas, rng)
            pulse = watch.of("pulse", pulser.pulse)
            data = watch.of("encode", partial(msgspec.json.encode, pulse))
            answers.append((index, watch.of("decode", partial(msgspec.json.decode, data, type=Pulse))))
        watch.of("take", partial(rollups.take, answers, now, now_unix_s))
        event = watch.of("event", lambda: msgspec.json.encode(rollups._moment()))
        watch.of("send", partial(_put, viewers, event))
        sent = len(event)
    for width in WIDTHS:  # a history as full as it gets, for the file
        slots = rollups.series.levels[width.name].slots
        some = next(iter(slots.values()))
        slots.update({start * width.slot_s: some for start in range(width.slots)})
    file_bytes = len(watch.of("file", lambda: kept.encode(rollups.series)))
    await asyncio.gather(*(runtime.aclose() for runtime in runtimes))
    one = {name: watch.median(name) for name in watch.ms}
    worker_ms = one["pulse"] + one["encode"]
    admin_ms = options.workers * one["decode"] + one["take"]
    looking_ms = one["event"] + one["send"]
    return {
        **{f"{name}_ms": round(value, 3) for name, value in one.items()},
        "event_bytes": sent,
        "file_bytes": file_bytes,
        "worker_s_per_hour": {"nobody": round(0.36 * worker_ms, 2), "looking": round(3.6 * worker_ms, 2)},
        "admin_s_per_hour": {
            "nobody": round(0.36 * admin_ms + 0.06 * one["file"], 2),
            "looking": round(3.6 * (admin_ms + looking_ms) + 0.06 * one["file"], 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--viewers", type=int, default=5)
    parser.add_argument("--per-s", type=int, default=500, help="requests a second, of all workers")
    options = parser.parse_args()
    print(json.dumps({**vars(options), **asyncio.run(measure(options))}, indent=2))


if __name__ == "__main__":
    main()
