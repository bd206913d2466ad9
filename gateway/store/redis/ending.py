"""Ending tasks that may be in the middle of something of redis-py's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

AGAIN_S = 0.2
"""After which a task that was cancelled, and goes on, is cancelled again."""


async def end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel them until they have ended; how they end is nobody's business.

    Once is not enough: redis-py writes under `asyncio.wait_for`, and that of Python 3.11 loses a cancellation which
    comes just as the write ends. The task would go on for ever, and whoever waits for it as well.
    """
    pending = all_of_them = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)
    await asyncio.gather(*all_of_them, return_exceptions=True)  # asked, so that none is told as never retrieved
