"""One pool: what it is asked for, how many there should be, and who goes when there are to be fewer.

Where the provider lets anybody choose, replicas go in this order: the gateway has all workers give them nothing new,
waits until they are empty (or `drain_s` is over), and then the provider is told. When more are wanted meanwhile, those
that are not told yet get work again before any is started.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from backends.discovery.member import Member
from gateway.config.scaling import Scaling
from gateway.errors import GatewayError
from gateway.scaling.agents import PoolReport, excess, shares
from gateway.scaling.combining import PoolView
from gateway.scaling.memory import Memory, merged
from gateway.scaling.notes import PoolDemand
from gateway.scaling.providers import Local, Order, Provider, ProviderError, provider_of
from gateway.scaling.standing import HISTORY, STARTS, Change, Hold, KeptPool, Leaving, Said, Standing
from gateway.sources import Silent
from routing.scaling import Demand, Recommendation, Rules, Scaler

logger = logging.getLogger("tidegate")

ASK_EVERY_S = 30.0
"""How often a provider that knows is asked how many there should be: somebody else may have changed it."""
FIRST_BACK_OFF_S = 5.0
LONGEST_BACK_OFF_S = 300.0
STUCK_S = 900.0
"""A replica that the provider was told to take away and that is still there gets work again."""
HOLD = "hold"
"""Kind of reason of an operator's own number."""


class Hand(Protocol):
    """What a helm can do to replicas. Everything raises `Silent` or `GatewayError`."""

    async def drain(self, pool: str, replica: str) -> None:
        """Have all workers give it nothing new."""

    async def release(self, pool: str, identity: str) -> None:
        """Have them give work again to whatever is, or will be, at its address."""

    async def tell(self, pool: str, standing: Standing) -> None:
        """Have other gateways, and whoever comes after this one, know what is decided."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What is known of a pool at one moment, beside its demand."""

    members: Sequence[Member]
    """Found by any source, names filled in."""
    reports: Mapping[str, PoolReport]
    """By agent."""
    expected: int
    """Workers that should tell their demand, at least."""


@dataclass(slots=True)
class _Pending:
    """What is waited for at a provider."""

    applied: tuple[int, tuple[str, ...]] | None = None
    retry_at: float = 0.0
    failures: int = 0
    ask_at: float = 0.0
    ordered_at: list[float] = field(default_factory=list)
    """When replicas were ordered that are not ready yet."""


def rules_of(scaling: Scaling) -> Rules:
    """The settings, as `routing.scaling` wants them."""
    names = [each.name for each in dataclasses.fields(Rules)]
    return Rules(**{name: getattr(scaling, name) for name in names if hasattr(scaling, name)})


class Helm:
    """One pool's. `now` is monotonic seconds everywhere."""

    def __init__(self, pool: str, scaling: Scaling, kept: KeptPool, hand: Hand, kind: str = "") -> None:
        """`kind`: of `memory.kind_of`."""
        self.pool = pool
        self.scaling = scaling
        self.view = PoolView()
        self.provider: Provider = provider_of(pool, scaling)
        self.standing = kept.standing or Standing()
        self.hold: Hold | None = kept.hold
        self.history: list[Change] = list(kept.history)
        self.starts: list[tuple[str, float]] = list(kept.starts)
        self.acting = False
        self.errors = 0
        """Orders that a provider failed to take."""
        self.demand: Demand | None = None
        self.roll = kept.roll
        self._hand = hand
        self.kind = kind
        self._scaler = Scaler(rules_of(scaling), kind)
        self.memory = Memory(pool, self._scaler, bytes(kept.learned))
        for _, seconds in self.starts:
            self._scaler.learned_start(seconds)
        self._agents: dict[str, str] = {}
        """Of replicas that agents have launched."""
        self._going: frozenset[str] = frozenset()
        """Replicas that say themselves that they go: of a restart, say."""
        self._starting = 0
        """Members that no worker knows as a replica yet."""
        self._pending = _Pending()
        self._ready = 0
        self._met = False
        """Whether anything was ever told."""
        self._said_problem: str | None = None
        self._away: str | None = None

    def kept(self) -> KeptPool:
        """What is to outlive this process."""
        learned = msgspec.Raw(self.memory.kept)
        return KeptPool(self.standing, self.hold, self.starts, self.history, self.roll, learned)

    async def configure(self, scaling: Scaling, kind: str = "") -> None:
        """Go by these settings; what was learned stays, but for that of replicas of another kind."""
        if scaling == self.scaling and kind == self.kind:
            return
        self._scaler.change(rules_of(scaling), kind)
        self.kind = kind
        sections = ("provider", "kubernetes", "command", "webhook")
        if any(getattr(scaling, name) != getattr(self.scaling, name) for name in sections):
            await self.provider.aclose()
            self.provider = provider_of(self.pool, scaling)
            self._pending = _Pending()
        self.scaling = scaling

    @property
    def ceiling(self) -> int:
        """The most that settings and money allow."""
        return rules_of(self.scaling).ceiling

    # -- looking

    def look(self, notes: Mapping[str, PoolDemand], heard: Heard, now: float) -> Recommendation | None:
        """Take in what holds now, and what should be by that; None: nobody has told anything yet."""
        self.memory.begin(now)
        self.view.read(notes, now)
        for member in heard.members:
            if member.agent:
                self._agents[member.name] = member.agent
            if member.started_in_s is not None and member.state != "starting":
                self._learn(member.name, round(member.started_in_s, 1))
        known = {member.name for member in heard.members} | self.view.replicas.keys()
        self._agents = {name: agent for name, agent in self._agents.items() if name in known}
        self._going = frozenset(each.name for each in heard.members if each.state == "draining")
        starting = {each.name for each in heard.members if each.state == "starting"} - self.view.replicas.keys()
        self._starting = len(starting)
        self.demand = self.view.demand(self._starting, heard.expected, now)
        ready = 0 if self.demand is None else self.demand.replicas_ready
        if ready > self._ready and not any(each.started_in_s is not None for each in heard.members):
            for at in self._pending.ordered_at[: ready - self._ready]:
                self._learn(f"order {round(at)}", round(now - at, 1))
            del self._pending.ordered_at[: ready - self._ready]
        self._ready = ready
        if self.demand is None and not self._met:
            return None  # a gateway that has just started must not take its ignorance for an order
        self._met = True
        found = self._scaler.decide(self.demand, now)
        self.memory.take(now)
        return found

    def hear(self, learned: bytes | None, holder: str, now: float) -> None:
        """What the store has of what gateways have learned. `holder`: this one's name."""
        self.memory.begin(now)
        taken = self.memory.hear(learned, holder, now)
        if taken is not None:
            for name, seconds in taken.starts:
                self._learn(name, seconds)
            self.history = merged(self.history, taken.history)[-HISTORY:]

    def _learn(self, name: str, seconds: float) -> None:
        if (name, seconds) not in self.starts:
            self.starts = [*self.starts, (name, seconds)][-STARTS:]
            self._scaler.learned_start(seconds)

    def follow(self, standing: Standing | None) -> None:
        """Another gateway decides, and this is what it says."""
        self.acting = False
        if standing is not None:
            self._remember(standing)
            self.standing = standing

    def away(self, why: str) -> None:
        """The store does not answer: nothing is changed until it does."""
        self.acting = False
        self._away = f"{why}; nothing is changed meanwhile"

    def back(self) -> None:
        """It answers."""
        self._away = None

    @property
    def decided(self) -> bool:
        """Whether anything was ever decided, by this gateway or another one, now or before the last start."""
        return self.standing.at_unix_s > 0.0

    @property
    def problem(self) -> str | None:
        """Why what is wanted is not acted on; None: it is."""
        return self._away or self.standing.problem

    # -- deciding and acting

    async def act(self, found: Recommendation, heard: Heard, before: Standing | None, now: float) -> Standing:
        """Decide, and have the provider act. `before`: what was in force, by whoever decided it."""
        if not self.acting and before is not None:
            self.standing = before  # of the gateway that decided until now, what leaves included
        elif not self.acting:  # the store knows nothing (any more), of drains neither
            self.standing.leaving = {name: each for name, each in self.standing.leaving.items() if each.told}
        self.acting = True
        wanted, reasons = found.count, [Said(each.kind, each.wanted, each.text) for each in found.reasons]
        limited_by = found.limited_by
        hold = self.hold
        if hold is not None:
            wanted = min(max(hold.count, self.scaling.min), self.ceiling)
            limited_by = "" if wanted == hold.count else "floor" if wanted > hold.count else "ceiling"
            reasons.insert(0, Said(HOLD, hold.count, f"{hold.by} holds it at {hold.count}"))
        told = self.standing
        standing = Standing(
            wanted=wanted,
            current=found.current,
            ready=self._ready,
            starting=0 if self.demand is None else self.demand.replicas_starting,
            reasons=reasons,
            limited_by=limited_by,
            forecast_per_s=round(found.forecast, 4),
            lead_time_s=round(found.lead_time_s, 1),
            usd_per_hour=round(wanted * self.scaling.usd_per_hour, 4),
            problem=told.problem,
            leaving=told.leaving,
            applied=told.applied,
            at_unix_s=time.time(),
        )
        self._remember(standing)
        self.standing = standing
        if self.provider.acts:
            await self._leave(standing, heard)
            await self._order(standing, now)
        else:
            await self.let_stay()
        return standing

    async def let_stay(self) -> None:
        """Nobody sees to it any more that those go that are drained to go: they get work again."""
        for name in list(self.standing.leaving):
            await self._release(self.standing.leaving, name)

    def _remember(self, standing: Standing) -> None:
        last = self.history[-1] if self.history else None
        if last is None or last.wanted != standing.wanted:
            first = standing.reasons[0] if standing.reasons else None
            why = "" if first is None else f"{first.kind}: {first.text}"
            if standing.limited_by:
                why += f" (limited by {standing.limited_by})"
            change = Change(round(standing.at_unix_s, 3), standing.wanted, standing.current, why)
            self.history = [*self.history, change][-HISTORY:]
            logger.info("pool %s: %d replicas wanted, %d there: %s", self.pool, change.wanted, change.current, why)

    def local_count(self, wanted: int) -> int:
        """Of these, how many agents are to have: others of the pool are none of theirs."""
        others = sum(1 for name, seen in self.view.replicas.items() if name not in self._agents and not seen.draining)
        parked = [name for name in self._parked() if name in self._agents]
        return max(0, wanted - others) + self._beside(wanted, parked)

    def _parked(self) -> list[str]:
        """Replicas that somebody has drained: they are there, and nobody can count on them."""
        return [
            name
            for name, seen in self.view.replicas.items()
            if 2 * seen.draining >= seen.by and name not in self.standing.leaving and name not in self._going
        ]

    def _beside(self, wanted: int, parked: Sequence[str]) -> int:
        """How many of these are had beside what is wanted: none is beyond what the settings allow."""
        return min(len(parked), max(0, self.ceiling - wanted))

    def agent_of(self, replica: str) -> str:
        """Who has launched it; empty: nobody who says so."""
        return self._agents.get(replica, "")

    async def _leave(self, standing: Standing, heard: Heard) -> None:
        """Drain those that are too many, undrain those that are wanted again, and see who is empty."""
        leaving, there, now_unix_s = standing.leaving, self.view.replicas, time.time()
        if self.demand is None:  # nobody tells anything: that no replica is seen does not mean that there is none
            return
        still = {each.name for each in heard.members if each.state != "starting"}  # that begins another life
        for name in [each for each in leaving if each not in there and each not in still]:
            await self._release(leaving, name)
        for name, each in list(leaving.items()):
            if each.told and now_unix_s - each.since_unix_s > self.scaling.drain_s + STUCK_S:
                logger.warning("pool %s: %s was to go and is still there; it gets work again", self.pool, name)
                await self._release(leaving, name)
        more, back = self._difference(standing, heard)
        for name in back:
            await self._release(leaving, name)
        for name in more:
            leaving[name] = Leaving(there[name].identity, now_unix_s)
            logger.info("pool %s: %s is drained to go", self.pool, name)
        if more:  # first: should this gateway end between the two, the next one knows what is drained, and why
            await self._hand.tell(self.pool, standing)
        for name, each in leaving.items():
            seen = there.get(name)
            if seen is not None and seen.draining < seen.by:
                if not seen.draining and not each.told:  # nobody knows of it, or any more: all its time begins now
                    each.since_unix_s = now_unix_s
                await self._drain(name)
            empty = seen is None or (seen.empty and self.demand.complete)
            if not each.told and name not in more:
                each.told = empty or now_unix_s - each.since_unix_s > self.scaling.drain_s
                if each.told:
                    logger.info("pool %s: %s goes%s", self.pool, name, "" if empty else ", not empty")

    async def _drain(self, name: str) -> None:
        try:
            await self._hand.drain(self.pool, name)
        except (Silent, GatewayError) as error:
            logger.debug("drain of %s/%s: %s", self.pool, name, error)

    async def _release(self, leaving: dict[str, Leaving], name: str) -> None:
        """It no longer is to go, or is gone: an engine that is started at its address is to get work."""
        try:
            await self._hand.release(self.pool, leaving[name].identity)
        except (Silent, GatewayError) as error:
            logger.debug("undrain of %s/%s: %s", self.pool, name, error)
            return
        del leaving[name]

    def _difference(self, standing: Standing, heard: Heard) -> tuple[list[str], list[str]]:
        """Names of those that are to be drained, and of those that are to get work again."""
        leaving = standing.leaving
        free = [
            name for name, seen in self.view.replicas.items() if name not in leaving and 2 * seen.draining < seen.by
        ]
        undecided = [name for name, each in leaving.items() if not each.told]
        if isinstance(self.provider, Local):
            count = self.local_count(standing.wanted)
            more: list[str] = []
            for agent, over in excess(count, heard.reports, self._agents, leaving).items():
                more += self._cheapest([name for name in free if self._agents.get(name) == agent], over)
            back: list[str] = []
            for agent, share in shares(count, heard.reports).items():
                going = [name for name in leaving if self._agents.get(name) == agent]
                lacking = share - (heard.reports[agent].launched - len(going))
                back += [name for name in undecided if self._agents.get(name) == agent][: max(0, lacking)]
            return more, back
        lacking = standing.wanted - len(free) - self._starting
        if lacking >= 0 or not self.provider.chooses:
            return [], undecided[: max(0, lacking)] if self.provider.chooses else undecided
        going_by_itself = self.provider.going(free, standing.wanted)
        if going_by_itself is not None:
            return [name for name in free if name in going_by_itself], []
        return self._cheapest(free, max(0, len(free) - standing.wanted)), []

    def _cheapest(self, names: Sequence[str], count: int) -> list[str]:
        """Those with the fewest requests, then those that are believed to hold the least."""
        there = self.view.replicas
        ordered = sorted(names, key=lambda name: (there[name].in_flight, there[name].warm_tokens, name))
        return ordered[:count]

    async def _order(self, standing: Standing, now: float) -> None:
        """Tell the provider, where it was told something else or knows of something else."""
        pending = self._pending
        if now < pending.retry_at or self.demand is None:
            return
        staying = sum(not each.told for each in standing.leaving.values())
        parked = self._parked() if self.provider.chooses else ()
        count = standing.wanted + staying + self._beside(standing.wanted, parked)
        leave = tuple(standing.leave)
        due = pending.applied != (count, leave)
        try:
            if not due and now >= pending.ask_at:
                pending.ask_at = now + ASK_EVERY_S
                knows = await self.provider.current()
                due = knows is not None and knows != count
            if due and pending.applied is None and not leave and standing.applied == count:
                due = False  # another gateway, or this one before it was started again, has said so
                pending.applied = (count, leave)
            if due:
                reasons = tuple(f"{each.kind}: {each.text}" for each in standing.reasons)
                await self.provider.apply(Order(self.pool, count, standing.current, leave, reasons))
        except ProviderError as error:
            self._failed(str(error), now)
            return
        if due:
            before = standing.current if pending.applied is None else pending.applied[0]
            pending.ordered_at = [*pending.ordered_at, *[now] * max(0, count - before)][-64:]
            pending.applied, pending.ask_at = (count, leave), now + ASK_EVERY_S
        standing.applied, standing.problem = count, None
        pending.failures = 0
        if self._said_problem is not None:
            logger.info("pool %s: the provider %s acts again", self.pool, self.provider.name)
            self._said_problem = None

    def _failed(self, why: str, now: float) -> None:
        pending = self._pending
        self.errors += 1
        pending.retry_at = now + min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2.0**pending.failures)
        pending.failures += 1
        self.standing.problem = why
        if self._said_problem is None:
            logger.warning("pool %s: %s; it is tried again, less and less often", self.pool, why)
            self._said_problem = why
