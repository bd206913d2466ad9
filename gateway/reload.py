"""Reading the configuration again while serving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gateway.config import ConfigError, Settings, keep_restart_only, restart_only_changes

logger = logging.getLogger("tidegate")


class Reloader:
    """Reads on request and hands on what can be used; what cannot is logged and changes nothing.

    One reading at a time: a request that comes during one is for the file's content after it, so it is read once more.
    """

    def __init__(self, settings: Settings, read: Callable[[], Settings], apply: Callable[[Settings], None]) -> None:
        self._settings = settings
        self._read = read
        self._apply = apply
        self._wanted = False
        self._task: asyncio.Task[None] | None = None

    def request(self) -> None:
        self._wanted = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="reload")

    async def _run(self) -> None:
        while self._wanted:
            self._wanted = False
            try:
                settings = await asyncio.to_thread(self._read)
            except ConfigError as error:
                logger.error("reload refused, the running configuration stays:\n%s", error)
            else:
                self._take(settings)

    def _take(self, settings: Settings) -> None:
        changed = restart_only_changes(self._settings, settings)
        if changed:
            logger.warning("reload: these need a restart and stay as they were: %s", ", ".join(changed))
        self._settings = keep_restart_only(self._settings, settings)
        self._apply(self._settings)
        logger.info("configuration reloaded: %d models, %d backends", len(settings.models), len(settings.backends))
