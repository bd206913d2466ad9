"""What tracing costs a request: what is added to its path, by itself, and whole gateways side by side.

   python -m loadtests.telemetry_cost             what is added to the path of a request, in microseconds
   python -m loadtests.telemetry_cost --check     ends with 1 when a request that is left out pays more than 5 µs
   python -m loadtests.telemetry_cost --served    gateways under load too: off, all left out, all sent (two minutes)

Times are processor time. In the first table a request is what `gateway.telemetry` does for it: its ids and whether it
is sampled, an attempt's id and `traceparent`, the line of it in the engine's request, and the look at it when it has
ended; for one that is sent its spans as well, made and handed to the SDK. The SDK's thread, which encodes and sends, is
in the second table alone. There the rounds take turns, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from backends.usage import Usage
from gateway.config.telemetry import Telemetry
from gateway.record import Attempt, Exchange, Outcome
from gateway.telemetry.context import TraceContext, new_span_id
from gateway.telemetry.tracing import Sink, Tracing
from loadtests.peers import MODEL, Peer, serving, tidegate
from loadtests.ports import free_port
from loadtests.processes import LOAD_CORE, ROOT, cpu_seconds, pinned, python, running

LIMIT_US = 5.0
"""For a request that is left out."""
COLLECTOR = "http://127.0.0.1:9"
HEADERS = [
    (b"host", b"127.0.0.1:7400"),
    (b"authorization", b"Bearer tgk_0123456789abcdef"),
    (b"content-type", b"application/json"),
    (b"content-length", b"1024"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"user-agent", b"OpenAI/Python 3.54.0"),
    (b"x-stainless-lang", b"python"),
    (b"x-stainless-read-timeout", b"600"),
]
"""As the OpenAI SDK sends them."""
JOINED = [
    *HEADERS,
    (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    (b"tracestate", b"vendor=value"),
]
BATCH = 2000


class Holder:
    """Stands for a runtime: what is off is one attribute of it."""

    __slots__ = ("tracing",)

    def __init__(self, tracing: Tracing | None) -> None:
        self.tracing = tracing


class Nowhere:
    """A sink that makes nothing."""

    def put(self, exchange: Exchange, kept: str) -> None: ...


def record() -> Exchange:
    """A plain request that was answered at its first attempt."""
    exchange = Exchange("req_0000000000000000", "/v1/chat/completions", 100.0, 1.7e9, read_at=100.0001, model="m")
    exchange.pool, exchange.replica, exchange.attempts = "pool", "pool-0", 1
    exchange.status, exchange.tenant, exchange.priority_class = 200, "default", "standard"
    exchange.outcome, exchange.finished_at, exchange.route_reason = Outcome.COMPLETED, 100.5, "cost"
    exchange.usage = Usage(256, 16, 128)
    tried = Attempt("pool", "pool-0", "cost", 100.0002, 0, 100.0003, 100.0003, 100.2, 100.5)
    exchange.tries = (tried,)
    return exchange


def on_the_path(holder: Holder, exchange: Exchange, headers: list[tuple[bytes, bytes]]) -> None:
    """What a request of one attempt does for its trace, as `gateway.runtime` and `gateway.asking` do it."""
    traced: TraceContext | None = None
    if holder.tracing is not None:
        traced = exchange.traced = holder.tracing.begin(headers)
    tried = exchange.tries[0]
    if traced is not None:
        tried.span_id = new_span_id()
    passed_on: Sequence[tuple[bytes, bytes]] = ()
    if traced is not None:
        passed_on = traced.headers(tried.span_id, hosted=False)
    b"".join([b"%b: %b\r\n" % header for header in passed_on]) if passed_on else b""
    if holder.tracing is not None and traced is not None:
        holder.tracing.settled(exchange, traced)


def timed_us(work: Callable[[], object], rounds: int) -> float:
    """Median microseconds of processor time per call, in batches."""
    found = []
    for _ in range(rounds):
        begun = time.process_time_ns()
        for _ in range(BATCH):
            work()
        found.append((time.process_time_ns() - begun) / BATCH / 1000)
    return median(found)


def path_us(rounds: int) -> dict[str, float]:
    """By case: what a request pays."""
    from gateway.telemetry.names import names_of
    from gateway.telemetry.places import Places
    from gateway.telemetry.service import resource_of
    from gateway.telemetry.spans import SpanBuilder

    class Making:
        """A sink that makes the spans, and sends none."""

        def __init__(self, settings: Telemetry) -> None:
            fleet: Any = type("Fleet", (), {"upstreams": lambda self: ()})()
            resource = resource_of(settings, 0, {})
            self._builder = SpanBuilder(names_of(settings.semconv), resource, Places(lambda: fleet))

        def put(self, exchange: Exchange, kept: str) -> None:
            self._builder.spans(exchange, kept)

    def tracing(ratio: float, sink: Sink) -> Tracing:
        return Tracing(Telemetry(endpoint=COLLECTOR, ratio=ratio, max_spans_per_s=100_000), sink)

    everything = Telemetry(endpoint=COLLECTOR)
    making = tracing(1.0, Making(everything))
    cases = {
        "off": (Holder(None), HEADERS),
        "left out": (Holder(tracing(0.0, Nowhere())), HEADERS),
        "left out, in a caller's trace": (Holder(tracing(0.0, Nowhere())), JOINED),
        "sent: spans made": (Holder(making), HEADERS),
    }
    exchange = record()

    def one(holder: Holder, headers: list[tuple[bytes, bytes]]) -> None:
        exchange.finished_at += 0.001  # type: ignore[operator]
        on_the_path(holder, exchange, headers)

    gc.disable()
    try:
        return {
            name: round(timed_us(functools.partial(one, holder, headers), rounds), 2)
            for name, (holder, headers) in cases.items()
        }
    finally:
        gc.enable()


def collect(port: int) -> None:
    """A collector that reads what it is sent, for `--served`; runs until it is killed."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def served_us(rounds: int, requests: int) -> dict[str, list[float]]:
    """By case: each round's processor time of a gateway per request of 1 KB, its threads included."""
    port = free_port()
    told = {"endpoint": f"http://127.0.0.1:{port}", "keep_unusual": False, "max_spans_per_s": 100_000}
    cases: dict[str, dict[str, Any]] = {
        "off": {},
        "left out": {"telemetry": {**told, "ratio": 0.0}},
        "a tenth sent": {"telemetry": {**told, "ratio": 0.1}},
        "all sent": {"telemetry": {**told, "ratio": 1.0}},
    }
    peers = {
        name: Peer(name, functools.partial(tidegate, "protocol", **sections), "/readyz")
        for name, sections in cases.items()
    }
    found: dict[str, list[float]] = {name: [] for name in peers}
    with tempfile.TemporaryDirectory() as folder:
        command = python("-m", "loadtests.telemetry_cost", f"--collect={port}")
        with running(command, log=Path(folder) / "collector.log", core=LOAD_CORE, port=port, ready="/"):
            for _ in range(rounds):
                for name, peer in peers.items():
                    with tempfile.TemporaryDirectory() as own, serving(peer, Path(own)) as target:
                        _load(target.url, 500)
                        before_s = cpu_seconds(target.pid)
                        _load(target.url, requests)
                        found[name].append((cpu_seconds(target.pid) - before_s) * 1e6 / requests)
    return found


def _load(url: str, requests: int) -> None:
    command = python("-m", "loadtests.requests", f"--url={url}", f"--model={MODEL}", "--connections=32")
    with pinned(LOAD_CORE):
        subprocess.run([*command, f"--requests={requests}"], cwd=ROOT, capture_output=True, timeout=120, check=True)


def main(argv: list[str] | None = None) -> int:
    """Ends with 1 when the limit is missed and `--check` is given."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.telemetry_cost", description="Time what tracing costs.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--served", action="store_true", help="whole gateways under load as well")
    parser.add_argument("--requests", type=int, default=10_000, help="of each round of --served")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="fail when a request that is left out pays too much")
    parser.add_argument("--collect", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.collect:
        collect(arguments.collect)
    found = path_us(arguments.rounds)
    served = served_us(3, arguments.requests) if arguments.served else {}
    if arguments.json:
        print(json.dumps({"path_us": found, "served_us": served}))
    else:
        for name, cost_us in found.items():
            print(f"{name:<32}{cost_us:>8.2f} µs on the path of a request")
        for name, rounds_us in served.items():
            print(f"{name:<32}{median(rounds_us):>8.1f} µs of a gateway ({min(rounds_us):.1f}-{max(rounds_us):.1f})")
    missed = [name for name, cost_us in found.items() if name.startswith("left out") and cost_us > LIMIT_US]
    if missed and arguments.check:
        print(f"dearer than {LIMIT_US:g} µs: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
