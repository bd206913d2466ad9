"""LMDeploy's `api_server` (default port 23333), read in the wheel of 0.18.0; it has not run here.

Files: `lmdeploy/serve/openai/endpoints/*.py`, `lmdeploy/serve/core/health.py`, `lmdeploy/metrics/loggers.py`.

It answers 404 for a model it does not have, and takes an adapter's name for a model's. Cached tokens are in the usage
of chat completions (added in June 2026), not in that of text completions.

`POST /abort_request {"session_id": …}` is left alone. The id could be ours, a number in the body's `session_id`, but
the endpoint is off by default (501), an id that is still remembered from a failed attempt makes the next one fail with
500, and requests for several choices are refused with one. A closed connection stops both streams and whole answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from backends.dialects.openai import ABSENT, OpenAI, models_in, readiness
from backends.dialects.protocol import Adapter, EngineInfo, EngineLoad, NotOffered, Readiness, Wish
from backends.prometheus import Sample, read_page, total
from backends.side import Answer, SideChannel

_RUNNING, _WAITING, _UNROUTED = "num_requests_running", "num_requests_waiting", "num_api_requests_waiting"
_KV_USE, _GENERATED = "gpu_cache_usage_perc", "generation_tokens_total"
_STARTED = "process_start_time_seconds"
_METRICS_OFF = "start LMDeploy's api_server without --disable-metrics to have its load reported"


class LmDeploy(OpenAI):
    """An `api_server` of one model, with either of LMDeploy's engines."""

    name = "lmdeploy"
    reserved = frozenset({"session_id", "migration_request", "with_cache", "preserve_cache"})
    """A session's number is the handle by which requests are aborted; the others move caches between machines."""

    def model_for(self, wish: Wish) -> str | None:
        return wish.model if wish.adapter is None else wish.adapter

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """`GET /health`: 200 also for an engine that was put to sleep and refuses all work, which its body says."""
        answer = await side.get("/health")
        return Readiness.NOT_READY if _is_asleep(answer) else readiness(answer)

    async def info(self, side: SideChannel) -> EngineInfo:
        """It tells neither version nor sizes. The epoch is the start of its process, where metrics are on."""
        names = await self._names(side)
        page = await side.get("/metrics")
        if page.status in ABSENT:
            return EngineInfo(models=tuple(names[:1]), lacks=(("load", _METRICS_OFF),))
        started = total(read_page(page.expect().body, (_STARTED,)).get(_STARTED, ()))
        return EngineInfo(models=tuple(names[:1]), epoch=None if started is None else repr(started))

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        """From its metrics, which it brings up to date every ten seconds only."""
        page = await side.get("/metrics")
        if page.status in ABSENT:
            raise NotOffered(_METRICS_OFF)
        return load_from_page(page.expect().body, dp_rank)

    async def adapters(self, side: SideChannel) -> tuple[Adapter, ...]:
        """Those of its start, listed behind the base model's name."""
        return tuple(Adapter(name) for name in (await self._names(side))[1:])

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        raise NotOffered("LMDeploy loads adapters only at its start: name it with --adapters and start it again")

    async def unload_adapter(self, side: SideChannel, name: str) -> None:
        raise NotOffered("LMDeploy keeps the adapters of its start: start it again without --adapters")

    async def _names(self, side: SideChannel) -> list[str]:
        answer = await side.get("/v1/models")
        if answer.status in ABSENT:
            return []
        return [model["id"] for model in models_in(answer.expect().json_object())]


def load_from_page(page: bytes, dp_rank: int | None) -> EngineLoad:
    """Read a metrics page; of one data-parallel rank, or of all together (use of the cache: their mean).

    Waiting are those in the engine's queue and those before it, which have no request handle yet. Tokens of prompts
    are counted with the cached ones, so they are left out.
    """
    names = (_RUNNING, _WAITING, _UNROUTED, _KV_USE, _GENERATED)
    found = {name: _of_rank(samples, dp_rank) for name, samples in read_page(page, names, ("lmdeploy:",)).items()}
    queued, unrouted = _whole(found, _WAITING), _whole(found, _UNROUTED)
    uses = found.get(_KV_USE, ())
    use = total(uses)
    return EngineLoad(
        running=_whole(found, _RUNNING),
        waiting=queued if unrouted is None else unrouted + (queued or 0),
        kv_use=min(1.0, use / len(uses)) if use is not None and use >= 0 else None,
        generated_tokens_total=_whole(found, _GENERATED),
    )


def _of_rank(samples: Sequence[Sample], dp_rank: int | None) -> Sequence[Sample]:
    if dp_rank is None:
        return samples
    return [sample for sample in samples if sample[0].get("engine") == str(dp_rank)]


def _whole(found: Mapping[str, Sequence[Sample]], name: str) -> int | None:
    value = total(found.get(name, ()))
    return int(value) if value is not None and value >= 0 else None


def _is_asleep(answer: Answer) -> bool:
    if not answer.ok:
        return False
    try:
        tree = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return False  # versions before the health monitor answer with nothing
    return isinstance(tree, dict) and tree.get("status") == "sleeping"
