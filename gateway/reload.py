"""Reading the configuration again while serving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gateway.config import ConfigError, Settings, keep_restart_only, restart_only_changes

logger = logging.getLogger("tidegate")


class Reloader:
    """Reads on request and hands on what can be used; what cannot is logged and changes nothing.

    `check` raises a `ConfigError` for settings that cannot be used as they would be in force: with the old values of
    what needs a restart; `refused` is called where nothing is handed on. One reading at a time: a request that comes
    during one is for the file's content after it, so it is read once more.
    """

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        apply: Callable[[Settings], None],
        check: Callable[[Settings], None] = lambda _: None,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._read = read
        self._apply = apply
        self._check = check
        self._refused = refused
        self._reading = asyncio.Lock()
        self._wanted = False
        self._task: asyncio.Task[None] | None = None

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._settings

    async def now(self, read: Callable[[], Settings] | None = None) -> Settings:
        """Read at once; what is in force then. Raises `ConfigError`, and then nothing has changed. `read`: instead of
        what a reload reads."""
        await self._turn(read or self._read)
        return self._settings

    def request(self) -> None:
        self._wanted = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="reload")

    async def _run(self) -> None:
        while self._wanted:
            self._wanted = False
            try:
                await self._turn(self._read)
            except ConfigError as error:
                logger.error("reload refused, the running configuration stays:\n%s", error)

    async def _turn(self, read: Callable[[], Settings]) -> None:
        async with self._reading:  # what was read first is taken first
            try:
                self._take(await asyncio.to_thread(read))
            except ConfigError:
                self._refused()
                raise

    def _take(self, settings: Settings) -> None:
        changed = restart_only_changes(self._settings, settings)
        if changed:
            logger.warning("reload: these need a restart and stay as they were: %s", ", ".join(changed))
        kept = keep_restart_only(self._settings, settings)
        self._check(kept)
        self._settings = kept
        self._apply(kept)
        logger.info("configuration reloaded: %d models, %d backends", len(settings.models), len(settings.backends))
