"""What the process that answers operators knows and can do; there is one for a gateway, however many its workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.accounts.costs import Costs
from gateway.admin.access import Access
from gateway.admin.audit import AuditLog
from gateway.config import Settings
from gateway.inspection.door import Door
from gateway.members.drains import Drains
from gateway.members.registering import Registrations
from gateway.members.service import Members
from gateway.rollups.hub import Hub
from gateway.rollups.service import Rollups
from gateway.scaling.service import ScalingService
from gateway.sources import Source
from gateway.starting.telling import StartTeller
from gateway.steering.reading import ConfigReader

if TYPE_CHECKING:
    from gateway.database.database import Database


class Desk:
    """Made once, in the process that has the admin listener; each area of the admin side gets it."""

    def __init__(
        self,
        sources: Sequence[Source],
        settings: Callable[[], Settings],
        *,
        reload: Callable[..., Awaitable[Settings]],
        database: Callable[[], Database | None],
        state_dir: Path | None,
        read: Callable[[], Settings] | None = None,
        door: Door | None = None,
    ) -> None:
        """`database` blocks, and gives None in a gateway without keys."""
        self.sources = sources
        self._settings = settings
        self.reload = reload
        """Read the configuration again, now: `await desk.reload()`, or with another function than `read` to read it
        by. Raises `ConfigError`, and then nothing has changed."""
        self.read = read
        """What a reload reads by. Overrides and origins are known where it is a
        `gateway.steering.reading.ConfigReader`, as it is in every gateway that the command has started."""
        self.database = database
        self.state_dir = state_dir
        """Where this gateway may keep files; None: nowhere."""
        self.door = door
        """The gateway's own way to its inference listener; None: there is none."""
        self.at_end: list[Callable[[], Awaitable[None]]] = []
        """What areas have to end."""
        self.started_unix_s = time.time()
        self.hub = Hub()
        self.access = Access(lambda: self.settings.admin)
        """Tokens, and who has logged in."""
        self.audit = AuditLog(database, state_dir)
        drains = Drains(sources, settings)
        self.members = Members(settings, read if isinstance(read, ConfigReader) else None, reload, drains, state_dir)
        """Where replicas come from that nobody has written down."""
        self.registrations = Registrations(self.members, sources, settings)
        self._beside: list[asyncio.Task[None]] = []
        self._drains = drains
        self.rollups = Rollups(sources, settings, state_dir, self.hub)
        self.costs = Costs(sources, state_dir)
        self.scaling = ScalingService(self)
        """How many replicas there should be."""
        self._starts = StartTeller(sources, settings, self.members, lambda: self.scaling.helms)

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._settings()

    async def find(self) -> None:
        """Look for replicas, and put those that are found into force; go on looking, and see to it that there are as
        many as are needed. Whether or not operators have a listener, and before requests are served."""
        await self.members.start()
        loop = asyncio.get_running_loop()
        self._beside = [
            loop.create_task(self._drains.run(), name="drains of members"),
            loop.create_task(self.registrations.run(), name="registrations"),
            loop.create_task(self._starts.run(), name="starts"),
        ]
        await self.scaling.start()

    def follow(self) -> None:
        """The settings in force are others now."""
        self.members.follow(self.settings)

    async def lose(self) -> None:
        """End what `find` began."""
        await self.scaling.aclose()
        for task in self._beside:
            task.cancel()
        await asyncio.gather(*self._beside, return_exceptions=True)
        await self.members.aclose()

    async def start(self) -> None:
        """Begin what runs beside the answers."""
        await self.rollups.start()
        await self.costs.start()

    async def count(self) -> None:
        """Take in all that workers have counted by now: one of them is about to end."""
        await self.costs.collect(0.0)
        await self.rollups.fresh(0.0)

    async def aclose(self) -> None:
        """End it."""
        for end in self.at_end:
            await end()
        await self.costs.aclose()
        await self.rollups.aclose()
        self.access.sessions.end_all()
        await self.audit.aclose()
