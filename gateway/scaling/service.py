"""The loop that decides how many replicas pools should have, in the process that answers operators.

Of several gateways on one store, one decides for a pool: the one that has the lease `scaling/<pool>`. All read what
workers tell, so that any of them can go on; those that do not decide show what the one that does has said.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import msgspec

from backends.discovery.member import Member
from gateway.errors import GatewayError
from gateway.notices import AGENT, DEMAND, HOLD, LEARNED, ORDER, ROLL
from gateway.scaling.agents import LOST_AFTER_S, Orders, PoolOrder, PoolReport, Report, decoded, roll_for, told
from gateway.scaling.agents import RENEW_S as AGENT_RENEW_S
from gateway.scaling.combining import by_pool
from gateway.scaling.helm import Heard, Helm
from gateway.scaling.memory import kind_of
from gateway.scaling.notes import PoolDemand, read_note
from gateway.scaling.providers import Local
from gateway.scaling.standing import FILE, Hold, Kept, KeptPool, Standing, read_kept, write_kept
from gateway.sources import Silent, Source
from gateway.watch.notes import DRAIN
from routing.scaling import Recommendation

if TYPE_CHECKING:
    from gateway.admin.desk import Desk

logger = logging.getLogger("tidegate")

PERIOD_S = 5.0
LEASE_S = 8.0
"""With the period, another gateway takes over within 13 seconds."""
SAVE_EVERY_S = 10.0
SEEN_WITHIN_S = 3.0
"""What was posted, workers have read by then."""
LONGEST_HOLD_S = 86_400.0
LEARNED_FOR_S = 86_400.0
"""How long the store keeps what was learned, after the last gateway that has."""
LEASE = "scaling"

T = TypeVar("T")


class ScalingService:
    """One gateway's: `start`, then `aclose`. While no pool has a scaling it does next to nothing."""

    def __init__(self, desk: Desk, *, period_s: float = PERIOD_S) -> None:
        self._desk = desk
        self._period_s = period_s
        self.holder = f"{os.getpid()}-{secrets.token_hex(6)}"
        """Of leases: this life of this gateway."""
        self.helms: dict[str, Helm] = {}
        """By pool, in the order of the configuration."""
        self.agents: dict[str, Report] = {}
        """That were heard of in the last round."""
        self._heard: dict[str, tuple[Report, float]] = {}
        """What agents have said to this gateway, and when."""
        self._kept = Kept()
        self._loaded = False
        self._restored: set[str] = set()
        """Pools whose number by an operator was told again after the start."""
        self._touched: dict[str, float] = {}
        """When such a number was given or taken back here."""
        self._acts: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._saved_at = -1e9
        self._saved = b""
        self._failing = False
        self._turn = asyncio.Lock()

    # -- its life

    async def start(self) -> None:
        """Begin to decide."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="scaling")

    async def aclose(self) -> None:
        """End; what was ordered stays ordered."""
        tasks = [each for each in (self._task, *self._acts.values()) if each is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for helm in self.helms.values():
            await helm.provider.aclose()
            helm.memory.take(time.monotonic(), at_once=True)
        if self._loaded:
            await self._save(0.0)

    async def _run(self) -> None:
        while True:
            begun = time.monotonic()
            try:
                await self.round()
                self._failing = False
            except Exception:
                if not self._failing:
                    logger.exception("scaling: a round failed; this is said once")
                self._failing = True
            # From beginning to beginning: a slow provider must not cost this gateway the leases of all pools.
            await asyncio.sleep(max(0.0, begun + self._period_s - time.monotonic()))

    async def round(self) -> None:
        """Look at all pools once, and decide for those that nobody else decides for."""
        async with self._turn:
            await self._configure()
            if not self.helms:
                await self._hear_agents()
                return
            now = time.monotonic()
            try:
                demand = by_pool(await self.notices(DEMAND))
                self.agents = decoded(await self.notices(AGENT))
                orders, holds, rolls, learned = [await self.notices(kind) for kind in (ORDER, HOLD, ROLL, LEARNED)]
            except (Silent, GatewayError) as error:
                for helm in self.helms.values():
                    helm.away(f"the store or the workers do not answer: {error}")
                return
            for name, helm in self.helms.items():
                helm.hear(learned.get(f"{LEARNED}/{name}"), self.holder, now)
            ends = await asyncio.gather(
                *(
                    self._pool(
                        helm,
                        demand.get(name, {}),
                        read_note(orders.get(f"{ORDER}/{name}"), Standing),
                        read_note(holds.get(f"{HOLD}/{name}"), Hold),
                        now,
                    )
                    for name, helm in self.helms.items()
                ),
                return_exceptions=True,
            )
            for name, helm in self.helms.items():
                helm.roll = max(helm.roll, _number(rolls.get(f"{ROLL}/{name}")))
            await self._save(SAVE_EVERY_S)
            for each in ends:
                if isinstance(each, BaseException):  # of one pool; the others have gone on
                    raise each

    async def _hear_agents(self) -> None:
        """They launch, and go, also where nobody scales."""
        if self.agents or any(each.launch is not None for each in self._desk.settings.backends.values()):
            with suppress(Silent, GatewayError):  # the next round knows
                self.agents = await self._reports()

    async def _configure(self) -> None:
        wanted = {name: each.scaling for name, each in self._desk.settings.backends.items() if each.scaling is not None}
        if wanted and not self._loaded:
            if self._desk.state_dir is not None:
                self._kept = await asyncio.to_thread(read_kept, self._desk.state_dir / FILE)
            self._loaded = True
        for name in self.helms.keys() - wanted.keys():
            await self._drop(self.helms.pop(name))
        for name, scaling in wanted.items():
            kind = kind_of(self._desk.settings, name)
            if name in self.helms:
                await self.helms[name].configure(scaling, kind)
            else:
                self.helms[name] = Helm(name, scaling, self._kept.pools.get(name, KeptPool()), self, kind)
        self.helms = {name: self.helms[name] for name in wanted}

    async def _drop(self, helm: Helm) -> None:
        """Nobody is to decide about this pool any more; nor will anybody have those go that were drained to go."""
        task = self._acts.pop(helm.pool, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if helm.acting:
            await helm.let_stay()
            with suppress(Silent, GatewayError):
                await self._any(lambda source: source.retract(f"{ORDER}/{helm.pool}"))
        self._kept.pools[helm.pool] = helm.kept()
        await helm.provider.aclose()

    async def _pool(
        self,
        helm: Helm,
        demand: Mapping[str, PoolDemand],
        standing: Standing | None,
        hold: Hold | None,
        now: float,
    ) -> None:
        heard = Heard(
            self._members(helm.pool),
            {agent: each.pools[helm.pool] for agent, each in self.agents.items() if helm.pool in each.pools},
            len(self._desk.sources),
        )
        found = helm.look(demand, heard, now)
        try:
            await self._hold(helm, hold, new_store=standing is None)
            acting = await self.claim(f"{LEASE}/{helm.pool}")
        except (Silent, GatewayError) as error:
            helm.away(f"the store does not answer: {error}")
            return
        helm.back()
        if not acting or found is None:
            helm.follow(standing)
            return
        running = self._acts.get(helm.pool)
        if running is not None and not running.done():
            return  # a provider takes its time; what is wanted by then is told then
        task = asyncio.get_running_loop().create_task(self._act(helm, found, heard, standing, now))
        self._acts[helm.pool] = task
        await asyncio.wait([task], timeout=self._period_s)

    async def _act(
        self, helm: Helm, found: Recommendation, heard: Heard, standing: Standing | None, now: float
    ) -> None:
        try:
            made = await helm.act(found, heard, standing, now)
            if helm.acting:  # still, after what a provider takes its time for
                await self.tell(helm.pool, made)
                await self._tell_learned(helm)
        except (Silent, GatewayError) as error:
            helm.away(f"the store does not answer: {error}")
        except Exception:
            logger.exception("scaling: pool %s", helm.pool)

    async def _tell_learned(self, helm: Helm) -> None:
        """Once a minute: whoever decides after this gateway is to know it."""
        value = helm.memory.to_tell(self.holder, helm.starts, helm.history)
        if value is not None:
            key = f"{LEARNED}/{helm.pool}"
            await self._any(lambda source: source.announce(key, value, LEARNED_FOR_S))

    async def _hold(self, helm: Helm, told: Hold | None, *, new_store: bool) -> None:
        """The number of an operator, wherever it was given; after a start, the one that was in force before, unless the
        store has gone on meanwhile: then somebody has taken it back."""
        if helm.pool not in self._restored:
            self._restored.add(helm.pool)
            left_s = 0.0 if helm.hold is None else helm.hold.until_unix_s - time.time()
            if new_store and told is None and helm.hold is not None and 0.0 < left_s <= LONGEST_HOLD_S:
                await self._announce(f"{HOLD}/{helm.pool}", helm.hold, left_s)
                return
        if time.monotonic() - self._touched.get(helm.pool, -1e9) < SEEN_WITHIN_S:
            return  # workers may not have read it yet
        helm.hold = told if told is not None and told.until_unix_s > time.time() else None

    def _members(self, pool: str) -> Sequence[Member]:
        return [
            msgspec.structs.replace(each.member, name=each.name)
            for each in self._desk.members.of(pool)
            if not each.refused
        ]

    # -- what operators and agents ask for

    async def hold(self, pool: str, count: int, for_s: float, by: str) -> Hold:
        """Have so many replicas for a while. Raises `GatewayError`, `Silent`."""
        made = Hold(count, round(time.time() + for_s, 3), by)
        await self._announce(f"{HOLD}/{pool}", made, for_s)
        self._restored.add(pool)
        self._touched[pool] = time.monotonic()
        self.helms[pool].hold = made
        await self._save(0.0)
        return made

    async def release_hold(self, pool: str) -> Hold | None:
        """End that; what was held. Raises `GatewayError`, `Silent`."""
        helm = self.helms[pool]
        await self._any(lambda source: source.retract(f"{HOLD}/{pool}"))
        held, helm.hold = helm.hold, None
        self._touched[pool] = time.monotonic()
        self._restored.add(pool)
        await self._save(0.0)
        return held

    async def roll(self, pool: str) -> int:
        """Have all servers of a pool restarted, one by one; returns the number of the order. Raises `ProviderError`,
        `GatewayError`, `Silent`."""
        helm = self.helms.get(pool)
        if (
            helm is not None
            and not isinstance(helm.provider, Local)
            and self._desk.settings.backends[pool].launch is None
        ):
            await helm.provider.roll()
        reports = await self._reports()
        carried_out = [each.pools[pool].roll for each in reports.values() if pool in each.pools]
        last = _number((await self.notices(ROLL)).get(f"{ROLL}/{pool}"))
        known = self._kept.pools.get(pool, KeptPool()).roll if helm is None else helm.roll
        number = 1 + max(last, known, *carried_out)
        await self._any(lambda source: source.announce(f"{ROLL}/{pool}", b"%d" % number, None))
        if helm is not None:
            helm.roll = number
        else:
            self._kept.pools.setdefault(pool, KeptPool()).roll = number
        await self._save(0.0)
        return number

    @property
    def heard_unix_s(self) -> dict[str, float]:
        """When agents have spoken to this gateway last. Others speak to another one."""
        now, now_unix_s = time.monotonic(), time.time()
        return {name: round(now_unix_s - (now - at), 1) for name, (_, at) in self._heard.items()}

    async def reported(self, agent: str, report: Report) -> Orders:
        """An agent says what it has; what it is told. Raises `GatewayError`, `Silent`."""
        await self._announce(f"{AGENT}/{agent}", report, LOST_AFTER_S)
        self._heard[agent] = report, time.monotonic()
        reports = await self._reports()
        orders, rolls = await self.notices(ORDER), await self.notices(ROLL)
        self.agents = reports
        found: dict[str, PoolOrder] = {}
        for pool in report.pools:
            backend = self._desk.settings.backends.get(pool)
            if backend is None or backend.launch is None:
                continue
            of_pool = {name: each.pools[pool] for name, each in reports.items() if pool in each.pools}
            roll = roll_for(agent, _number(rolls.get(f"{ROLL}/{pool}")), of_pool)
            standing = read_note(orders.get(f"{ORDER}/{pool}"), Standing)
            found[pool] = self._told(pool, agent, of_pool, backend.launch.count, standing, roll)
        return Orders(AGENT_RENEW_S, found)

    async def _reports(self) -> dict[str, Report]:
        """Of all agents. What one has said here a moment ago, workers may not have read yet: without it, two would
        launch for one."""
        now = time.monotonic()
        self._heard = {name: each for name, each in self._heard.items() if now - each[1] < LOST_AFTER_S}
        return {**decoded(await self.notices(AGENT)), **{name: each for name, (each, _) in self._heard.items()}}

    def _told(
        self,
        pool: str,
        agent: str,
        reports: Mapping[str, PoolReport],
        configured: int,
        standing: Standing | None,
        roll: int,
    ) -> PoolOrder:
        helm, mine = self.helms.get(pool), reports[agent]
        if helm is None or not isinstance(helm.provider, Local):
            return PoolOrder(configured, [], roll)
        if standing is None:  # nothing was decided yet, in this life or ever: what runs runs on
            first = 0 if helm.decided else min(configured, mine.max)
            return PoolOrder(max(mine.launched, first), [], roll)
        leave = [name for name in standing.leave if helm.agent_of(name) == agent]
        return told(helm.local_count(standing.wanted), agent, reports, leave, roll)

    # -- through any worker that answers

    async def drain(self, pool: str, replica: str) -> None:
        """As `helm.Hand`."""
        await self._any(lambda source: source.drain(pool, replica, True))

    async def release(self, pool: str, identity: str) -> None:
        """As `helm.Hand`. The fact itself is taken back: there may be no replica of its name any more."""
        await self._any(lambda source: source.retract(f"{DRAIN}/{pool}/{identity}"))

    async def tell(self, pool: str, standing: Standing) -> None:
        """As `helm.Hand`."""
        standing.by = self.holder
        await self._announce(f"{ORDER}/{pool}", standing, None)

    async def notices(self, kind: str) -> Mapping[str, bytes]:
        """Those of a kind. Raises `GatewayError`, `Silent`."""
        return await self._any(lambda source: source.notices(kind))

    async def claim(self, lease: str) -> bool:
        """Whether this gateway has the lease. Raises `GatewayError`, `Silent`."""
        return await self._any(lambda source: source.claim(lease, self.holder, LEASE_S))

    async def _announce(self, key: str, what: msgspec.Struct, ttl_s: float | None) -> None:
        value = msgspec.json.encode(what)
        await self._any(lambda source: source.announce(key, value, ttl_s))

    async def _any(self, ask: Callable[[Source], Awaitable[T]]) -> T:
        last: Silent | None = None
        for source in self._desk.sources:
            try:
                return await ask(source)
            except Silent as error:
                last = error
        raise last or Silent("there is no worker")

    # -- the file

    async def _save(self, every_s: float) -> None:
        now = time.monotonic()
        if self._desk.state_dir is None or not self._loaded or now - self._saved_at < every_s:
            return
        self._saved_at = now
        for name, helm in self.helms.items():
            self._kept.pools[name] = helm.kept()
        data = msgspec.json.encode(self._kept)
        if data == self._saved:
            return
        with suppress(OSError):  # the next one may find the disk writable again; what is lost is lead times
            await asyncio.to_thread(write_kept, self._desk.state_dir / FILE, data)
            self._saved = data


def _number(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() and len(value) < 16 else 0
