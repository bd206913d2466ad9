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

import openai
import yaml

from backends.launch.tether import tethered

MODEL = "chat"
"""What the clients of these tests call the model, whatever the engine calls it."""
START_LIMIT_S = 60.0
SDK_TIMEOUT_S = 120.0
T = TypeVar("T")

_SERVING = re.compile(r"serving on (http://\S+)")


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    """A running gateway. `usage_log` is the file of its records, one JSON object a line."""

    url: str
    usage_log: Path

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

    async def record(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first record that is wanted; waits for it, since records are written twice a second."""

        def find() -> dict[str, Any] | None:
            records: list[dict[str, Any]] = [json.loads(line) for line in self.usage_log.read_text().splitlines()]
            return next(filter(wanted, records), None)

        return await eventually(find, limit_s=10, what="the record is written")


@contextmanager
def running_gateway(
    folder: Path, *, engine: str, upstream_model: str, replicas: Mapping[str, str], **sections: Any
) -> Iterator[GatewayProcess]:
    """Serve one pool with these replicas (name and URL) for the length of the block; `sections` add to the file."""
    folder.mkdir(parents=True, exist_ok=True)
    usage_log = folder / "usage.jsonl"
    config = folder / "tidegate.yaml"
    settings = {
        "server": {"port": 0},
        "admin": {"enabled": False},
        "usage_log": {"path": str(usage_log)},
        "models": {MODEL: {"backend": "pool", "upstream_model": upstream_model, "aliases": ["gpt-4o-mini"]}},
        "backends": {
            "pool": {
                "engine": engine,
                "replicas": [{"name": name, "url": url} for name, url in replicas.items()],
                "timeouts": {"first_token_s": SDK_TIMEOUT_S, "idle_s": SDK_TIMEOUT_S},
            }
        },
        **sections,
    }
    config.write_text(yaml.safe_dump(settings))
    with (
        (folder / "gateway.log").open("wb+") as log,
        subprocess.Popen(
            tethered([sys.executable, "-m", "gateway", "serve", "--config", str(config)]),
            env={name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield GatewayProcess(_address(process, folder / "gateway.log"), usage_log)
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


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address the gateway says it serves on."""
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end and process.poll() is None:
        serving = _SERVING.search(log.read_text())
        if serving is not None:
            return serving[1]
        time.sleep(0.05)
    raise RuntimeError(f"the gateway did not start:\n{log.read_text()}")
