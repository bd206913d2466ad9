"""Two reasons to reload at once: what was read first is taken first."""

from __future__ import annotations

import asyncio
import threading

from gateway.config import Settings
from gateway.reload import Reloader


async def test_a_slow_reading_does_not_undo_a_later_one() -> None:
    old, first, second = (Settings.model_validate({"region": name}) for name in ("old", "first", "second"))
    taken: list[str | None] = []
    go_on, reading = threading.Event(), threading.Event()

    def slowly() -> Settings:
        reading.set()
        assert go_on.wait(10)
        return first

    reloader = Reloader(old, slowly, lambda settings: taken.append(settings.region))
    reloader.request()  # SIGHUP
    await asyncio.to_thread(reading.wait, 10)
    change = asyncio.create_task(reloader.now(lambda: second))
    done, _ = await asyncio.wait({change}, timeout=0.2)
    assert not done  # it waits for its turn
    go_on.set()
    assert await change is reloader.settings
    assert taken == ["first", "second"]
    assert reloader.settings.region == "second"
