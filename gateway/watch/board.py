"""Takes in what the workers tell each other, and changes this worker's replicas accordingly."""

from __future__ import annotations

import logging
import time
from typing import TypeVar

import msgspec

from backends.dialects.protocol import EngineLoad, Readiness
from backends.side import Trouble
from backends.signals import ADAPTERS as ADAPTERS_SIGNAL
from backends.signals import LOAD as LOAD_SIGNAL
from backends.upstream import Upstream
from gateway.fleet import Pool
from gateway.notices import KINDS
from gateway.runtime import Runtime
from gateway.store.protocol import Fact
from gateway.watch import notes
from routing.health import Change
from routing.load import Load
from routing.observing import heed_ejection
from routing.router import PoolState
from routing.types import Replica
from routing.work import NOTHING, Totals

logger = logging.getLogger(__name__)

FOREIGN = "foreign"
"""The peer that stands for clients which do not come through these gateways; no worker is called that."""
LEAST_FOREIGN = 2
"""Requests beyond our own count that are taken for somebody's: one is within the error of counting at two places."""

T = TypeVar("T")


class Board:
    """One worker's reading of the shared facts."""

    def __init__(self, runtime: Runtime, holder: str) -> None:
        self._runtime = runtime
        self._holder = holder
        """This worker's name, whose own ejections are known already."""

    def reset(self) -> None:
        """Forget what only facts can hold in place."""
        self._runtime.notices.reset()
        for upstream in self._runtime.fleet.upstreams():
            upstream.replica.draining = False
            upstream.replica.health.cordon(False)

    def apply(self, fact: Fact, *, old: bool = False) -> None:
        """Take one fact in; an old one was posted before this reading began.

        What cannot be read, or is about a replica that is not here, is passed over.
        """
        kind, pool_name, identity, observer = (*fact.key.split("/", 3), "", "", "")[:4]
        if kind in KINDS:
            self._runtime.notices.apply(kind, fact.key, fact.value)
            return
        pool = self._runtime.fleet.pools.get(pool_name)
        if pool is None or (kind == notes.PROBE and not pool.settings.health.probe):
            return
        replica = pool.by_identity.get(identity)
        if replica is not None:
            self._apply(kind, observer, replica, pool, fact.value, old)

    def _apply(
        self,
        kind: str,
        observer: str,
        replica: Replica,
        pool: Pool,
        value: bytes | None,
        old: bool,
    ) -> None:
        now = time.monotonic()
        upstream = pool.upstreams[replica]
        if kind == notes.DRAIN:
            self._drain(replica, value is not None)
        elif kind == notes.CORDON:
            _cordon(replica, value is not None)
        elif value is None:
            if kind == notes.LOAD:
                replica.load = None
                replica.work.peer(FOREIGN, None, now)
            elif kind == notes.LOADING:
                replica.loading = frozenset()
            elif kind == notes.GPUS:
                upstream.gpus = ()
        elif kind == notes.PROBE:
            self._probe(replica, upstream, _read(value, notes.ProbeNote), old, now)
        elif kind == notes.LOAD:
            _load(replica, upstream, pool.routing, _read(value, notes.LoadNote), now)
        elif kind == notes.INFO:
            _info(replica, upstream, pool, _read(value, notes.InfoNote), now)
        elif kind == notes.WARMED:
            _warmed(replica, _read(value, notes.WarmedNote), now)
        elif kind == notes.ADAPTERS:
            _adapters(upstream, _read(value, notes.AdaptersNote))
        elif kind == notes.GPUS:
            gpus = _read(value, notes.GpusNote)
            upstream.gpus = () if gpus is None else gpus.gpus
        elif kind == notes.LOADING:
            loading = _read(value, notes.LoadingNote)
            replica.loading = frozenset() if loading is None else frozenset(loading.adapters)
        elif kind == notes.EJECTED and observer != self._holder:
            note = _read(value, notes.EjectionNote)
            if note is not None:
                change = heed_ejection(replica, pool.replicas, observer, now + note.until_unix_s - time.time(), now)
                if change is not None:
                    # Not told further: others would take one observation for two.
                    self._runtime.witness.changed(replica, change, "other workers have ejected it", told=True)
        elif kind == notes.RECOVERED and observer != self._holder and not old:
            replica.health.hint_recovered(now)

    def _probe(self, replica: Replica, upstream: Upstream, note: notes.ProbeNote | None, old: bool, now: float) -> None:
        if note is None or (old and note.trouble not in (None, Trouble.REFUSED)):
            return  # an unanswered probe is counted once, not at every new reading
        was_reachable = replica.health.unavailable_reason(now) != "cooling_down"
        if note.readiness == Readiness.UNAUTHORIZED:
            credential = replica.credential
            # A key may be good for requests and not for reading models or an account. Of several, another worker may
            # have asked with another one than this worker would: requests will find out which are good.
            alone = credential.keys[0] if credential is not None and len(credential.keys) == 1 else None
            if credential and alone and not alone.proven and credential.refused(now, 403):
                logger.warning("pool %s: %s refuses the key: %s", replica.pool, replica.name, note.detail)
        elif note.readiness is not None:
            ready = note.readiness == Readiness.READY
            before = replica.health.unavailable_reason(now)
            replica.health.probed(ready, now)
            after = replica.health.unavailable_reason(now)
            if before != after and not ready:
                logger.warning("replica %s takes no new work: %s", replica.name, note.detail)
            elif before != after and after is None:
                logger.info("replica %s is ready again", replica.name)
        else:
            refused = note.trouble == Trouble.REFUSED
            replica.health.probe_failed(refused, now)
            if refused and was_reachable:
                self._runtime.witness.changed(replica, Change.UNREACHABLE, note.detail)
        stranded = note.trouble == Trouble.REFUSED and upstream.dialect.strands_requests
        if stranded or (not upstream.hosted and replica.health.silent(now)):
            self._runtime.abandon(replica)

    def _drain(self, replica: Replica, draining: bool) -> None:
        if replica.draining != draining:
            replica.draining = draining
            text = "is drained: no new work" if draining else "takes work again"
            logger.info("replica %s %s", replica.name, text)


def _load(replica: Replica, upstream: Upstream, routing: PoolState, note: notes.LoadNote | None, now: float) -> None:
    if note is None:
        return
    load = note.load
    previous = replica.load
    replica.load = Load(
        observed_at=now,
        running=load.running,
        max_running=load.max_running,
        waiting=load.waiting,
        waiting_uncached_tokens=load.waiting_uncached_tokens,
        kv_use=load.kv_use,
        kv_used_tokens=load.kv_used_tokens,
        kv_capacity_tokens=load.kv_capacity_tokens,
        # A report without new prefill says nothing about its speed; the last known one still holds.
        prefill_us_per_token=note.prefill_us_per_token
        if note.prefill_us_per_token is not None or previous is None
        else previous.prefill_us_per_token,
        adapter_slots=load.adapter_slots,
        adapter_slots_used=load.adapter_slots_used,
    )
    if upstream.adapter_slots is None and load.adapter_slots is not None:
        replica.adapter_slots = load.adapter_slots
    _note_foreign(replica, load, previous, now)
    replica.meter.observe(load.running, load.waiting)
    _state_capacity(replica, upstream, routing)
    upstream.signals.has(LOAD_SIGNAL)
    upstream.counts_work = load.prefill_tokens_total is not None or load.generated_tokens_total is not None
    upstream.check_progress(note.progressed, now)


def _note_foreign(replica: Replica, load: EngineLoad, previous: Load | None, now: float) -> None:
    """Count what others than these gateways have the engine do, as if it were a peer's.

    What is beyond our own count in two reports in a row: what has just been sent or has just ended is counted by one
    side and not yet by the other.
    """
    work = replica.work
    foreign = dict(work.peers).get(FOREIGN, NOTHING)
    if load.running is None:  # it no longer says
        work.peer(FOREIGN, None, now)
        return
    if previous is None or previous.running is None:
        return
    ours = work.running + work.queued - foreign.running - foreign.queued
    both = [(load.running, load.waiting or 0), (previous.running, previous.waiting or 0)]
    extra = min(running + waiting for running, waiting in both) - ours
    if extra < LEAST_FOREIGN:
        if foreign != NOTHING:
            work.peer(FOREIGN, None, now)
        return
    waiting = min(extra, min(waiting for _, waiting in both))
    tokens = 0
    if load.waiting_uncached_tokens is not None and waiting:
        tokens = max(0, load.waiting_uncached_tokens - (work.queued_tokens - foreign.queued_tokens))
    held = 0
    if load.kv_used_tokens is not None:
        held = max(0, load.kv_used_tokens - (work.running_tokens - foreign.running_tokens))
    work.peer(FOREIGN, Totals(waiting, tokens, extra - waiting, held), now)


def _cordon(replica: Replica, cordoned: bool) -> None:
    if replica.cordoned != cordoned:
        replica.health.cordon(cordoned)
        text = "is cordoned: no new prompts" if cordoned else "takes new prompts again"
        logger.info("replica %s %s", replica.name, text)


def _warmed(replica: Replica, note: notes.WarmedNote | None, now: float) -> None:
    """What was posted in an earlier life of the engine says nothing of this one."""
    if note is not None and (not note.epoch or replica.epoch in (None, note.epoch)):
        replica.health.warmed(now)


def _info(replica: Replica, upstream: Upstream, pool: Pool, note: notes.InfoNote | None, now: float) -> None:
    if note is None:
        return
    routing = pool.routing
    anew = replica.epoch is not None and replica.epoch != note.epoch
    if anew:
        logger.info("replica %s has begun anew: its cache is empty", replica.name)
        upstream.begin_anew()
        replica.load = None  # of the life before
        replica.work.peer(FOREIGN, None, now)
        replica.meter.begin_anew()
    replica.epoch = note.epoch
    if anew:
        routing.begin_anew(replica)
        if not upstream.hosted:
            replica.health.begin_anew(now, pool.settings.warm_up.hold_s)
    upstream.info = note.info
    replica.context_tokens = note.info.context_tokens
    _state_capacity(replica, upstream, routing)
    for signal, reason in note.info.lacks:
        upstream.signals.lacks(signal, reason)


def _state_capacity(replica: Replica, upstream: Upstream, routing: PoolState) -> None:
    """Pass on what the engine says of its size: in its last report, which is about this rank, else of itself."""
    load, info = replica.load, upstream.info
    requests = None if load is None else load.max_running
    tokens = None if load is None else load.kv_capacity_tokens
    if info is not None:
        # An engine speaks of all its ranks together, and they are alike.
        part = info.dp_size if replica.dp_rank is not None else 1
        requests = _per_rank(info.max_running, part) if requests is None else requests
        tokens = _per_rank(info.kv_capacity_tokens, part) if tokens is None else tokens
    before = replica.meter.capacity.tokens
    replica.meter.state(requests, tokens)
    if replica.meter.capacity.tokens != before:
        routing.resize(replica)


def _per_rank(count: int | None, ranks: int) -> int | None:
    return None if count is None else max(1, count // max(1, ranks))


def _adapters(upstream: Upstream, note: notes.AdaptersNote | None) -> None:
    if note is None:
        return
    upstream.holds(note.adapters)
    upstream.signals.has(ADAPTERS_SIGNAL)


def _read(value: bytes, kind: type[T]) -> T | None:
    """The note, or None when it is not one: another version of Tidegate may have written it."""
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.DecodeError as error:
        logger.debug("a note of another form: %s", error)
        return None
