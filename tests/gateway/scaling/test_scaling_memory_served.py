"""What a scaler has learned outlives real gateways: over a restart, a kill, and at the one that takes over."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from gateway.scaling.memory import Taken, kind_of
from gateway.scaling.standing import FILE, Kept, KeptPool, read_kept, write_kept
from loadtests.engine import FakeEngine
from loadtests.ports import free_port
from tests.support.command import PATIENCE_S, ServeProcess, serve_process
from tests.support.learning import SERVES, taken, taught
from tests.support.redis_server import RedisServer
from tests.support.serving import settings_for

HASTY = """
import sys
from gateway.scaling import memory, service
memory.EVERY_S = service.SAVE_EVERY_S = 1.0  # the minute, and ten seconds
from gateway.cli import main
sys.exit(main(sys.argv[4:]))
"""
"""Runs `python -m gateway ...` in the same process, in less of a hurry."""


def hasty(folder: Path) -> tuple[str, ...]:
    script = folder / "hasty.py"
    script.write_text(HASTY)
    return (sys.executable, str(script))


def sections_for(urls: list[str], **more: Any) -> dict[str, Any]:
    backend = {"engine": "openai", "replicas": [{"url": url} for url in urls], "scaling": {"max": 4}}
    return {"backends": {"pool": backend}, "server": {"port": free_port()}, "admin": {"port": free_port()}, **more}


def folder_of(folder: Path, sections: dict[str, Any]) -> Path:
    """Where a gateway of this port keeps its files."""
    found = folder / "state" / f"gateway-127.0.0.1-{sections['admin']['port']}"
    found.mkdir(parents=True, exist_ok=True)
    return found


def file_with_it(folder: Path, sections: dict[str, Any], urls: list[str]) -> Path:
    """A file as of a gateway that has learned, and has ended."""
    kind = kind_of(settings_for(urls, backend={"scaling": {"max": 4}}), "pool")
    kept = KeptPool(learned=msgspec.Raw(taken(taught(kind))), starts=[("one", 33.0), ("two", 44.0)])
    path = folder_of(folder, sections) / FILE
    write_kept(path, msgspec.json.encode(Kept({"pool": kept})))
    return path


async def why(gateway: ServeProcess, client: httpx2.AsyncClient) -> str:
    """All reasons, as soon as this gateway decides; that another one is missed comes before the others."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            row = (await gateway.admin(client, "/admin/scaling/pool")).json()
            if row.get("acting") and row["reasons"]:
                return " ".join(each["text"] for each in row["reasons"])
            await asyncio.sleep(0.1)


async def weight_in(path: Path, *, since_unix_s: float) -> float:
    """Seconds of what was seen that the file tells of, as soon as it was taken after that moment."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = msgspec.json.decode(read_kept(path).pools["pool"].learned, type=Taken)
            if found.at_unix_s > since_unix_s:
                assert found.learned.capacity.line is not None
                return found.learned.capacity.line.weight
            await asyncio.sleep(0.2)


async def test_what_was_learned_outlives_a_kill_and_a_restart(tmp_path: Path) -> None:
    async with FakeEngine(models=("m",)) as engine, httpx2.AsyncClient(trust_env=False) as client:
        sections = sections_for(engine.urls)
        path = file_with_it(tmp_path, sections, engine.urls)
        began_unix_s = time.time()
        async with serve_process(tmp_path, [], wrapper=hasty(tmp_path), **sections) as gateway:
            assert SERVES in await why(gateway, client)
            await gateway.logged(r"pool pool: scaling goes on from what .* had learned")
            before = await weight_in(path, since_unix_s=began_unix_s)
            gateway.signal(signal.SIGKILL)
            await gateway.ended()
        async with serve_process(tmp_path, [], **sections) as gateway:
            assert SERVES in await why(gateway, client)
            began_unix_s = time.time()
            gateway.signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        assert await weight_in(path, since_unix_s=began_unix_s) >= 0.9 * before


async def test_who_takes_over_after_a_kill_knows_what_the_other_one_had_learned(tmp_path: Path) -> None:
    with RedisServer() as redis_server:
        async with FakeEngine(models=("m",)) as engine, httpx2.AsyncClient(trust_env=False) as client:
            folders = [tmp_path / "a", tmp_path / "b"]
            for folder in folders:
                folder.mkdir()
            told = [sections_for(engine.urls, store=redis_server.url) for _ in folders]
            file_with_it(folders[0], told[0], engine.urls)
            async with serve_process(folders[0], [], wrapper=hasty(tmp_path), **told[0]) as first:
                assert SERVES in await why(first, client)
                async with serve_process(folders[1], [], wrapper=hasty(tmp_path), **told[1]) as second:
                    await second.logged("pool pool: scaling goes on from what another gateway had learned")
                    first.signal(signal.SIGKILL)
                    await first.ended()
                    assert SERVES in await why(second, client)
                    second.signal(signal.SIGTERM)
                    assert await second.ended() == 0
            found = read_kept(folder_of(folders[1], told[1]) / FILE).pools["pool"]
            assert found.starts == [("one", 33.0), ("two", 44.0)]
