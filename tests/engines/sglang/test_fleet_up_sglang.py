"""`tidegate fleet up` with two real SGLang servers: started, found, killed, rolled, ended, behind a gateway."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from backends.launch.tether import tethered
from loadtests.ports import free_ports
from tests.engines.clients import ask, failures, more, said, stream, traffic
from tests.engines.gateway_process import GatewayProcess, eventually, running_gateway
from tests.engines.install import MODEL as MODEL_FOLDER
from tests.engines.replica import NAME
from tests.engines.sglang.environment import SGLANG

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STARTS_WITHIN_S = 400.0
"""Two at once: 35 s on an idle machine, minutes where other programs hold the cores."""
NAMES = ("lab-pool-0", "lab-pool-1")


def launch(port: int) -> dict[str, Any]:
    """How a server of the tiny model is started on this machine's CPU; what a GPU would need is left out."""
    environment = SGLANG.process_environment()
    wanted = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS", *SGLANG.variables)
    return {
        "model": str(MODEL_FOLDER / "hf"),
        "count": 2,
        "port": port,
        "gpus_per_server": 0,
        "dtype": "float32",
        "max_running": 4,
        "python": str(SGLANG.python),
        "flags": [
            *("--device", "cpu", "--attention-backend", "torch_native", "--max-total-tokens", "32768"),
            *("--random-seed", "0", "--sleep-on-idle"),
        ],
        "env": {"CUDA_VISIBLE_DEVICES": "", **{name: environment[name] for name in wanted}},
        "start_timeout_s": STARTS_WITHIN_S,
        "stop_timeout_s": 60,
    }


@dataclass(slots=True)
class Agent:
    """A running `tidegate fleet up`."""

    process: subprocess.Popen[bytes]
    gateway: GatewayProcess
    port: int
    log: Path
    seen: dict[str, list[str]] = field(default_factory=dict)
    """The states and phases that the gateway showed of each server, in order."""

    def members(self) -> dict[str, dict[str, Any]]:
        """What the gateway says of each server."""
        answer = self.gateway.admin("GET", "/admin/members").raise_for_status().json()
        found = {member["name"]: member for pool in answer["pools"] for member in pool["members"]}
        for name, member in found.items():
            shown = member.get("phase") or "starting" if member["state"] == "starting" else member["state"]
            states = self.seen.setdefault(name, [])
            if states[-1:] != [shown]:
                states.append(shown)
        return found

    def all_ready(self) -> bool:
        """Whether both serve, by the gateway's account."""
        assert self.process.poll() is None, self.log.read_text(errors="replace")
        members, replicas = self.members(), self.gateway.replicas()
        return set(NAMES) <= replicas.keys() and all(
            members.get(name, {}).get("state") == "ready" and replicas[name]["available"] for name in NAMES
        )

    def server(self, place: int) -> int:
        """The process that listens for the server in this place."""
        port = str(self.port + place).encode()
        for pid, words in commands().items():
            if b"sglang.launch_server" in words and port in words and b"gateway.agent.guard" not in words:
                return pid
        raise LookupError(f"no server {place}")


def commands() -> dict[int, list[bytes]]:
    """The command lines of all processes."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
    return found


def born(pid: int) -> tuple[int, bytes] | None:
    """Its parent, and when it began, which tells it from another of its number; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else (int(fields[1]), fields[19])


def below(root: int) -> dict[int, bytes]:
    """All processes that descend from this one, and when each began."""
    every = {pid: found for pid in commands() if (found := born(pid)) is not None}
    tree = {root}
    while more := {pid for pid, (parent, _) in every.items() if parent in tree} - tree:
        tree |= more
    return {pid: every[pid][1] for pid in tree if pid in every}


@contextmanager
def fleet_up(folder: Path, gateway: GatewayProcess, port: int) -> Iterator[Agent]:
    log = folder / "fleet.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    words = ["fleet", "up", "--config", str(folder / "tidegate.yaml"), "--gateway", gateway.admin_url]
    words += ["--token-file", str(folder / "admin-token"), "--agent", "lab"]
    with (
        log.open("wb") as file,
        subprocess.Popen(
            tethered([sys.executable, "-m", "gateway", *words]),
            env={**environment, "TIDEGATE_STATE_DIR": str(folder / "state")},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield Agent(process, gateway, port, log)
        finally:
            process.kill()


def told(what: str, began_at: float) -> float:
    """A line for whoever runs this with `-s`; the time now."""
    print(f"fleet up: {what}: {time.monotonic() - began_at:.1f} s", flush=True)
    return time.monotonic()


async def test_two_servers_are_started_kept_rolled_and_ended(tmp_path: Path) -> None:
    """One after the other, since each start costs half a minute; nothing of what clients ask is lost on the way."""
    port = free_ports(2)
    with (
        running_gateway(
            tmp_path,
            engine="sglang",
            upstream_model=NAME,
            replicas={},
            pool={"launch": launch(port), "health": {"load_interval_s": 0.2, "probe_interval_s": 0.5}},
        ) as gateway,
        fleet_up(tmp_path, gateway, port) as agent,
    ):
        at = time.monotonic()
        await eventually(agent.all_ready, limit_s=STARTS_WITHIN_S, what="both servers are in the pool")
        at = told("both ready", at)
        for name in NAMES:
            assert "loading" in agent.seen[name], agent.seen
            assert agent.seen[name][-1] == "ready"
        async with gateway.async_sdk() as client:
            first = await asyncio.gather(*(ask(client, bool(place % 2)) for place in range(4)))
            assert failures(first) == []
            assert {each.replica for each in first} == set(NAMES)
            assert len({each.text for each in first}) == 1
            await killed(agent)
            at = told("killed, restarted and back", at)
            await rolled(agent)
            at = told("rolled", at)
            everything = below(agent.process.pid)
            assert len(everything) >= 5
            _, chunks = await stream(client, "Tell me a story", max_tokens=600)
            agent.process.terminate()
            _, reason = await said(chunks)
            assert reason == "length"
            assert await asyncio.to_thread(agent.process.wait, 120) == 0, agent.log.read_text()
            told("ended, with a stream under way", at)
        left = {pid: commands().get(pid) for pid, began in everything.items() if (born(pid) or (0, b""))[1] == began}
        assert left == {}
        await eventually(
            lambda: not agent.members() and not gateway.replicas(), limit_s=30, what="the pool is empty again"
        )


async def killed(agent: Agent) -> None:
    """The server in place 0 dies: requests go to the other one, and a new one comes into the pool."""
    doomed, steady = NAMES
    process = agent.server(0)
    os.kill(process, signal.SIGKILL)
    async with agent.gateway.async_sdk() as client:
        for _ in range(4):
            asked = await ask(client, streamed=False)
            assert (asked.error, asked.replica) == (None, steady)
        await eventually(
            lambda: agent.members()[doomed].get("restarts") == 1, limit_s=60, what="the killed server is started again"
        )
        await eventually(agent.all_ready, limit_s=STARTS_WITHIN_S, what="the killed server is back")
        assert agent.server(0) != process
        again = await asyncio.gather(*(ask(client, streamed=False) for _ in range(4)))
    assert failures(again) == []
    assert {each.replica for each in again} == set(NAMES)


async def rolled(agent: Agent) -> None:
    """All servers anew, one at a time, while clients ask."""
    before = {agent.server(place) for place in range(2)}
    async with traffic(agent.gateway, clients=3) as ended:
        await more(ended, 6)
        done = await asyncio.to_thread(agent.gateway.command, "fleet", "roll", "pool")
        assert done.returncode == 0, done.stderr

        def through() -> bool:
            members = agent.members()
            states = [members.get(name, {}).get("state") for name in NAMES]
            assert "ready" in states, "no server was left to answer"
            try:
                return agent.all_ready() and not before & {agent.server(place) for place in range(2)}
            except LookupError:
                return False

        await eventually(through, limit_s=2 * STARTS_WITHIN_S, what="both servers are new")
        for name in NAMES:
            await more(ended, 2, name)
    assert failures(ended) == []
    assert len({each.text for each in ended}) == 1
    print(f"fleet up: {len(ended)} requests while it was rolled, none lost", flush=True)
