"""vLLM, spoken natively: its load is read from `/metrics`, an adapter is addressed by its own name as `model`.

Stops generating within half a second of a closed connection. `/abort_requests` exists only in development mode
(`VLLM_SERVER_DEV_MODE`, 0.32.0), so requests are not aborted by id. A data-parallel rank is chosen by a header
(`X-data-parallel-rank`) and by no body field, so `Wish.dp_rank` has no effect here. `GET /load` answers 0 whatever
happens unless tracking is switched on, and counts the requests of one HTTP process only: it is not asked.

Whether a `priority` is obeyed cannot be asked. Without `--scheduling-policy priority` 0.32.0 ignores it, although the
description of the field promises an error; older versions answer 400 to any but 0, and the field is left out from then
on. How many requests it runs at once (`--max-num-seqs`) only the development mode tells: that shows in its load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from backends.dialects.openai import ABSENT, OpenAI, continuous_usage, going_on, models_in, readiness
from backends.dialects.protocol import (
    Adapter,
    AdapterRefused,
    EngineInfo,
    EngineLoad,
    KvEventsEndpoint,
    NotOffered,
    Prepared,
    Priority,
    Readiness,
    Wish,
)
from backends.prometheus import Sample, read_page, total
from backends.side import Answer, SideChannel, SideChannelError
from backends.usage import count_or_none

METRICS_TIMEOUT_S = 10.0
"""Under load the page has been seen to take seconds: https://github.com/llm-d/llm-d-router/issues/1842."""
ADAPTER_TIMEOUT_S = 120.0

_COUNT = re.compile(r"[0-9]{1,18}\Z")
_PREFIXES = ("vllm:", "vllm_", "")
_LOAD = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
    "cache_config_info",
    "request_prefill_time_seconds_sum",
    "request_prefill_kv_computed_tokens_sum",
    "prompt_tokens",
    "prefix_cache_hits",
    "generation_tokens",
    "lora_requests_info",
)
_INFO = ("cache_config_info", "process_start_time_seconds")


class VLLM(OpenAI):
    """vLLM's V1 engine."""

    name = "vllm"
    priority = Priority.LOWER_FIRST
    loads_adapters = True
    strands_requests = True  # after SIGTERM 0.32.0 has been seen to cut its streams, and to leave them open for good
    # From entrypoints/openai/*/protocol.py of 0.32.0.
    reserved = frozenset(
        {
            "kv_transfer_params",  # disaggregation: which host, port and blocks to fetch the KV cache from
            "ec_transfer_params",  # the same for the outputs of an encoder
            "vllm_xargs",  # lands beside those two in `extra_args`, where connectors look for their own settings
            "request_id",  # some connectors read the addresses of both servers out of it (moriio)
            "stream_interval",  # streams that speak so seldom would be taken for those of an engine that hangs
        }
    )
    risky = frozenset(
        {
            "chat_template",  # Jinja that the engine runs, where it was told to trust requests
            "prompt_embeds",  # tensors that torch reads (CVE-2025-62164)
            "media_io_kwargs",  # how many frames of a video are decoded, and by what
            "mm_processor_kwargs",  # arguments of code of the model's
            "guided_decoding_backend",  # which compiler is to read a grammar; older versions
            "mm_payload",  # have whole tensors of pictures sent back
            "return_mm_kwargs",  # the same before it was renamed
        }
    )

    def prepare(self, wish: Wish) -> Prepared:
        prepared = super().prepare(wish)
        # 0 is vLLM's own default: not said, unless it has to take the place of the caller's.
        if wish.urgency or (wish.urgency is not None and "priority" in wish.fields):
            prepared.values["priority"] = b"%d" % -wish.urgency
        if wish.cache_salt is not None:
            prepared.values["cache_salt"] = msgspec.json.encode(wish.cache_salt)
        return prepared

    def model_for(self, wish: Wish) -> str | None:
        return wish.model if wish.adapter is None else wish.adapter

    def continuation(self, path: str, fields: Mapping[str, Any], text: str) -> dict[str, Any]:
        """0.32.0 begins an answer to a prompt that ends in U+FFFD with the whole prompt, taking the end for half a
        character that has only now become whole."""
        if text.endswith("\ufffd"):
            raise NotOffered("vLLM repeats a prompt that ends in a character which cannot be read")
        return super().continuation(path, fields, text)

    def counting(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return continuous_usage(fields)

    def prefilled(self, fields: Mapping[str, Any], text: str) -> dict[str, Any]:
        """Both flags belong together: 0.32.0 answers 400 when both are true, and `add_generation_prompt` is by default.

        A template that trims what assistants say (Llama 3's) takes white space from the end of the text, and the
        answer goes on as if it had not been sent (`render_jinja_template` in transformers): `EngineInfo.trims_text`.
        """
        return going_on(fields, text)

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """`GET /health`, which asks whether the engine process is alive and generates nothing."""
        return readiness(await side.get("/health"))

    async def info(self, side: SideChannel) -> EngineInfo:
        """From `/version`, `/v1/models`, `/metrics`, `/kv_event_sources` and, for its chat template, `/tokenize`.

        The epoch is the start of the HTTP process, which ends with its engine; several HTTP processes
        (`--api-server-count`) do not publish it.
        """
        version = await _object(side, "/version")
        cards = models_in(await _object(side, "/v1/models"))
        sources = await _object(side, "/kv_event_sources")
        page = await side.get("/metrics", timeout_s=METRICS_TIMEOUT_S)
        found = {} if page.status in ABSENT else read_page(page.expect().body, _INFO, _PREFIXES)
        caches = found.get("cache_config_info", [])
        bases = [card for card in cards if not isinstance(card.get("parent"), str)]
        lengths = [count_or_none(card.get("max_model_len")) for card in bases]
        started = found.get("process_start_time_seconds", [])
        dp_size = len(caches) or len(_ranked(sources)) or 1
        block_size = _count_label(caches[0], "block_size") if caches else None
        said = version.get("version")
        return EngineInfo(
            version=said if isinstance(said, str) else None,
            models=tuple(card["id"] for card in bases),
            epoch=repr(started[0][1]) if started else None,
            context_tokens=next(filter(None, lengths), None),
            kv_capacity_tokens=_capacity(caches),
            block_size=block_size,
            dp_size=dp_size,
            kv_events=_kv_events(sources, block_size, dp_size),
            trims_text=await _trims(side),
        )

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        answer = await side.get("/metrics", timeout_s=METRICS_TIMEOUT_S)
        if answer.status in ABSENT:
            raise NotOffered("this vLLM has no /metrics")
        return read_load(answer.expect().body, dp_rank)

    async def adapters(self, side: SideChannel) -> tuple[Adapter, ...]:
        """Those of `/v1/models` that have a parent; vLLM fetches what is not in memory when a request needs it."""
        answer = await side.get("/v1/models")
        cards = models_in(answer.expect().json_object())
        return tuple(
            Adapter(card["id"], path=card["root"] if isinstance(card.get("root"), str) else None)
            for card in cards
            if isinstance(card.get("parent"), str)
        )

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        await _change_adapters(side, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload_adapter(self, side: SideChannel, name: str) -> None:
        await _change_adapters(side, "/v1/unload_lora_adapter", {"lora_name": name})


def read_load(page: bytes, dp_rank: int | None) -> EngineLoad:
    """A `/metrics` page, of one engine (data-parallel rank) or of all together. Raises `NotOffered`.

    Prefill tokens and seconds are counted when a request has finished, and each request has its own seconds: prefills
    that were batched together count several times, so that the quotient is what a request waits, not what the engine
    worked. Of adapters vLLM tells only which requests are running now; others may be in memory too.
    """
    found = {
        name: [each for each in samples if dp_rank is None or each[0].get("engine", "0") == str(dp_rank)]
        for name, samples in read_page(page, _LOAD, _PREFIXES).items()
        if name != "lora_requests_info"
    }
    running = _count(found.get("num_requests_running"))
    waiting = _count(found.get("num_requests_waiting"))
    if running is None and waiting is None:
        which = "" if dp_rank is None else f" of data-parallel rank {dp_rank}"
        raise NotOffered(f"vLLM's /metrics has no load{which}; start it without --disable-log-stats")
    uses = found.get("kv_cache_usage_perc") or found.get("gpu_cache_usage_perc") or []
    use = min(1.0, max(0.0, sum(value for _, value in uses) / len(uses))) if uses else None
    capacity = _capacity(found.get("cache_config_info", []))
    prefilled = _count(found.get("request_prefill_kv_computed_tokens_sum"))
    if prefilled is None:
        prompts, hits = _count(found.get("prompt_tokens")), _count(found.get("prefix_cache_hits"))
        prefilled = None if prompts is None or hits is None else max(0, prompts - hits)
    slots, adapters = _running_adapters(page, dp_rank)
    return EngineLoad(
        running=running,
        waiting=waiting,
        kv_use=use,
        kv_used_tokens=None if use is None or capacity is None else round(use * capacity),
        kv_capacity_tokens=capacity,
        prefill_tokens_total=prefilled,
        prefill_busy_s_total=total(found.get("request_prefill_time_seconds_sum", [])),
        generated_tokens_total=_count(found.get("generation_tokens")),
        adapter_slots=slots,
        adapter_slots_used=None if adapters is None else len(adapters),
        resident_adapters=adapters,
    )


def _running_adapters(page: bytes, dp_rank: int | None) -> tuple[int | None, tuple[str, ...] | None]:
    """Slots, and the adapters of running requests.

    Each combination has a series of its own whose value is the time at which it was last true: the newest counts. It
    does not say which engine it is about, so that nothing can be told of one rank.
    """
    samples = read_page(page, ("lora_requests_info",), _PREFIXES).get("lora_requests_info")
    if not samples or dp_rank is not None:
        return None, None
    newest = max(samples, key=lambda sample: sample[1])
    names = newest[0].get("running_lora_adapters", "").split(",")
    return _count_label(newest, "max_lora"), tuple(name.strip() for name in names if name.strip())


def _capacity(caches: Sequence[Sample]) -> int | None:
    """Tokens that the KV caches of all engines hold.

    Where layers of several kinds share the blocks, only `kv_cache_size_tokens` is right; older versions lack it.
    """
    tokens = 0
    for cache in caches:
        size = _count_label(cache, "kv_cache_size_tokens")
        if size is None:
            block_size, blocks = _count_label(cache, "block_size"), _count_label(cache, "num_gpu_blocks")
            if block_size is None or blocks is None:
                return None
            size = block_size * blocks
        tokens += size
    return tokens or None


def _count_label(sample: Sample, label: str) -> int | None:
    text = sample[0].get(label, "")
    return int(text) if _COUNT.match(text) else None


def _count(samples: Sequence[Sample] | None) -> int | None:
    value = total(samples or ())
    return None if value is None else max(0, int(value))


def _ranked(sources: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The publisher of each rank, by its rank."""
    ranks = [rank for rank, each in sources.items() if _COUNT.match(rank) and isinstance(each, dict)]
    return [sources[rank] for rank in sorted(ranks, key=int)]


def _kv_events(sources: Mapping[str, Any], block_size: int | None, dp_size: int) -> KvEventsEndpoint | None:
    ranked = _ranked(sources)
    if not ranked:
        return None
    first = ranked[0]
    endpoint, replay, topic = first.get("endpoint"), first.get("replay_endpoint"), first.get("topic")
    if first.get("enable_kv_cache_events") is False or first.get("publisher") != "zmq" or not isinstance(endpoint, str):
        return None
    return KvEventsEndpoint(
        endpoint,
        replay_endpoint=replay if isinstance(replay, str) else None,
        topic=topic if isinstance(topic, str) else "",
        block_size=block_size,
        dp_size=max(dp_size, len(ranked)),
    )


async def _trims(side: SideChannel) -> bool:
    """Whether a text with white space at its end is the same to it as without; False where it does not tell."""
    counts = []
    for text in ("a", "a\n"):
        content = going_on({"messages": [{"role": "user", "content": "a"}]}, text)
        try:
            answer = await side.post("/tokenize", content)
            counts.append(count_or_none(answer.json_object().get("count")) if answer.ok else None)
        except SideChannelError:
            return False
    return counts[0] is not None and counts[0] == counts[1]


async def _object(side: SideChannel, path: str) -> dict[str, Any]:
    """Empty when there is no such path. Raises `SideChannelError`."""
    answer = await side.get(path)
    return {} if answer.status in ABSENT else answer.expect().json_object()


async def _change_adapters(side: SideChannel, path: str, content: dict[str, str]) -> None:
    answer = await side.post(path, content, timeout_s=ADAPTER_TIMEOUT_S)
    if answer.ok:
        return  # the body is a sentence, not JSON
    reason = _reason(answer)
    if reason is not None and answer.status not in (401, 403):
        raise AdapterRefused(reason)
    if answer.status in ABSENT:
        raise NotOffered("start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora")
    answer.expect()


def _reason(answer: Answer) -> str | None:
    """The message of vLLM's own error object; None for another answer, like that to an unknown path."""
    try:
        error = answer.json_object().get("error")
    except SideChannelError:
        return None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None
