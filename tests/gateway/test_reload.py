"""Reading the configuration again: what is taken over, what is kept, and in which order."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gateway.config import ConfigError, Problem, Settings
from gateway.reload import Reloader
from tests.support.serving import settings_for

OLD = settings_for(["http://127.0.0.1:1"])


async def test_what_needs_a_restart_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    new = settings_for(["http://127.0.0.1:2"], server={"port": 7500})
    taken: asyncio.Queue[Settings] = asyncio.Queue()
    Reloader(OLD, lambda: new, taken.put_nowait).request()
    settings = await asyncio.wait_for(taken.get(), 5)
    assert settings.backends == new.backends
    assert settings.server == OLD.server
    assert "server.port" in caplog.text


async def test_a_bad_file_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    good = settings_for(["http://127.0.0.1:2"])
    answers: list[Settings | None] = [None, good]

    def read() -> Settings:
        settings = answers.pop(0)
        if settings is None:
            loop.call_soon_threadsafe(reloader.request)
            raise ConfigError([Problem("f.yaml", 1, "models", "is wrong", "")])
        return settings

    taken: asyncio.Queue[Settings] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    reloader = Reloader(OLD, read, taken.put_nowait)
    reloader.request()
    assert (await asyncio.wait_for(taken.get(), 5)).backends == good.backends
    assert "reload refused" in caplog.text
    assert taken.empty()


async def test_requests_during_a_reading_lead_to_one_more() -> None:
    reading, go_on = threading.Event(), threading.Event()
    reads = 0

    def read() -> Settings:
        nonlocal reads
        reads += 1
        reading.set()
        assert go_on.wait(5)
        return OLD

    taken: asyncio.Queue[Settings] = asyncio.Queue()
    reloader = Reloader(OLD, read, taken.put_nowait)
    reloader.request()
    await asyncio.to_thread(reading.wait, 5)
    for _ in range(3):
        reloader.request()
    go_on.set()
    for _ in range(2):
        await asyncio.wait_for(taken.get(), 5)
    assert reads == 2
