"""Costs over time, kept in the process that answers operators: collected from the workers, and told by window."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gateway.accounts.cost_store import CostStore, Span, span
from gateway.accounts.counts import FIELDS, Counted, Key, as_amounts
from gateway.sources import Source, ask_all

logger = logging.getLogger(__name__)

COLLECT_EVERY_S = 30.0
"""What a worker that is killed has used since the last time is missing here; it is on record all the same."""
FRESH_S = 1.0
"""Somebody who asks gets what workers counted no longer ago than this."""
FILE = "costs.sqlite3"
CHART_NAMES = 8
"""Told apart in a chart; the rest together."""

Amounts = list[int]
_NONE = (0,) * len(FIELDS)


class Costs:
    """One gateway's. `start` collects from time to time, `aclose` once more."""

    def __init__(
        self, sources: Sequence[Source], state_dir: Path | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._sources = sources
        self._path = None if state_dir is None else state_dir / FILE
        self._clock = clock
        self._store: CostStore | None = None
        self._lock = asyncio.Lock()
        self._seen: dict[int, tuple[str, int, dict[Key, Amounts]]] = {}
        """By worker: its life, what to ask with, and what it had counted."""
        self._collected_at = -1e9
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to collect."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="costs")

    async def aclose(self) -> None:
        """Collect what workers that still answer have counted, and close the file."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            with suppress(Exception):
                await self.collect(0.0)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
            self._store = None

    async def _run(self) -> None:
        while True:
            try:
                await self.collect()
            except Exception:  # the next turn may find the disk writable again: nothing was taken over
                logger.exception("costs could not be collected; they will be later")
            await asyncio.sleep(COLLECT_EVERY_S)

    async def collect(self, fresh_s: float = FRESH_S) -> CostStore:
        """Take over what was counted since the last time, unless that is no longer ago than `fresh_s`."""
        async with self._lock:
            if self._store is None:
                self._store = await asyncio.to_thread(CostStore, self._path)
            if time.monotonic() - self._collected_at < fresh_s:
                return self._store
            answers = await ask_all(self._sources, self._ask)
            deltas: dict[Key, Amounts] = {}
            seen = dict(self._seen)
            for index, counted in answers:
                if counted is not None:
                    seen[index] = _taken(seen.get(index), counted, deltas)
            if deltas:
                await asyncio.to_thread(self._store.add, deltas, self._clock())
            self._seen = seen
            self._collected_at = time.monotonic()
            return self._store

    async def _ask(self, source: Source) -> Counted:
        life, turn, _ = self._seen.get(source.index, ("", 0, {}))
        return await source.costs(life, turn)

    async def report(
        self, by: str, window: str, only: Mapping[str, str], most: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What `GET /admin/cost` answers but for its rows, and the rows."""
        store = await self.collect()
        return await asyncio.to_thread(_report, store, by, window, dict(only), most, self._clock())


def _taken(
    before: tuple[str, int, dict[Key, Amounts]] | None, counted: Counted, deltas: dict[Key, Amounts]
) -> tuple[str, int, dict[Key, Amounts]]:
    """Add to `deltas` what a worker has counted since it was asked before; what to remember of it."""
    rows = {} if before is None or before[0] != counted.life else dict(before[2])
    for row in counted.rows:
        key = (row.tenant, row.model, row.pool, row.rented)
        grown = [now - then for now, then in zip(row.amounts, rows.get(key, _NONE), strict=True)]
        rows[key] = list(row.amounts)
        if any(grown):
            sums = deltas.get(key, _NONE)
            deltas[key] = [a + b for a, b in zip(sums, grown, strict=True)]
    return counted.life, counted.turn, rows


# -- in a thread


def _report(
    store: CostStore, by: str, window: str, only: dict[str, str], most: int, now_unix_s: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    asked = span(window, now_unix_s)
    found, count = store.totals(by, asked, only, most)
    by_name: dict[str, dict[bool, Amounts]] = {}
    for name, rented, amounts in found:
        by_name.setdefault(name, {})[rented] = amounts
    rows = [{"name": name, **both(parts)} for name, parts in by_name.items()]
    steps = store.steps(asked, only)
    sums: dict[bool, Amounts] = {}
    for _, rented, amounts in steps:
        sums[rented] = [a + b for a, b in zip(sums.get(rented, _NONE), amounts, strict=True)]
    answer = {
        "by": by,
        "window": window,
        "step_s": asked.step_s,
        "from_unix_s": asked.first,
        "to_unix_s": round(now_unix_s, 3),
        "known_since_unix_s": store.begins_unix_s(),
        "totals": both(sums),
        "names": count,
        "series": _series(store, by, list(by_name)[:CHART_NAMES], asked, only, steps),
    }
    return answer, rows


def both(parts: Mapping[bool, Sequence[int]]) -> dict[str, Any]:
    """Own and rented (True) amounts as they are shown, and their sum."""
    own, rented = list(parts.get(False, _NONE)), list(parts.get(True, _NONE))
    total = [a + b for a, b in zip(own, rented, strict=True)]
    return {**shown(total), "own": shown(own), "rented": shown(rented)}


def shown(amounts: Sequence[int]) -> dict[str, Any]:
    """Amounts with tokens by kind and dollars. `tokens_per_usd` is None where nothing had a price."""
    named = as_amounts(list(amounts))
    tokens = named["prompt"] + named["completion"]
    micros = named["micros"]
    priced = tokens - named["unpriced"]
    return {
        "requests": named["requests"],
        "estimated": named["estimated"],
        "tokens": tokens,
        "prompt_tokens": named["prompt"],
        "cached_tokens": named["cached"],
        "cache_write_tokens": named["cache_write"],
        "completion_tokens": named["completion"],
        "unpriced_tokens": named["unpriced"],
        "usd": micros / 1e6,
        "tokens_per_usd": round(priced * 1e6 / micros, 1) if micros else None,
        "spilled_requests": named["spilled"],
        "spilled_usd": named["spilled_micros"] / 1e6,
    }


def _series(
    store: CostStore,
    by: str,
    names: list[str],
    asked: Span,
    only: dict[str, str],
    steps: list[tuple[int, bool, Amounts]],
) -> dict[str, Any]:
    """What charts show: dollars own and rented, tokens by kind, and both by the names that cost most."""
    times = asked.times
    place = {at: position for position, at in enumerate(times)}
    zeros = [0] * len(times)
    money = {False: list(zeros), True: list(zeros)}
    kinds = {name: list(zeros) for name in ("prompt_uncached", "cached", "completion")}
    all_micros, all_tokens = list(zeros), list(zeros)
    for at, rented, amounts in steps:
        position, named = place[at], as_amounts(amounts)
        money[rented][position] += named["micros"]
        kinds["prompt_uncached"][position] += named["prompt"] - named["cached"]
        kinds["cached"][position] += named["cached"]
        kinds["completion"][position] += named["completion"]
        all_micros[position] += named["micros"]
        all_tokens[position] += named["prompt"] + named["completion"]
    micros_of = {name: list(zeros) for name in names}
    tokens_of = {name: list(zeros) for name in names}
    for at, name, micros, tokens in store.steps_of(by, names, asked, only):
        micros_of[name][place[at]] = micros
        tokens_of[name][place[at]] = tokens
        all_micros[place[at]] -= micros
        all_tokens[place[at]] -= tokens
    return {
        "times": times,
        "own_usd": _usd(money[False]),
        "rented_usd": _usd(money[True]),
        "tokens": kinds,
        "names": names,
        "usd_of": [_usd(micros_of[name]) for name in names],
        "tokens_of": [tokens_of[name] for name in names],
        "rest_usd": _usd(all_micros),
        "rest_tokens": all_tokens,
    }


def _usd(micros: Sequence[int]) -> list[float]:
    return [each / 1e6 for each in micros]
