"""The gateway as its users run it: a process of its own, started with a configuration file."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai
import yaml

from backends.launch.tether import tethered

MODEL = "chat"
"""What the clients of these tests call the model, whatever the engine calls it."""
START_LIMIT_S = 60.0
SDK_TIMEOUT_S = 120.0
T = TypeVar("T")

_SERVING = re.compile(r"serving on (http://\S+)")
_ADMIN = re.compile(r"admin on (http://\S+)")
ADMIN_TOKEN = "only-for-these-tests-0123456789"


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    """A running gateway. `usage_log` is the file of its records, one JSON object a line."""

    url: str
    usage_log: Path
    log: Path
    admin_url: str

    def replicas(self) -> dict[str, dict[str, Any]]:
        """What the first worker's `/admin/fleet` says of each replica of the pool, by name."""
        return self.workers()[0]

    def workers(self) -> list[dict[str, dict[str, Any]]]:
        """The same of every worker that is up."""
        shown = self.admin("GET", "/admin/fleet").raise_for_status().json()["workers"]
        return [
            {replica["name"]: replica for pool in worker["pools"] for replica in pool["replicas"]}
            for worker in shown
            if worker["up"]
        ]

    def admin(self, method: str, path: str, content: Any = None) -> httpx2.Response:
        """Ask or order something at the admin listener."""
        return httpx2.request(
            method,
            f"{self.admin_url}{path}",
            json=content,
            headers={"authorization": f"Bearer {ADMIN_TOKEN}"},
            trust_env=False,
            timeout=SDK_TIMEOUT_S,
        )

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `tidegate` with these words against this gateway, and wait for its end."""
        where = ["--url", self.admin_url, "--token-file", str(self.usage_log.parent / "admin-token")]
        return subprocess.run(
            [sys.executable, "-m", "gateway", *words, *where],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SDK_TIMEOUT_S,
        )

    def sdk(self) -> openai.OpenAI:
        """The stock SDK; without retries, so that a test sees each answer."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none-needed",
            max_retries=0,
            timeout=SDK_TIMEOUT_S,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )

    def async_sdk(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="none-needed",
            max_retries=0,
            timeout=SDK_TIMEOUT_S,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )

    def records(self) -> list[dict[str, Any]]:
        """All records that are written by now."""
        return [json.loads(line) for line in self.usage_log.read_text().splitlines()]

    def cached_tokens(self) -> dict[str, int]:
        """Sums of the records' cached tokens, by replica."""
        totals: dict[str, int] = {}
        for record in self.records():
            totals[record["replica"]] = totals.get(record["replica"], 0) + (record["cached_tokens"] or 0)
        return totals

    async def record(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first record that is wanted; waits for it, since records are written twice a second."""
        return await eventually(
            lambda: next(filter(wanted, self.records()), None), limit_s=10, what="the record is written"
        )


@contextmanager
def running_gateway(
    folder: Path,
    *,
    engine: str,
    upstream_model: str,
    replicas: Mapping[str, str | Mapping[str, Any]],
    pool: Mapping[str, Any] | None = None,
    workers: int = 1,
    **sections: Any,
) -> Iterator[GatewayProcess]:
    """Serve one pool with these replicas for the length of the block.

    A replica is a URL or its whole entry but the name; `pool` adds to the pool's, `sections` to the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    usage_log = folder / "usage.jsonl"
    config = folder / "tidegate.yaml"
    token = folder / "admin-token"
    token.write_text(ADMIN_TOKEN)
    settings = {
        "server": {"port": 0},
        "admin": {"port": 0, "token": {"file": str(token)}},
        "usage_log": {"path": str(usage_log)},
        # By load alone, so that every replica gets a share of prompts that are all alike.
        "models": {
            MODEL: {
                "backend": "pool",
                "upstream_model": upstream_model,
                "aliases": ["gpt-4o-mini"],
                "policy": "least_outstanding",
            }
        },
        "backends": {
            "pool": {
                "engine": engine,
                "replicas": [
                    {"name": name, **({"url": entry} if isinstance(entry, str) else entry)}
                    for name, entry in replicas.items()
                ],
                "timeouts": {"first_token_s": SDK_TIMEOUT_S, "idle_s": SDK_TIMEOUT_S},
                **(pool or {}),
            }
        },
        **sections,
    }
    config.write_text(yaml.safe_dump(settings))
    with (
        (folder / "gateway.log").open("wb+") as log,
        subprocess.Popen(
            tethered(
                [
                    sys.executable,
                    "-m",
                    "gateway",
                    "serve",
                    "--log-format=text",
                    "--config",
                    str(config),
                    "--workers",
                    str(workers),
                ]
            ),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            url, admin_url = _addresses(process, folder / "gateway.log")
            yield GatewayProcess(url, usage_log, folder / "gateway.log", admin_url)
        finally:
            process.kill()


async def eventually(look: Callable[[], T | None], *, limit_s: float, what: str) -> T:
    """Look again and again at another process until there is an answer; returns it. Runs `look` in a thread."""
    end = time.monotonic() + limit_s
    while True:
        found = await asyncio.to_thread(look)
        if found:
            return found
        if time.monotonic() >= end:
            raise TimeoutError(f"not within {limit_s:g} s: {what}")
        await asyncio.sleep(0.02)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}


def _addresses(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """The addresses the gateway says it serves on: its own, and the admin's."""
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end and process.poll() is None:
        said = log.read_text()
        serving, admin = _SERVING.search(said), _ADMIN.search(said)
        if serving is not None and admin is not None:
            return serving[1], admin[1]
        time.sleep(0.05)
    raise RuntimeError(f"the gateway did not start:\n{log.read_text()}")
