"""TensorRT-LLM's `trtllm-serve`, read in its source (1.3 and 1.4 release candidates of 2026); it has not run here.

Files of NVIDIA/TensorRT-LLM: `tensorrt_llm/serve/openai_server.py` (endpoints), `openai_protocol.py` (bodies),
`tensorrt_llm/metrics/collector.py` (Prometheus names), `docs/source/commands/trtllm-serve` (iteration statistics).

Its `GET /metrics` is no Prometheus page but the statistics of every iteration since somebody last asked, which it then
forgets: two readers steal from each other, so one poller must be elected per replica. Where the server was started
with `return_perf_metrics`, `/prometheus/metrics` says the same and forgets nothing, and is preferred.
It refuses body fields that it does not know. A closed connection is noticed within a second, by polling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from backends.dialects.openai import ABSENT, OpenAI, models_in, readiness
from backends.dialects.protocol import (
    Adapter,
    EngineInfo,
    EngineLoad,
    NotOffered,
    Prepared,
    Priority,
    Readiness,
    Untranslatable,
    Wish,
)
from backends.prometheus import read_page, total
from backends.side import Answer, SideChannel, SideChannelError, Trouble
from backends.usage import count_or_none

_PAGE = "/prometheus/metrics"
_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_utilization",
    "kv_cache_max_blocks",
    "kv_cache_used_blocks",
    "kv_cache_tokens_per_block",
    "generation_tokens_total",
)


def priority_of(urgency: int) -> float:
    """An urgency of any size in TensorRT-LLM's range 0 to 1, of which 0.5 is the default and higher goes first.

    0 is 0.5, 1 is 0.75, -1 is 0.25; greater urgencies approach 1 and never change order.
    """
    return 0.5 + urgency / (2 * (1 + abs(urgency)))


def adapter_number(adapter: Adapter) -> int:
    """The positive number under which the engine caches an adapter.

    Made of name and path, so that every worker and every gateway chooses the same, and a new path never meets the
    weights of an old one.
    """
    if adapter.id is not None:
        return adapter.id
    digest = hashlib.blake2b(f"{adapter.name}\n{adapter.path}".encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "big") % (2**31 - 1) + 1


class TrtLlm(OpenAI):
    """A `trtllm-serve` of one model."""

    name = "trtllm"
    priority = Priority.HIGHER_FIRST
    adapters_by_path = True
    reserved = frozenset(
        {
            "agent_hierarchy",
            "conversation_params",
            "disaggregated_params",
            "injected_chat_template_kwargs",
            "lora_request",  # names a path on the engine's disk
            "prompt_token_ids",  # instead of the messages, between the halves of a disaggregated deployment
            "prompt_token_ids_b64",
        }
    )

    def prepare(self, wish: Wish) -> Prepared:
        prepared = super().prepare(wish)
        if wish.adapter is not None:
            prepared.values["lora_request"] = self._lora_request(wish)
        # 0.5 is the engine's own default: not said, unless it has to take the place of the caller's.
        if wish.urgency or (wish.urgency is not None and "priority" in wish.fields):
            prepared.values["priority"] = msgspec.json.encode(priority_of(wish.urgency))
        return prepared

    def model_for(self, wish: Wish) -> str | None:
        return wish.model

    def _lora_request(self, wish: Wish) -> bytes:
        """The engine lists no adapters and loads one from the path that the first request for it names."""
        for adapter in wish.adapters:
            if adapter.name == wish.adapter and adapter.path:
                return msgspec.json.encode(
                    {"lora_name": adapter.name, "lora_int_id": adapter_number(adapter), "lora_path": adapter.path}
                )
        raise Untranslatable(f"The path of LoRA adapter {wish.adapter!r} on the engine's disk is not known.", "model")

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """`GET /health`, which asks the executor only; 503 when it is dead. Never `/health_generate`."""
        return readiness(await side.get("/health"))

    async def info(self, side: SideChannel) -> EngineInfo:
        """No epoch: nothing that it tells changes with a restart. `/server_info` holds nothing of use here."""
        models = await side.get("/v1/models")
        names = () if models.status in ABSENT else tuple(m["id"] for m in models_in(models.expect().json_object()))
        answer = await side.get("/version")
        version = None if answer.status in ABSENT else answer.expect().json_object().get("version")
        page = await side.get(_PAGE)
        found = {} if page.status in ABSENT else _read(page)
        blocks, block_size = _whole(found, "kv_cache_max_blocks"), _whole(found, "kv_cache_tokens_per_block")
        return EngineInfo(
            version=version if isinstance(version, str) else None,
            models=names,
            kv_capacity_tokens=_product(blocks, block_size),
            block_size=block_size,
        )

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        """What its last iteration saw. Everything is None where it made none since it was last asked.

        The server waits up to two seconds for an iteration before it answers that there was none: it was idle, or in
        a long one. That is no reason to forget the last report, and none to believe in the request that an idle
        engine's last iteration may still have counted: the gateway's own count decides.
        """
        if dp_rank is not None:
            raise NotOffered("trtllm-serve does not report its data-parallel ranks one by one")
        page = await side.get(_PAGE)
        if page.status not in ABSENT:
            load = load_from_page(page)
            if load.running is not None:
                return load
        answer = await side.get("/metrics")
        if answer.status in ABSENT:
            raise NotOffered("start trtllm-serve with enable_iter_perf_stats to have its load reported")
        return load_from_iterations(answer.expect())

    async def adapters(self, side: SideChannel) -> tuple[Adapter, ...]:
        raise NotOffered("trtllm-serve does not list adapters; they are the ones that the configuration names")

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        raise NotOffered("trtllm-serve loads an adapter with the first request for it, not before")

    async def unload_adapter(self, side: SideChannel, name: str) -> None:
        raise NotOffered("trtllm-serve drops adapters by itself, the longest unused first")


def load_from_iterations(answer: Answer) -> EngineLoad:
    """Read a `/metrics` answer, of which the newest entry counts. Raises `SideChannelError`.

    Blocks that are kept for reuse are not among the used ones.
    """
    entries = answer.json()
    if not isinstance(entries, list):
        raise SideChannelError(Trouble.BROKEN, f"{answer.url} did not answer with a JSON list")
    newest = next((entry for entry in reversed(entries) if isinstance(entry, dict)), None)
    if newest is None:
        return EngineLoad()
    stats = newest.get("kvCacheStats")
    kv: Mapping[str, Any] = stats if isinstance(stats, dict) else {}
    most, used = count_or_none(kv.get("maxNumBlocks")), count_or_none(kv.get("usedNumBlocks"))
    if used is None and most is not None:
        free = count_or_none(kv.get("freeNumBlocks"))
        used = most - free if free is not None and free <= most else None
    block_size = count_or_none(kv.get("tokensPerBlock"))
    return EngineLoad(
        running=count_or_none(newest.get("numActiveRequests")),
        max_running=_smallest(newest, "maxBatchSizeRuntime", "maxNumActiveRequests"),
        waiting=count_or_none(newest.get("numQueuedRequests")),
        kv_use=min(1.0, used / most) if used is not None and most else None,
        kv_used_tokens=_product(used, block_size),
        kv_capacity_tokens=_product(most, block_size),
    )


def load_from_page(answer: Answer) -> EngineLoad:
    """Read a `/prometheus/metrics` answer. Raises `SideChannelError`. Older versions say little of this."""
    found = _read(answer)
    use = found.get("kv_cache_utilization")
    block_size = _whole(found, "kv_cache_tokens_per_block")
    return EngineLoad(
        running=_whole(found, "num_requests_running"),
        waiting=_whole(found, "num_requests_waiting"),
        kv_use=min(1.0, use) if use is not None and use >= 0 else None,
        kv_used_tokens=_product(_whole(found, "kv_cache_used_blocks"), block_size),
        kv_capacity_tokens=_product(_whole(found, "kv_cache_max_blocks"), block_size),
        generated_tokens_total=_whole(found, "generation_tokens_total"),
    )


def _read(answer: Answer) -> dict[str, float]:
    """The values on a page, one label set each. Raises `SideChannelError`."""
    read = read_page(answer.expect().body, _NAMES, ("trtllm_",))
    values = {name: total(samples) for name, samples in read.items()}
    return {name: value for name, value in values.items() if value is not None}


def _whole(found: Mapping[str, float], name: str) -> int | None:
    value = found.get(name)
    return int(value) if value is not None and value >= 0 else None


def _smallest(stats: Mapping[str, Any], *names: str) -> int | None:
    """The smallest count above 0: some of them are 0 where the executor has no such bound."""
    return min(filter(None, (count_or_none(stats.get(name)) for name in names)), default=None)


def _product(blocks: int | None, block_size: int | None) -> int | None:
    return blocks * block_size if blocks is not None and block_size else None
