"""Real processes for the experiments: a gateway, model servers that can be killed and frozen, and what must stay true.

    async with rig(tmp_path, replicas=3, script={"chunks": 50, "interval_s": 0.02}) as found:
        streams = await found.crowd.many(200, found.body(stream=True))
        found.replicas[0].kill()
        await found.crowd.ended()
        await found.settled()                    # raises with everything that is not as it was before

Each replica is one process of the fake engine (`python -m loadtests.engine`), scriptable while it runs by
`replica.script(...)` or for one request by `body(fake={...})`; what it did is in `replica.log`, which survives its
death. The gateway is `tidegate serve` with a configuration file, a usage log, an admin listener and, if asked for,
several workers or a wrapper such as `prlimit --nofile=128`.

The standing invariants (`settled`, and `judge` for what a report says of them): gauges are back to 0; descriptors,
threads and memory of the gateway's processes are where they were; each request has exactly one terminal state, for its
client and in the usage log; what the usage log says of complete answers is what the replicas say; and no canary, which
is in every prompt, is in any log, metric or answer of the admin listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtests.ports import free_port
from loadtests.processes import ROOT
from loadtests.served_log import Line, read_log
from tests.faults.crowd import Answer, Crowd
from tests.support.command import PATIENCE_S, ServeProcess, clean_environ, serve_process

CANARY = "canary-7f3a9c51e2"
GAUGES = ("tidegate_in_flight", "tidegate_request_bytes_held", "tidegate_replica_in_flight", "tidegate_queue_waiting")
SPARE_DESCRIPTORS = 8
"""Probes and scrapes come and go."""
SPARE_MB = 24.0
"""What an allocator may keep after hundreds of requests at once. Slopes are the soak's."""
SETTLE_S = 15.0
Sample = dict[tuple[str, str], float]
"""Metrics by name and labels as text, the worker's left out; workers added up."""


class Replica:
    """One process of the fake engine, on a port that it keeps when it is started again."""

    def __init__(self, folder: Path, name: str, script: dict[str, Any]) -> None:
        self.name = name
        self.port = free_port()
        self.log_path = folder / f"{name}.log"
        self._script = script
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> list[Line]:
        """Every request's events so far, of all its lives."""
        return read_log(self.log_path)

    def received(self) -> int:
        return sum(line.event == "received" for line in self.log)

    async def start(self) -> None:
        """Come up, with the script it was made with; returns once it listens."""
        script = [f"--{name.replace('_', '-')}={value}" for name, value in self._script.items()]
        command = [sys.executable, "-m", "loadtests.engine", "--model=m", f"--port={self.port}", "--scriptable"]
        self._process = subprocess.Popen(  # noqa: ASYNC220 - its end is waited for in plain code
            [*command, f"--log={self.log_path}", *script],
            cwd=ROOT, env=clean_environ(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(PATIENCE_S):
            while True:
                assert self._process.poll() is None, f"{self.name} ended with {self._process.returncode}"
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                await asyncio.sleep(0.02)

    def kill(self) -> float:
        """`kill -9`, and gone; returns when it was sent."""
        assert self._process is not None
        at_s = time.monotonic()
        self._process.kill()
        self._process.wait()
        return at_s

    def freeze(self) -> float:
        """`SIGSTOP`: its kernel goes on accepting. Returns when."""
        return self._signal(signal.SIGSTOP)

    def thaw(self) -> float:
        return self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> float:
        assert self._process is not None
        self._process.send_signal(number)
        return time.monotonic()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def script(self, probe: dict[str, Any] | None = None, /, **script: Any) -> None:
        """From now on: fields of `loadtests.behaviour.Behaviour`; those not named are the defaults. `probe` for GET."""
        self._script = script
        async with httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
            told = await client.post(f"{self.url}/script", json={"script": script, "probe": probe or {}})
            assert told.status_code == 200, told.text

    def stop(self) -> None:
        if self.running:
            self.kill()


@dataclass
class Footprint:
    """What the gateway's processes hold, added up."""

    descriptors: int
    threads: int
    rss_mb: float


@dataclass
class Rig:
    """All of it, running."""

    gateway: ServeProcess
    replicas: list[Replica]
    crowd: Crowd
    url: str
    folder: Path
    workers: int
    http: httpx2.AsyncClient
    before: Footprint = field(default_factory=lambda: Footprint(0, 0, 0.0))
    spared_mb: float = SPARE_MB
    """How much more memory may be held at the end."""

    def body(self, *, fake: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """A chat with the canary in its prompt."""
        content = f"{CANARY} tell me a story"
        body = {"model": "m", "messages": [{"role": "user", "content": content}], **fields}
        if fields.get("stream"):
            body.setdefault("stream_options", {"include_usage": True})
        return body if fake is None else {**body, "fake": fake}

    # -- what can be seen of the gateway

    async def metrics(self) -> Sample:
        found: Sample = {}
        text = (await self.gateway.admin(self.http, "/metrics")).text
        for name, labels, value in re.findall(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
            key = name, ",".join(part for part in labels.split(",") if not part.startswith("worker="))
            found[key] = found.get(key, 0.0) + float(value)
        return found

    async def metric(self, name: str, *labels: str) -> float:
        """The sum of all samples with this name and these labels, each as `name="value"`."""
        sample = await self.metrics()
        return sum(
            value for (found, text), value in sample.items() if found == name and all(label in text for label in labels)
        )

    async def health(self, replica: Replica) -> str:
        """The state that its (first) worker sees it in."""
        mark = f'replica="{replica.name}"'
        for (name, labels), value in (await self.metrics()).items():
            if name == "tidegate_replica_health" and mark in labels and value:
                return str(re.findall(r'state="(\w+)"', labels)[0])
        return ""

    async def until(self, condition: Any, within_s: float = PATIENCE_S) -> Any:
        """Ask (an async function without arguments) until the answer is true, and return it."""
        async with asyncio.timeout(within_s):
            while not (found := await condition()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return found

    def usage(self) -> list[dict[str, Any]]:
        """The usage log so far."""
        path = self.folder / "usage.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def processes(self) -> list[int]:
        """The gateway's own process and its workers'."""
        return list(_descendants(self.gateway.process.pid))

    def footprint(self) -> Footprint:
        pids = self.processes()
        status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
        return Footprint(
            sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
            sum(int(re.findall(r"Threads:\s+(\d+)", text)[0]) for text in status),
            sum(int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) for text in status) / 1024,
        )

    # -- what must stay true

    async def warm_up(self, requests: int = 20) -> None:
        """Some requests, so that what is made once is made; then remember how things stand."""
        quick = {"chunks": 3, "interval_s": 0.0, "delay_head_s": 0.0, "ttft_s": 0.0}
        answers = await self.crowd.many(requests, self.body(stream=True, fake=quick))
        await self.crowd.ended()
        assert completed(answers) == requests, answers[-1].body
        await self.until(self._idle)
        self.before = self.footprint()

    async def _idle(self) -> bool:
        sample = await self.metrics()
        return not any(value for (name, _), value in sample.items() if name in GAUGES)

    async def _at_rest(self) -> bool:
        now = self.footprint()
        return await self._idle() and now.descriptors <= self.before.descriptors + SPARE_DESCRIPTORS

    async def settled(self) -> None:
        """Raise unless all invariants hold."""
        assert await self.judge() == []

    async def judge(self) -> list[str]:
        """What does not hold of the invariants, in words; waits for what needs a moment."""
        found = []
        with contextlib.suppress(TimeoutError):
            await self.until(self._at_rest, SETTLE_S)
        sample = await self.metrics()
        found += [
            f"{name}{labels} is {value:g}" for (name, labels), value in sample.items() if name in GAUGES and value
        ]
        before, now = self.before, self.footprint()
        if now.descriptors > before.descriptors + SPARE_DESCRIPTORS:
            found.append(f"{now.descriptors} descriptors, {before.descriptors} before")
        if now.threads > before.threads + 4 * self.workers:
            found.append(f"{now.threads} threads, {before.threads} before")
        if now.rss_mb > before.rss_mb * 1.05 + self.spared_mb:
            found.append(f"{now.rss_mb:.0f} MB, {before.rss_mb:.0f} before")
        found += await self._ledger_problems(sample)
        found += await self._canaries()
        return found

    async def _ledger_problems(self, sample: Sample) -> list[str]:
        """One end for each request, and the tokens that the replicas say they have sent."""
        found = [f"client {answer.number}: {answer.state}" for answer in self.crowd.answers if answer.state in BAD]
        counted = sum(value for (name, _), value in sample.items() if name == "tidegate_requests_total")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                while len(self.usage()) < counted:  # noqa: ASYNC110 - it is written in batches
                    await asyncio.sleep(0.05)
        usage = self.usage()
        ids = [record["id"] for record in usage]
        if len(set(ids)) != len(ids):
            found.append(f"{len(ids) - len(set(ids))} requests are in the usage log twice")
        if len(ids) != counted:
            found.append(f"{len(ids)} in the usage log, {counted:g} counted")
        found += self._token_problems(usage)
        by_id = {record["id"]: record for record in usage}
        for answer in self.crowd.answers:
            record = by_id.get(answer.headers.get("x-request-id", ""))
            if record is None or answer.state == "left":
                continue
            if (answer.state == "completed") != (record["outcome"] == "completed"):
                found.append(f"client {answer.number} saw {answer.state}, the log says {record['outcome']}")
        return found

    def _token_problems(self, usage: Sequence[dict[str, Any]]) -> list[str]:
        served: dict[str, int] = {}
        for line in (line for replica in self.replicas for line in replica.log if line.event == "answered"):
            if line.status == 200:
                served[line.id] = line.tokens + line.begun_bytes // 7
        done = [record for record in usage if record["outcome"] == "completed"]
        wrong = [record for record in done if record["completion_tokens"] != served.get(record["id"])]
        if not wrong:
            return []
        return [f"tokens of {len(wrong)} of {len(done)} complete answers differ, such as {wrong[0]}"]

    async def _canaries(self) -> list[str]:
        sinks = {"log": "\n".join(self.gateway.log), "usage log": (self.folder / "usage.jsonl").read_text()}
        for path in ("/metrics", "/admin/fleet", "/admin/usage", "/admin/replicas"):
            sinks[path] = (await self.gateway.admin(self.http, path)).text
        return [f"a prompt's canary is in {name}" for name, text in sinks.items() if CANARY in text]


BAD = ("wrong", "running", "unreachable")
"""What no client may be left with, whatever was broken."""


def _descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from _descendants(int(child))


@contextlib.asynccontextmanager
async def rig(
    folder: Path,
    *,
    replicas: int = 2,
    workers: int = 1,
    script: dict[str, Any] | None = None,
    wrapper: Sequence[str] = (),
    environ: dict[str, str] | None = None,
    model: dict[str, Any] | None = None,
    backend: dict[str, Any] | None = None,
    replica: dict[str, Any] | None = None,
    urls: Sequence[str] | None = None,
    headers: Sequence[str] = (),
    warm_up: int = 20,
    **sections: Any,
) -> AsyncIterator[Rig]:
    """Replicas, the gateway in front of them, and clients, all warm.

    Requests are spread evenly (`least_outstanding`), unless `model` has another policy: the default one learns which
    replica fails, and a fault would be met a few times only.

    `script`: what all replicas do at first. `model`, `backend`, `replica`: fields of model `m`, of its pool and of each
    of its replicas; `sections`: top-level ones of the configuration. `urls`: where the gateway finds the replicas, if
    there is something in between. `headers`: sent with every request.
    """
    async with contextlib.AsyncExitStack() as stack:
        found = [Replica(folder, f"r{number}", dict(script or {})) for number in range(replicas)]
        for each in found:
            stack.callback(each.stop)
        await asyncio.gather(*(each.start() for each in found))
        reached = urls or [each.url for each in found]
        entries = [{"url": u, "name": each.name, **(replica or {})} for u, each in zip(reached, found, strict=True)]
        config: dict[str, Any] = {
            "usage_log": {"path": str(folder / "usage.jsonl")},
            "shutdown": {"grace_s": 0, "drain_s": 5},
            "models": {"m": {"backend": "pool", "policy": "least_outstanding", **(model or {})}},
            "backends": {
                "pool": {"engine": "openai", "replicas": entries, "connections": {"idle_s": 0.5}, **(backend or {})}
            },
            **sections,
        }
        serving = serve_process(folder, [], f"--workers={workers}", environ=environ, wrapper=wrapper, **config)
        gateway = await stack.enter_async_context(serving)
        url = await gateway.url()
        http = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S))
        host, port = url.removeprefix("http://").rsplit(":", 1)
        crowd = Crowd(host, int(port), headers)
        stack.callback(crowd.close)
        running = Rig(gateway, found, crowd, url, folder, workers, http)
        if warm_up:
            await running.warm_up(warm_up)
        yield running


def completed(answers: Sequence[Answer]) -> int:
    return sum(answer.state == "completed" for answer in answers)
