"""Gives a replica that is new, or has begun anew, what it will be asked for: adapters first, then prompt beginnings.

One worker does it for each replica, the one that looks after it (`gateway.watch.patrol`), with what it has seen itself.
The requests are those of clients with one token to answer, put into the engine's words as any other, on the connections
for questions aside. They pass no gate and leave no usage record: nobody is billed for them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import orjson
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily

from backends.dialects.protocol import NotOffered, Untranslatable, Wish
from backends.side import SideChannelError
from gateway.body import Body, parse
from gateway.bounds import BOUNDING_FIELDS, bounding
from gateway.errors import GatewayError
from gateway.warmup.hot_prompts import HotPrompts, Kept
from routing.hot import Hot

if TYPE_CHECKING:
    from backends.upstream import Upstream
    from gateway.fleet import ModelRoute, Pool
    from gateway.runtime import Runtime

logger = logging.getLogger(__name__)

ONE_PROMPT_A_SLOT = frozenset({"llamacpp"})
"""Engines whose cache is that of their slots, each with the last prompt that it ran: more would push out the first."""
FAILURES = 2
"""In a row; then the replica is left alone: its first clients will find out what is wrong with it."""
LEFT_OUT = frozenset(
    {"stream", "stream_options", "n", "best_of", "min_tokens", "echo", "logprobs", "top_logprobs", "prompt_logprobs"}
)
"""Fields that say how to answer, not what was asked, and do not go with an answer of one token."""


class Warmer:
    """One worker's."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.requests: Counter[tuple[str, str]] = Counter()
        """By pool and outcome: `answered`; `refused` with an error; `failed`: no answer, or none in time."""

    async def warm(self, upstream: Upstream, within_s: float) -> None:
        """Send it all, one after the other, or as much as the time allows. Problems are logged, never raised."""
        replica = upstream.replica
        pool = self._runtime.fleet.pools.get(replica.pool)
        if pool is None or upstream.hosted or replica not in pool.upstreams:
            return
        begun = time.monotonic()
        end = begun + within_s
        adapters = await self._load_adapters(pool, upstream, end)
        read = await self._read_prompts(pool, upstream, end)
        took_s = time.monotonic() - begun
        logger.info(
            "replica %s is warm: %d prompts read and %d adapters loaded in %.1f s", replica.name, read, adapters, took_s
        )

    def _routes(self, pool: Pool) -> Iterator[tuple[ModelRoute, HotPrompts]]:
        """The models that the pool serves, each once, that know what is much used."""
        seen: set[str] = set()
        for route in self._runtime.fleet.models.values():
            if route.pool is pool and route.hot is not None and route.model not in seen:
                seen.add(route.model)
                yield route, route.hot

    async def _load_adapters(self, pool: Pool, upstream: Upstream, end: float) -> int:
        """The most used ones that it may be told to load."""
        replica, loaded = upstream.replica, 0
        uses: dict[str, float] = {}
        now = time.monotonic()
        for _, hot in self._routes(pool):
            for name, count in hot.adapters(now).items():
                uses[name] = uses.get(name, 0.0) + count
        wanted = [name for name in sorted(uses, key=lambda name: -uses[name]) if name in replica.loadable]
        most = pool.settings.warm_up.adapters
        if replica.adapter_slots is not None:
            most = min(most, replica.adapter_slots)
        for name in wanted[:most]:
            left_s = end - time.monotonic()
            if left_s <= 0:
                break
            if name in (replica.adapters or ()):
                continue
            try:
                await self._runtime.adapters.ensure(upstream, name, left_s)
                loaded += 1
            except (GatewayError, SideChannelError, NotOffered) as error:
                logger.info("replica %s is warmed without the adapter %s: %s", replica.name, name, error)
        return loaded

    async def _read_prompts(self, pool: Pool, upstream: Upstream, end: float) -> int:
        read = failures = 0
        for route, hot in self._hottest(pool, upstream):
            left_s = end - time.monotonic()
            if left_s <= 0 or failures >= FAILURES:
                break
            outcome = await self._read(route, hot.sample.request, upstream, left_s)
            if not outcome:
                continue
            self.requests[pool.name, outcome] += 1
            failures = failures + 1 if outcome == "failed" else 0
            if outcome == "answered":
                read += 1
                pool.routing.warmed(hot.sample.request.prefix, upstream.replica)
        return read

    def _hottest(self, pool: Pool, upstream: Upstream) -> list[tuple[ModelRoute, Hot[Kept]]]:
        """What it is to read, of all models of its pool together; the hottest first."""
        most = pool.settings.warm_up.prefixes
        slots = upstream.replica.meter.capacity.requests
        if upstream.dialect.name in ONE_PROMPT_A_SLOT and slots is not None:
            most = min(most, slots)
        now, region = time.monotonic(), upstream.replica.region
        found = [
            (route, hot)
            for route, prompts in self._routes(pool)
            for hot in prompts.hottest(most, region, now)
            if hot.sample.request.adapter in (None, *(upstream.replica.adapters or ()))
        ]
        found.sort(key=lambda each: -each[1].uses)
        return found[:most]

    async def _read(self, route: ModelRoute, kept: Kept, upstream: Upstream, left_s: float) -> str:
        """Have it read one prompt; what came of it, empty where it is of no use to this engine."""
        try:
            asked = self._asked(route, kept, upstream)
        except (GatewayError, Untranslatable) as error:
            logger.debug("not for warming %s: %s", upstream.replica.name, type(error).__name__)
            return ""
        if asked is None:
            return ""
        path, body = asked
        try:
            answer = await upstream.side.post(path, orjson.loads(body), timeout_s=left_s)
        except SideChannelError as error:
            logger.debug("warming %s: %s", upstream.replica.name, error)
            return "failed"
        return "answered" if answer.ok else "refused"

    def _asked(self, route: ModelRoute, kept: Kept, upstream: Upstream) -> tuple[str, bytes] | None:
        """Path and body, in the engine's words; None where it would keep nothing of it."""
        runtime, dialect = self._runtime, upstream.dialect
        body = short(kept.path, kept.body, dialect.name)
        model = upstream.model or route.upstream_model
        if model is None and kept.adapter is not None:
            model = route.name
        prepared = dialect.prepare(
            Wish(
                path=kept.path,
                fields=body.fields,
                request_id=runtime.new_request_id(),
                stream=False,
                model=model,
                adapter=kept.adapter,
                priority=None if upstream.info is None else upstream.info.priority,
                adapters=upstream.adapters or upstream.configured_adapters,
                dp_rank=upstream.replica.dp_rank,
                cache_salt=runtime.gate.cache_salt(kept.tenant, body.fields) if route.reader.isolates else None,
            )
        )
        values = prepared.values
        if values.get("cache_prompt") == b"false":
            return None
        for name in upstream.signals.refused_fields:
            values.pop(name, None)
        return prepared.path, body.with_values(values) if prepared.body is None else prepared.body


def warm_up_families(counts: Mapping[tuple[str, str], int]) -> Iterator[Metric]:
    """How often replicas were sent a prompt to be warmed by."""
    requests = CounterMetricFamily(
        "tidegate_warm_up_requests", "Prompts sent to replicas that were new.", labels=["pool", "outcome"]
    )
    for (pool, outcome), count in list(counts.items()):
        requests.add_metric([pool, outcome], count)
    yield requests


def short(path: str, raw: bytes, engine: str) -> Body:
    """The same prompt with one token to answer, and no stream."""
    fields: dict[str, Any] = {
        name: value for name, value in orjson.loads(raw).items() if name not in LEFT_OUT and name not in BOUNDING_FIELDS
    }
    return parse(orjson.dumps({**fields, "stream": False, **bounding(path, fields, 1, engine)}))
