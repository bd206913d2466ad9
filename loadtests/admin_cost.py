"""What the admin side costs a busy gateway: CPU per request with dashboards open, with none, and without its listener.

``python -m loadtests.admin_cost [--rounds 8] [--write docs/dashboard.md]`` runs the three in alternating rounds. A
dashboard is what its page does: the calls of a first visit once a round, then the event stream, which is read to the
end of the round. Browsers are left out: they run on the operator's machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.bodies import chat_bodies
from loadtests.engine import run
from loadtests.ports import free_port
from loadtests.processes import GATEWAY_CORE, LOAD_CORE, python, running
from loadtests.report import insert
from loadtests.requests import Result, load

TOKEN = "an-owner-token-of-sufficient-length"
BEGIN, END = "<!-- admin cost: written by loadtests.admin_cost -->", "<!-- /admin cost -->"
PAGES = (
    ("overview", ("overview?window=hour",)),
    ("fleet", ("fleet/map",)),
    ("requests", ("requests?limit=50",)),
)
"""Live topic and first calls of the pages that are open."""


@dataclass(frozen=True)
class Arm:
    """One way to run a gateway."""

    name: str
    admin: bool
    dashboards: int


ARMS = (Arm("admin listener off", False, 0), Arm("nobody looks", True, 0), Arm("three dashboards open", True, 3))


@dataclass(frozen=True)
class Round:
    arm: str
    requests: int
    cpu_us: float
    """Of the gateway, per request."""
    per_second: float


def cpu_s(pid: int) -> float:
    """What the threads of a process have run so far, to the nanosecond; `utime` counts in hundredths of a second."""
    total_ns = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        total_ns += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total_ns / 1e9


@contextmanager
def gateway(folder: Path, engine_port: int, *, admin: bool) -> Iterator[tuple[int, int, int]]:
    """Its process, port and admin port."""
    port, admin_port = free_port(), free_port()
    config, token = folder / f"gateway-{port}.yaml", folder / "token"
    content = {
        "server": {"port": port},
        "admin": {"port": admin_port, "enabled": admin, "token": {"file": str(token)}},
        "models": {"bench": {"backend": "pool", "price": {"input": 0.1, "output": 0.4}}},
        "backends": {
            "pool": {
                "engine": "openai",
                "replicas": [{"url": f"http://127.0.0.1:{engine_port}", "region": "eu-west", "max_in_flight": 256}],
            }
        },
    }
    token.write_text(TOKEN)
    token.chmod(0o600)
    config.write_text(json.dumps(content))
    command = python("-m", "gateway", "serve", "--log-format=text", "--config", str(config))
    with running(command, log=folder / f"{port}.log", core=GATEWAY_CORE, port=port, ready="/readyz") as pid:
        yield pid, port, admin_port


async def dashboard(port: int, topic: str, calls: Sequence[str]) -> None:
    """One open page, until it is cancelled."""
    head = f"host: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
    for target in (*calls, f"events?topics={topic}"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            last = target.startswith("events")
            writer.write(f"GET /admin/{target} HTTP/{'1.1' if last else '1.0'}\r\n{head}".encode())
            first = await reader.readline()
            assert b" 200 " in first, f"/admin/{target}: {first!r}"
            while await reader.read(65_536):
                pass
        finally:
            writer.close()


async def measured(arm: Arm, pid: int, port: int, admin_port: int, *, seconds: float, connections: int) -> Round:
    """One round of load."""
    bodies = chat_bodies(1024, model="bench")
    await load(f"http://127.0.0.1:{port}", bodies, connections=connections, count=500)
    pages = [PAGES[at % len(PAGES)] for at in range(arm.dashboards)]
    watching = [asyncio.create_task(dashboard(admin_port, topic, calls)) for topic, calls in pages]
    before = cpu_s(pid)
    result: Result = await load(f"http://127.0.0.1:{port}", bodies, connections=connections, count=10**9, max_s=seconds)
    used = cpu_s(pid) - before
    for task in watching:
        assert not task.done(), task.exception()
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    assert result.errors == 0, f"{result.errors} of {result.requests} requests failed"
    return Round(arm.name, result.requests, 1e6 * used / result.requests, result.per_second)


async def idle_ms_per_s(arm: Arm, pid: int, admin_port: int, seconds: float) -> float:
    """CPU that a gateway without requests takes, in milliseconds a second: what is done by the clock."""
    watching = [asyncio.create_task(dashboard(admin_port, *page)) for page in PAGES[: arm.dashboards]]
    await asyncio.sleep(1.0)  # the first visit
    before = cpu_s(pid)
    await asyncio.sleep(seconds)
    used = cpu_s(pid) - before
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    return 1000 * used / seconds


def rounds(count: int, *, seconds: float, connections: int) -> tuple[list[Round], dict[str, float]]:
    """All arms in every round, each time in another order, on the same two gateways; and what they take when idle."""
    found: list[Round] = []
    idle: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, engine_port = Path(name), free_port()
        command = python("-m", "loadtests.engine", "--port", str(engine_port), "--model", "bench")
        stack.enter_context(
            running(command, log=folder / "engine.log", core=LOAD_CORE, port=engine_port, ready="/health")
        )
        with_admin = stack.enter_context(gateway(folder, engine_port, admin=True))
        without = stack.enter_context(gateway(folder, engine_port, admin=False))

        async def all_rounds() -> None:
            for turn in range(count):
                for arm in (*ARMS[turn % 3 :], *ARMS[: turn % 3]):
                    place = with_admin if arm.admin else without
                    found.append(await measured(arm, *place, seconds=seconds, connections=connections))
            for arm in ARMS:
                pid, _, admin_port = with_admin if arm.admin else without
                idle[arm.name] = await idle_ms_per_s(arm, pid, admin_port, 2 * seconds)

        run(all_rounds())
    return found, idle


def shares(found: Sequence[Round], base: Arm) -> dict[str, list[float]]:
    """How much more CPU a request took than in the same round of `base`: by arm, one share for each round."""
    of = {arm.name: [each.cpu_us for each in found if each.arm == arm.name] for arm in ARMS}
    return {
        name: [mine / theirs - 1 for mine, theirs in zip(values, of[base.name], strict=True)]
        for name, values in of.items()
    }


def table(found: Sequence[Round], idle: Mapping[str, float]) -> str:
    """As Markdown."""
    looked = shares(found, ARMS[1])
    lines = [
        "| Gateway | CPU per request | more than with nobody looking | CPU without requests |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        cpu = [each.cpu_us for each in found if each.arm == arm.name]
        more = looked[arm.name]
        spread = "" if arm is ARMS[1] else f"{statistics.median(more):+.1%} ({min(more):+.1%} to {max(more):+.1%})"
        lines.append(f"| {arm.name} | {statistics.median(cpu):.0f} us | {spread} | {idle[arm.name]:.1f} ms a second |")
    rate = statistics.median(each.per_second for each in found)
    lines += ["", f"Medians of {len(found) // len(ARMS)} alternating rounds at {rate:,.0f} requests a second of 1 KB."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.admin_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, each time")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--write", type=Path, help="put the table between the marks of this file")
    options = parser.parse_args(argv)
    found, idle = rounds(options.rounds, seconds=options.seconds, connections=options.connections)
    shown = table(found, idle)
    print(shown)
    if options.write is not None:
        insert(options.write, shown, BEGIN, END)


if __name__ == "__main__":
    main()
