"""The demo's processes: the replicas, the gateway in front of them, and keeping them running."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import yaml

from backends.launch.llamacpp import LISTENING, Launch
from gateway.demo.child import Child

MODEL = "smollm2"
ALIAS = "gpt-4o-mini"  # what most sample code asks for; it then works unchanged
# A 135M-parameter model, quantised to four bits, gets a good deal wrong. This one it answers well and
# briefly.
PROMPT = "Explain gravity in one sentence."

_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 30.0
_STABLE_AFTER_S = 60.0  # a replica that ran this long starts its next failure with the first delay again
_LOAD_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 60.0
_GATEWAY_GRACE_S = 8.0  # more than the drain_s below, so that the gateway ends by itself
_REPLICA_GRACE_S = 3.0

GatewayCommand = Callable[[Path], Sequence[str]]


class StartError(Exception):
    """Something did not start; the message is for the terminal, with the last lines of its log."""


class GatewayEnded(Exception):
    """The gateway ended by itself; the message is for the terminal."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the gateway listens."""

    server: int
    admin: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server}/v1"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.admin}"


@dataclass(frozen=True, slots=True)
class Answer:
    """One real completion, as it came through the gateway."""

    text: str
    tokens: int
    took_s: float
    replica: str


def next_delay_s(previous_s: float, ran_for_s: float) -> float:
    """How long to wait before starting a replica again: doubled each time, from the start after a stable run.

    >>> next_delay_s(0.0, ran_for_s=2), next_delay_s(4.0, ran_for_s=2), next_delay_s(4.0, ran_for_s=600)
    (1.0, 8.0, 1.0)
    """
    if ran_for_s >= _STABLE_AFTER_S or previous_s <= 0:
        return _FIRST_DELAY_S
    return min(previous_s * 2, _LONGEST_DELAY_S)


def gateway_config(ports: Ports, replica_urls: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """The configuration the gateway is started with; what it writes stays in `folder`."""
    return {
        "server": {"host": "127.0.0.1", "port": ports.server},
        "admin": {"host": "127.0.0.1", "port": ports.admin, "token": {"file": str(token_file(folder))}},
        "auth": "insecure",
        "store": "memory",
        "database": f"sqlite:///{folder / 'tidegate.db'}",
        "usage_log": {"path": str(folder / "usage.jsonl")},
        "shutdown": {"grace_s": 0, "drain_s": 5},
        "models": {MODEL: {"backend": "demo", "aliases": [ALIAS]}},
        "backends": {
            "demo": {
                "engine": "llamacpp",
                "replicas": [{"name": name, "url": url, "region": "local"} for name, url in replica_urls.items()],
            }
        },
    }


def token_file(folder: Path) -> Path:
    """Where the owner's token for the admin listener is."""
    return folder / "admin-token"


class Fleet:
    """Every process of one demo. `stop` ends them all, in any state; nothing else does."""

    def __init__(
        self,
        launch: Launch,
        ports: Ports,
        folder: Path,
        environ: Mapping[str, str],
        gateway_command: GatewayCommand,
        say: Callable[[str], None],
    ) -> None:
        self._launch = launch
        self._ports = ports
        self._folder = folder
        self._environ = dict(environ)
        self._gateway_command = gateway_command
        self._say = say
        self._children: dict[str, Child] = {}
        # With the port that each replica got; it keeps that when it is started again.
        self._launches: dict[str, Launch] = {}

    async def start_replicas(self, count: int) -> None:
        """Start the replicas side by side, and wait until each has loaded the model."""
        names = [f"{MODEL}-{number}" for number in range(1, count + 1)]
        await together([self._start_replica(name, self._launch) for name in names])

    async def start_gateway(self) -> None:
        """Start the gateway; `first_answer` tells when it is up."""
        await self._start("gateway", self._gateway_command(self._write_config()))

    async def first_answer(self) -> Answer:
        """Ask the real model a real question through the gateway, until it answers."""
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        gateway = self._children["gateway"]
        async with httpx2.AsyncClient(trust_env=False, timeout=_ANSWER_TIMEOUT_S) as client:
            while True:
                try:
                    return await ask(client, self._ports.base_url)
                except NotYet as error:
                    if not gateway.running:
                        raise StartError(
                            f"The gateway {await gateway.ended()}. The end of its log:\n{gateway.tail()}"
                        ) from error
                    if time.monotonic() > deadline:
                        raise StartError(
                            f"No answer came through the gateway within {_ANSWER_TIMEOUT_S:.0f} s; the last "
                            f"attempt: {error}. The end of its log:\n{gateway.tail()}"
                        ) from error
                await asyncio.sleep(0.05)

    async def keep_running(self) -> None:
        """Start again every replica that ends; returns only by an exception, `GatewayEnded` among them."""
        await together([self._watch_gateway(), *(self._watch_replica(name) for name in self._launches)])

    async def stop(self) -> None:
        """End everything: the gateway first, so that it can finish what the replicas are still answering."""
        gateway = self._children.get("gateway")
        if gateway is not None:
            await gateway.stop(_GATEWAY_GRACE_S)
        replicas = [child for child in self._children.values() if child is not gateway]
        await together([replica.stop(_REPLICA_GRACE_S) for replica in replicas])

    def kill(self) -> None:
        """End everything at once: the owner is in a hurry. `stop`, already under way, then returns."""
        for child in self._children.values():
            child.kill()

    def _write_config(self) -> Path:
        """The gateway's configuration and the owner's token, as files."""
        token = token_file(self._folder)
        with open(token, "x", opener=_private) as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        config = self._folder / "tidegate.yaml"
        urls = {name: f"http://{launch.host}:{launch.port}" for name, launch in self._launches.items()}
        config.write_text(yaml.safe_dump(gateway_config(self._ports, urls, self._folder), sort_keys=False))
        return config

    async def _start(self, name: str, command: Sequence[str], *, reports: bool = False) -> Child:
        log = self._folder / f"{name}.log"
        child = await Child.start(name, command, log, self._environ, reports=reports)
        self._children[name] = child
        return child

    async def _start_replica(self, name: str, launch: Launch) -> None:
        child = await self._start(name, launch.command(), reports=True)
        try:
            line = await asyncio.wait_for(child.read_line(), _LOAD_TIMEOUT_S)
        except TimeoutError as error:
            child.kill()
            raise StartError(
                f"Replica {name} did not load the model within {_LOAD_TIMEOUT_S:.0f} s. "
                f"The end of its log:\n{child.tail()}"
            ) from error
        if not line.startswith(LISTENING):
            child.kill()
            raise StartError(f"Replica {name} {await child.ended()}. The end of its log:\n{child.tail()}")
        self._launches[name] = replace(launch, port=int(line.rpartition(":")[2]))

    async def _watch_gateway(self) -> None:
        gateway = self._children["gateway"]
        raise GatewayEnded(f"The gateway {await gateway.ended()}. The end of its log:\n{gateway.tail()}")

    async def _watch_replica(self, name: str) -> None:
        delay_s = 0.0
        started_at = time.monotonic()
        while True:
            how = await self._children[name].ended()
            delay_s = next_delay_s(delay_s, time.monotonic() - started_at)
            self._say(f"Replica {name} {how}; starting it again in {delay_s:.0f} s.")
            await asyncio.sleep(delay_s)
            started_at = time.monotonic()
            try:
                await self._start_replica(name, self._launches[name])
            except StartError as error:
                self._say(str(error))
            else:
                self._say(f"Replica {name} is back.")


class NotYet(Exception):
    """No answer so far, for a reason that may pass."""


async def ask(client: httpx2.AsyncClient, base_url: str) -> Answer:
    """Put the demo's question. Raises `NotYet` while something is starting, `StartError` when it is
    broken."""
    started_at = time.monotonic()
    body: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 80}
    body["messages"] = [{"role": "user", "content": PROMPT}]
    try:
        response = await client.post(f"{base_url}/chat/completions", json=body)
    except httpx2.TransportError as error:
        raise NotYet(f"{type(error).__name__}: {error}") from error
    if response.status_code in (429, 502, 503, 504):
        raise NotYet(f"status {response.status_code}: {response.text[:200]}")
    if response.status_code != 200:
        said = response.text[:500]
        raise StartError(f"The gateway refused the first request ({response.status_code}): {said}")
    answer = response.json()
    return Answer(
        text=answer["choices"][0]["message"]["content"].strip(),
        tokens=answer["usage"]["completion_tokens"],
        took_s=time.monotonic() - started_at,
        replica=response.headers.get("x-tidegate-replica", "a replica"),
    )


async def together(work: Sequence[Awaitable[None]]) -> None:
    """Do everything at the same time; the first failure ends the rest and is raised as itself, not in a
    group."""

    async def one(item: Awaitable[None]) -> None:
        await item

    try:
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(one(item))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _private(path: str, flags: int) -> int:
    """Open a file that only its owner can read, from its first moment on."""
    return os.open(path, flags, 0o600)
