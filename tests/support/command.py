"""Runs the `tidegate` command as a user would: a process of its own, with free ports, signals and a log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import yaml

PATIENCE_S = 20.0
"""For what takes a second or two on an idle machine."""


@dataclass
class ServeProcess:
    """A running `tidegate serve`, with every wait for it bounded."""

    process: asyncio.subprocess.Process
    config: Path
    state: Path
    runtime: Path
    """What it takes for the folder of temporary files."""
    log: list[str] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False

    async def read_log(self) -> None:
        """Until everybody who holds its standard error has closed it, workers included."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode().rstrip("\n"))
            self._changed.set()
        self._closed = True
        self._changed.set()

    async def logged(self, pattern: str) -> re.Match[str]:
        """The first line that matches, waiting for it."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for line in self.log:
                    if found := re.search(pattern, line):
                        return found
                assert not self._closed, "\n".join([f"ended without saying {pattern!r}:", *self.log])
                self._changed.clear()
                await self._changed.wait()

    async def ended(self) -> int:
        """The exit code, once the process and all its workers are gone."""
        async with asyncio.timeout(PATIENCE_S):
            code = await self.process.wait()
            while not self._closed:
                self._changed.clear()
                await self._changed.wait()
        return code

    async def url(self) -> str:
        """Where it serves, once it does."""
        return (await self.logged(r"serving on (http://[^ ,\"]+)"))[1]

    async def admin_url(self) -> str:
        return (await self.logged(r"admin on (http://[^ ,\"]+)"))[1]

    @property
    def token(self) -> str:
        return (self.state / "admin-token").read_text().strip()

    async def admin(self, client: httpx2.AsyncClient, path: str) -> httpx2.Response:
        """One question with the owner's token."""
        return await client.get(await self.admin_url() + path, headers={"authorization": f"Bearer {self.token}"})

    async def fleet(self, client: httpx2.AsyncClient) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = (await self.admin(client, "/admin/fleet")).json()["workers"]
        return workers

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


def write_config(path: Path, urls: Sequence[str], **sections: Any) -> None:
    """A file with model `m` over these replicas on free ports; `sections` replace or add top-level ones."""
    content = {
        "server": {"port": 0},
        "admin": {"port": 0},
        "shutdown": {"grace_s": 0, "drain_s": 30},
        "models": {"m": {"backend": "pool"}},
        "backends": {"pool": {"engine": "openai", "replicas": [{"url": url} for url in urls]}},
        **sections,
    }
    path.write_text(yaml.safe_dump(content))


def clean_environ(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test run's environment without settings of Tidegate, and with these variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return {**inherited, **(environ or {})}


@contextlib.asynccontextmanager
async def serve_process(
    folder: Path,
    urls: Sequence[str],
    *options: str,
    environ: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
    **sections: Any,
) -> AsyncIterator[ServeProcess]:
    """`tidegate serve --config ... OPTIONS`, killed at the end of the block if it still runs then.

    `wrapper`: a command that takes its place by running it, such as `prlimit --nofile=128`.
    """
    config, state = folder / "tidegate.yaml", folder / "state"
    write_config(config, urls, **sections)
    with tempfile.TemporaryDirectory() as runtime:  # pytest's own folders are too long for a socket's path
        process = await asyncio.create_subprocess_exec(
            *(
                *wrapper,
                sys.executable,
                "-m",
                "gateway",
                "serve",
                "--log-format=text",
                "--config",
                str(config),
                *options,
            ),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=clean_environ({"TIDEGATE_STATE_DIR": str(state), "TMPDIR": runtime, **(environ or {})}),
        )
        serving = ServeProcess(process, config, state, Path(runtime))
        reading = asyncio.create_task(serving.read_log())
        try:
            yield serving
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            async with asyncio.timeout(PATIENCE_S):
                await reading


async def run_tidegate(*arguments: str, environ: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """One command to its end: exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environ(environ),
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
