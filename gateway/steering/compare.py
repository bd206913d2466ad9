"""Policies compared on the requests that this gateway has answered last, by simulation.

The simulator is no part of the gateway (`loadtests.simulator`, in the wheel): it runs as a process of its own, at low
priority, without the gateway's environment, and with an end. One comparison at a time; the last one is kept.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.sources import Silent, Source, ask_all

MODULE = "loadtests.simulator.recent"
WITHIN_S = 150.0
"""It has 120 s of processor time itself."""
SEEDS = 3
"""Runs of each policy: near-ties are broken by chance."""
FEWEST = 50
"""Requests below which a comparison says nothing."""
MAX_POLICIES = 8
MAX_REQUESTS = 4_096
DEFAULT_KV_TOKENS = 400_000
DEFAULT_RUNNING = 256
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "TMPDIR")
_LINE_BYTES = 4 * 2**20


@dataclass(slots=True)
class Comparison:
    """One comparison, from its order to its result."""

    id: str
    model: str
    policies: tuple[str, ...]
    by: str
    began_unix_s: float
    state: str = "running"
    """running, done, failed or cancelled."""
    done: int = 0
    of: int = 0
    requests: int = 0
    """That it stands on."""
    span_s: float = 0.0
    """From the first of these to the last."""
    ended_unix_s: float | None = None
    error: str | None = None
    measured: dict[str, Any] | None = None
    """What was observed of the same requests, with the policy in force."""
    result: dict[str, Any] | None = None
    caveats: tuple[str, ...] = ()
    in_force: str = ""
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def shown(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "task"}


async def run(job: Comparison, sources: Sequence[Source], wanted: int) -> None:
    """Carry out a comparison; what becomes of it is in the job."""
    try:
        async with asyncio.timeout(WITHIN_S):
            rows = await gathered(sources, job.model, wanted)
            engines, in_force = await engines_of(sources, job.model)
            job.requests, job.in_force = len(rows), in_force
            if len(rows) < FEWEST:
                raise _Failed(
                    f"only {len(rows)} answered requests of {job.model} are known since the workers began (those with "
                    f"a LoRA adapter are not kept); at least {FEWEST} are needed"
                )
            job.span_s = round(rows[-1]["at"] - rows[0]["at"], 1)
            job.measured, job.caveats = measured(rows), caveats(rows, engines)
            question = {"rows": rows, "engines": engines, "policies": job.policies, "seeds": SEEDS}
            await _simulate(job, msgspec.json.encode(question))
        job.state = "done"
    except TimeoutError:
        job.state, job.error = "failed", f"it took longer than {WITHIN_S:g} s; ask for fewer requests or policies"
    except (_Failed, OSError) as error:
        job.state, job.error = "failed", str(error)
    except asyncio.CancelledError:
        job.state = "cancelled"
        raise
    finally:
        job.ended_unix_s = time.time()


class _Failed(Exception):
    """Why there is no result, for operators."""


async def _simulate(job: Comparison, question: bytes) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", MODULE),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # No key of an engine, no token: it needs none.
        env={name: value for name in _KEPT_VARIABLES if (value := os.environ.get(name)) is not None},
        limit=_LINE_BYTES,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        complaint = asyncio.create_task(process.stderr.read())
        try:
            process.stdin.write(question)
            await process.stdin.drain()
            process.stdin.close()
        except (BrokenPipeError, ConnectionResetError):  # it has ended: its words are read below
            pass
        async for line in process.stdout:
            said = msgspec.json.decode(line)
            job.done, job.of = said.get("done", job.done), said.get("of", job.of)
            job.result = said.get("result", job.result)
        text = (await complaint).decode(errors="replace").strip()
        if await process.wait() != 0 or job.result is None:
            raise _Failed(_reason(text, process.returncode))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _reason(text: str, code: int | None) -> str:
    last = text.splitlines()[-1] if text else f"it ended with exit code {code}"
    if "No module named" in last:
        return "the simulator is not installed here: it is in the wheel and in the source tree, not in the image"
    return f"the simulation failed: {last[:300]}"


async def gathered(sources: Sequence[Source], model: str, wanted: int) -> list[dict[str, Any]]:
    """The last requests of all workers, in order of time."""
    answers = await ask_all(sources, lambda source: source.traffic(model, wanted))
    rows = [row for _, found in answers for row in found or ()]
    rows.sort(key=lambda row: float(row["at"]))
    return rows[-wanted:]


async def engines_of(sources: Sequence[Source], model: str) -> tuple[list[dict[str, Any]], str]:
    """The model's replicas as one worker has learned them, for the simulator; and the policy in force."""
    for source in sources:
        try:
            policies, fleet = await source.policies(), await source.fleet()
        except Silent:
            continue
        told = policies["models"][model]
        for pool in fleet["pools"]:
            if pool["name"] == told["pool"]:
                return [_engine(replica) for replica in pool["replicas"]], str(told["policy"])
    raise _Failed("no worker answers; they may be starting")


def _engine(replica: Mapping[str, Any]) -> dict[str, Any]:
    speed, capacity = replica["speed"], replica["capacity"]
    names = ("prefill_ms", "curve", "step_ms", "request_ms", "kv_ms", "chunk")
    return {
        "name": replica["name"],
        "constants": {
            **{name: speed[name] for name in names},
            "kv_tokens": int(capacity.get("tokens") or DEFAULT_KV_TOKENS),
            "max_running": int(replica["max_in_flight"] or capacity.get("requests") or DEFAULT_RUNNING),
        },
        "rtt_ms": speed["rtt_ms"],
        "learned": speed["version"] > 0,
        "weight": replica["weight"],
    }


def measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was observed of these requests."""
    ttft = sorted(float(row["ttft_ms"]) for row in rows if row["ttft_ms"] is not None)
    told = [row for row in rows if row["cached_tokens"] is not None]
    prompt = sum(int(row["prompt_tokens"]) for row in told)
    return {
        "requests": len(rows),
        "with_ttft": len(ttft),
        "ttft_ms": sum(ttft) / len(ttft) if ttft else None,
        "ttft_p99_ms": ttft[min(len(ttft) - 1, int(0.99 * len(ttft)))] if ttft else None,
        "hit_rate": sum(int(row["cached_tokens"]) for row in told) / prompt if prompt else None,
    }


def caveats(rows: Sequence[Mapping[str, Any]], engines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the figures do not know, for whoever is about to act on them."""
    said = [
        "Engines are simulated with the constants that this gateway has learned of them; compare policies with each "
        "other, and the one in force with what was measured, before you believe any figure.",
        "The caches begin empty, and the first tenth of the requests is not counted.",
    ]
    keyless = sum(row["prefix"] is None for row in rows)
    if keyless:
        said.append(
            f"Of {keyless} of {len(rows)} requests nothing is known of shared beginnings (no policy or shadow asked "
            "for it then): they count as unlike all others, which flatters policies that do not look at caches."
        )
    if not all(engine["learned"] for engine in engines):
        said.append("Some replicas have answered too little to be known; they count as an 8B model on a current GPU.")
    if len({engine["weight"] for engine in engines}) > 1:
        said.append("Weights are not simulated: all replicas have the same share here.")
    if len(rows) < 500:
        said.append(f"{len(rows)} requests are few: the p99 of them hangs on the slowest {max(1, len(rows) // 100)}.")
    return tuple(said)
