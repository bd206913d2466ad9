"""Asks one replica how it is, again and again. Of several workers the one that holds the lease does.

Two questions are cheap and asked often: whether the engine takes work, and how busy it is. What it is, and which
adapters it holds, is asked when it came back and now and then. Answers are posted as facts, which every worker,
this one included, takes in through its `Board`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import msgspec

from backends.dialects.protocol import Adapter, AdapterRefused, EngineInfo, EngineLoad, NotOffered, Readiness
from backends.gpus import read_gpus
from backends.side import SideChannel, SideChannelError, Trouble
from backends.signals import ADAPTERS, GPUS, INFO, LOAD
from backends.upstream import Upstream
from gateway.config import Backend, Dcgm
from gateway.store.protocol import MAX_VALUE_BYTES, Store, StoreError
from gateway.watch import notes
from routing.adapters import room

logger = logging.getLogger(__name__)

OWN_PROBE_S = 2.0
HOSTED_PROBE_S = 30.0
INFO_S = 30.0
ADAPTERS_S = 5.0
GPUS_S = 15.0
"""Half of the period at which NVIDIA's exporter reads the devices."""
NOT_OFFERED_S = 60.0
"""How long what an engine does not offer is not asked for again, unless it begins anew before."""
WARMED_S = 60.0
"""How long it is told that a replica is warm, for workers that have to wait for the store."""
LONGEST_FACT_S = 86_400.0
MANY_MODELS = 100
MANY_ADAPTERS = 200
"""Beyond this many their paths are left out of what workers tell each other; names alone are short."""


class Patrol:
    """One worker's rounds at one replica."""

    def __init__(
        self,
        upstream: Upstream,
        backend: Backend,
        model: str | None,
        store: Store,
        holder: str,
        warm: Callable[[Upstream, float], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """`model`: the name that its requests carry; a hosted API is asked about that one. `warm`: gives a replica that
        is new or begins anew what it needs before its first request, within so many seconds."""
        self._upstream = upstream
        self._health = backend.health
        self._dcgm = next((each.dcgm for each in backend.replicas if each.name == upstream.replica.name), None)
        self._exporter: SideChannel | None = None
        self._wanted = {each.name: each.path for each in backend.adapters}
        self._adapters_load = backend.adapters_load
        self._adapter_slots: int | None = None
        """As many as the engine last said."""
        self._warm = warm
        self._warm_s = backend.warm_up.hold_s
        self._model = upstream.model or model
        self._store = store
        self._holder = holder
        self._due: dict[str, float] = {}
        self._last_load: EngineLoad | None = None
        self._was_away = True
        self._return = ""
        """Stands for the engine's epoch where it has none of its own: another one after each absence."""
        self._epoch = ""
        self._known_before = False
        self._holding = False
        """Whether this worker held the lease at the last round."""
        self._asked_for: set[str] = set()
        """Adapters this worker has had loaded since the engine began; engines may drop them again as they like."""
        self._errands: dict[str, asyncio.Task[None]] = {}
        """The questions that are under way."""
        hosted = upstream.hosted
        self._probe_s = self._health.probe_interval_s or (HOSTED_PROBE_S if hosted else OWN_PROBE_S)
        self.made_a_round = asyncio.Event()
        self.round_s = self._probe_s if hosted else min(self._probe_s, self._health.load_interval_s)
        """Seconds between rounds."""

    def _lease(self, job: str) -> str:
        return f"{job}/{notes.replica_key(self._upstream.replica)}"

    async def run(self, rng: Random) -> None:
        """Make rounds until cancelled. The first begins at once; the others are spread, so that fleets do not beat."""
        try:
            while True:
                await self._round()
                self.made_a_round.set()
                await asyncio.sleep(self.round_s * rng.uniform(0.9, 1.1))
        finally:
            for task in self._errands.values():
                task.cancel()
            self._errands.clear()
            if self._exporter is not None:
                await self._exporter.aclose()
            with suppress(StoreError):
                await self._store.release(self._lease("watch"), self._holder)

    async def _round(self) -> None:
        replica = self._upstream.replica
        now = time.monotonic()
        self._upstream.check_progress(False, now)
        if replica.health.unavailable_reason(now) == "half_open" and await self._may_try():
            replica.health.begin_trial(now)
        if await self._claim("watch"):
            if not self._holding:
                self._holding = True
                self._adopt()
            await self._do(probe=self._probe, load=self._ask_load)
            if self._dcgm is not None:
                await self._do(gpus=partial(self._ask_gpus, self._dcgm))
            if not self._was_away:
                await self._do(rest=self._ask_rest)
            if self._warm is not None and replica.health.warming(time.monotonic()):
                await self._do(warm=partial(self._warm_up, self._warm))
        else:
            # Whoever holds the lease knows better what has changed meanwhile; begin from nothing when it is ours.
            self._due.clear()
            self._last_load = None
            self._was_away = True
            self._holding = False

    def _adopt(self) -> None:
        """Go on with the life of the engine that is known already: of another worker's, or from before a reload."""
        self._epoch = self._return = self._upstream.replica.epoch or ""
        self._known_before = bool(self._epoch)

    async def _do(self, **errands: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin what is not under way already, and wait for it, within reason.

        A page that takes ten seconds, or an adapter that takes minutes, keeps nobody from asking the next question,
        nor the lease from being renewed.
        """
        begun = [name for name in errands if name not in self._errands]
        for name in begun:
            self._errands[name] = asyncio.create_task(errands[name](), name=f"patrol: {name}")
        if begun:
            await asyncio.wait([self._errands[name] for name in begun], timeout=self.round_s)
        for name in errands:
            if self._errands[name].done():
                self._errands.pop(name).result()

    async def _ask_rest(self) -> None:
        await self._ask_info()
        await self._ask_adapters()

    async def _warm_up(self, warm: Callable[[Upstream, float], Coroutine[Any, Any, None]]) -> None:
        """Warm it, and have all workers use it."""
        replica = self._upstream.replica
        before = replica.epoch
        await warm(self._upstream, self._warm_s)
        if before in (None, replica.epoch):  # else it has begun anew meanwhile, and so does this
            replica.health.warmed(time.monotonic())  # not twice, should the next round come before the news
            await self._post(notes.WARMED, notes.WarmedNote(replica.epoch or ""), self._warm_s + WARMED_S)

    async def _may_try(self) -> bool:
        """Whether this worker is the one to send an ejected replica a request; without a store, each is."""
        try:
            return await self._claim("trial")
        except StoreError:
            return True

    async def _claim(self, job: str) -> bool:
        return await self._store.claim(self._lease(job), self._holder, max(5.0, 5 * self.round_s))

    def _is_due(self, question: str, interval_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(question, 0.0):
            return False
        # Early by half a round rather than late by one.
        self._due[question] = now + interval_s - self.round_s / 2
        return True

    async def _post(self, kind: str, note: msgspec.Struct, ttl_s: float) -> None:
        value = msgspec.json.encode(note)
        if len(value) > MAX_VALUE_BYTES:
            self._upstream.signals.lacks(kind, f"its answer makes a note of {len(value)} bytes, which is too large")
            return
        await self._store.post(notes.key(kind, self._upstream.replica), value, ttl_s)

    async def _probe(self) -> None:
        if not self._health.probe or not self._is_due("probe", self._probe_s):
            self._was_away &= self._health.probe
            return
        upstream = self._upstream
        try:
            readiness = await upstream.dialect.probe(upstream.side, self._model)
            detail = "it says that it is not ready" if readiness is Readiness.NOT_READY else f"probe: {readiness}"
            note = notes.ProbeNote(readiness, None, detail)
        except SideChannelError as error:
            note = notes.ProbeNote(None, error.trouble, str(error))
        except NotOffered:
            return
        away = note.trouble == Trouble.REFUSED or note.readiness == Readiness.NOT_READY
        if self._was_away and not away:
            if self._known_before:
                self._known_before = False  # it was there all the time, as far as anybody knows
            else:
                self._return = f"return {secrets.token_hex(4)}"
            self._due.pop("info", None)
            self._due.pop("adapters", None)
        self._was_away = away
        await self._post(notes.PROBE, note, 3 * self._probe_s + self._health.timeout_s)

    async def _ask_load(self) -> None:
        upstream = self._upstream
        if upstream.hosted or not self._is_due(LOAD, self._health.load_interval_s):
            return
        try:
            load = await upstream.dialect.load(upstream.side, upstream.replica.dp_rank)
        except NotOffered as error:
            upstream.signals.lacks(LOAD, str(error))
            self._due[LOAD] = time.monotonic() + NOT_OFFERED_S
            return
        except SideChannelError as error:
            logger.debug("load of %s: %s", upstream.replica.name, error)
            return
        last, self._last_load = self._last_load, load
        self._adapter_slots = load.adapter_slots or self._adapter_slots
        load = replace(load, resident_adapters=None)  # asked for by itself, and may be long
        note = notes.LoadNote(load, prefill_speed(last, load), has_progressed(last, load))
        await self._post(notes.LOAD, note, 5 * self._health.load_interval_s + self._health.timeout_s)

    async def _ask_gpus(self, dcgm: Dcgm) -> None:
        if not self._is_due(GPUS, GPUS_S):
            return
        upstream = self._upstream
        if self._exporter is None:
            self._exporter = SideChannel(origin=dcgm.origin, timeout_s=self._health.timeout_s)
        try:
            page = (await self._exporter.get(dcgm.path)).expect().body
        except SideChannelError as error:
            upstream.signals.lacks(GPUS, str(error))
            return
        found = read_gpus(page, dcgm.gpus, dcgm.labels)
        if found:
            upstream.signals.has(GPUS)
        else:
            upstream.signals.lacks(GPUS, "no GPU on the exporter's page is one of those configured")
        await self._post(notes.GPUS, notes.GpusNote(found), 5 * GPUS_S)

    async def _ask_info(self) -> None:
        if not self._is_due(INFO, INFO_S):
            return
        upstream = self._upstream
        try:
            info = await upstream.dialect.info(upstream.side)
        except (NotOffered, SideChannelError) as error:
            logger.debug("info of %s: %s", upstream.replica.name, error)
            self._due[INFO] = time.monotonic() + self.round_s
            return
        epoch = info.epoch or self._return
        if epoch != self._epoch:
            self._epoch = epoch
            self._asked_for.clear()
            self._last_load = None
            self._due.pop(LOAD, None)
            self._check_model(info)
        info = replace(info, models=info.models[:MANY_MODELS])
        await self._post(notes.INFO, notes.InfoNote(info, epoch), LONGEST_FACT_S)

    def _check_model(self, info: EngineInfo) -> None:
        """Say so when an engine serves other names than it will be asked for: SGLang answers all the same."""
        if self._model is not None and info.models and self._model not in info.models:
            logger.warning(
                "replica %s serves %s, and is asked for %r; set upstream_model if that is another model",
                self._upstream.replica.name,
                ", ".join(map(repr, info.models[:5])),
                self._model,
            )

    async def _ask_adapters(self) -> None:
        upstream = self._upstream
        if upstream.hosted or not self._is_due(ADAPTERS, ADAPTERS_S):
            return
        try:
            adapters = await upstream.dialect.adapters(upstream.side)
            adapters = await self._load_wanted(adapters)
        except NotOffered as error:
            self._due[ADAPTERS] = time.monotonic() + NOT_OFFERED_S
            if not self._wanted:
                return
            upstream.signals.lacks(ADAPTERS, str(error))
            if not upstream.dialect.adapters_by_path:
                return
            adapters = upstream.configured_adapters
        except SideChannelError as error:
            logger.debug("adapters of %s: %s", upstream.replica.name, error)
            return
        adapters = tuple(each for each in adapters if each.name not in upstream.dropping)
        if len(adapters) > MANY_ADAPTERS:
            adapters = tuple(replace(each, path=None) for each in adapters)
        await self._post(notes.ADAPTERS, notes.AdaptersNote(adapters), LONGEST_FACT_S)

    async def _load_wanted(self, adapters: tuple[Adapter, ...]) -> tuple[Adapter, ...]:
        """Have the configured adapters loaded that are not, once in each life of the engine; see `_loads_all`."""
        if not self._loads_all(adapters):
            return adapters
        there = {each.name for each in adapters if each.resident}
        self._asked_for |= there
        missing = [name for name in self._wanted if name not in there and name not in self._asked_for]
        upstream = self._upstream
        for name in missing:
            self._asked_for.add(name)
            try:
                await upstream.dialect.load_adapter(upstream.side, name, self._wanted[name])
                logger.info("replica %s has loaded the adapter %s", upstream.replica.name, name)
            except SideChannelError:
                self._asked_for.discard(name)
                raise
            except AdapterRefused as error:
                logger.warning("replica %s does not load the adapter %s: %s", upstream.replica.name, name, error)
        return await upstream.dialect.adapters(upstream.side) if missing else adapters

    def _loads_all(self, adapters: tuple[Adapter, ...]) -> bool:
        """Whether the engine is to have all configured adapters from its start."""
        if self._adapters_load != "auto":
            return self._adapters_load == "always"
        slots = self._upstream.adapter_slots or self._adapter_slots
        others = sum(each.resident and each.name not in self._wanted for each in adapters)
        return slots is None or len(self._wanted) <= room(slots, others)


def prefill_speed(before: EngineLoad | None, now: EngineLoad) -> float | None:
    """Microseconds per uncached prompt token between two reports; None when nothing was prefilled, or nobody says."""
    if before is None or before.prefill_tokens_total is None or now.prefill_tokens_total is None:
        return None
    if before.prefill_busy_s_total is None or now.prefill_busy_s_total is None:
        return None
    tokens = now.prefill_tokens_total - before.prefill_tokens_total
    busy_s = now.prefill_busy_s_total - before.prefill_busy_s_total
    return busy_s * 1e6 / tokens if tokens > 0 and busy_s > 0 else None


def has_progressed(before: EngineLoad | None, now: EngineLoad) -> bool:
    """Whether the engine's counters of its own work moved between two reports."""
    if before is None:
        return False
    return any(
        earlier is not None and later is not None and later > earlier
        for earlier, later in (
            (before.prefill_tokens_total, now.prefill_tokens_total),
            (before.generated_tokens_total, now.generated_tokens_total),
        )
    )
