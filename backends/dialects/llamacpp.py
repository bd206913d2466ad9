"""llama.cpp's server. It has no abort endpoint, and no name for an adapter but its number.

It stops a stream at once when its caller leaves, but generates a whole answer to the end for nobody (xllamacpp
2026.10.11549: 4,000 tokens of it after the connection was closed), and its slot is busy for as long. So it is always
asked to stream, and whole answers are put together here. Not known from outside: whether its slots share one cache
(`--kv-unified`); the capacity that is reported then is too large by up to the number of slots.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from backends.dialects.assemble import Assembler
from backends.dialects.openai import ABSENT, OpenAI, going_on, models_in, readiness
from backends.dialects.protocol import (
    CHAT,
    COMPLETIONS,
    Adapter,
    EngineInfo,
    EngineLoad,
    NotOffered,
    Prepared,
    Readiness,
    Untranslatable,
    Wish,
)
from backends.prometheus import read_page, total
from backends.side import Answer, SideChannel, SideChannelError, Trouble
from backends.usage import Usage, count_or_none, known_tokens

_OFF = ABSENT | {403}
"""How llama.cpp, or a proxy before it, says that an endpoint is switched off; it says 501 itself."""
_GAUGES = ("requests_processing", "requests_deferred")
_COUNTERS = ("prompt_tokens_total", "prompt_seconds_total", "tokens_predicted_total")
_FOLDER = re.compile(r".*[/\\]", re.DOTALL)
_SUFFIX = re.compile(r"(?<=.)\.[^.]*\Z", re.DOTALL)


def prompts_in(prompt: Any) -> int:
    """How many prompts the `prompt` of a completion holds: a list of token ids, even mixed with text, is one."""
    if not isinstance(prompt, list) or any(type(part) in (int, float) for part in prompt):
        return 1
    return max(1, len(prompt))


def choices_of(wish: Wish) -> int:
    """How many choices the whole answer has. `n_cmpl` is llama.cpp's own name for `n` and goes before it."""
    own = wish.fields.get("n_cmpl")
    wanted = wish.fields.get("n") if own is None else own
    each = wanted if type(wanted) is int and wanted > 0 else 1
    return each * (prompts_in(wish.fields.get("prompt")) if wish.path == COMPLETIONS else 1)


def streams_alike(fields: Mapping[str, Any]) -> bool:
    """Whether a stream carries all that a whole answer does.

    It does not with `verbose`, which repeats the whole text beside the answer, and with the one reasoning format that
    is defined as different in streams.
    """
    return not fields.get("verbose") and fields.get("reasoning_format") != "deepseek-legacy"


def adapter_name(path: str) -> str:
    """The file's name without folder and suffix: llama.cpp knows adapters by file and number only."""
    return _SUFFIX.sub("", _FOLDER.sub("", path))


class LlamaCpp(OpenAI):
    """llama.cpp's `llama-server`, from whatever package."""

    name = "llamacpp"
    reserved = frozenset({"id_slot", "lora", "sse_ping_interval"})
    """A slot pinned by one caller serves nobody else, adapters are chosen by the gateway, and pings tell it that the
    engine lives."""
    must_know_adapters = True
    strands_requests = True
    completion_tokens = None

    def prepare(self, wish: Wish) -> Prepared:
        prepared = super().prepare(wish)
        if wish.path not in (CHAT, COMPLETIONS):
            if wish.adapter is not None:
                raise Untranslatable("llama.cpp applies LoRA adapters to chat and text completions only.", "model")
            return prepared
        scales = self._scales(wish)
        if scales is not None:
            prepared.values["lora"] = scales
            # Its cache of finished prompts does not tell adapters apart (xllamacpp 2026.10.11549): a prompt would be
            # continued from what another adapter made of it, whatever scales it comes with.
            prepared.values["cache_prompt"] = b"false"
        if not wish.stream and streams_alike(wish.fields):
            prepared.values["stream"] = b"true"
            prepared.values["stream_options"] = b'{"include_usage":true}'
            if wish.fields.get("return_progress"):
                prepared.values["return_progress"] = b"false"  # reports of a stream, no part of a whole answer
            prepared.translation = Assembler(choices_of(wish), unsaid="")
        return prepared

    def counting(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A chunk may have several tokens: an emoji is mostly three, of which none is sent before the last."""
        return {} if fields.get("timings_per_token") else {"timings_per_token": True}

    def prefilled(self, fields: Mapping[str, Any], text: str) -> dict[str, Any]:
        """Builds of before May 2026 do not know the flags; they go on with an assistant's message that comes last,
        unless they were started with `--no-prefill-assistant`."""
        return going_on(fields, text)

    def model_for(self, wish: Wish) -> str | None:
        return wish.model

    def _scales(self, wish: Wish) -> bytes | None:
        """The scale of every adapter, 0 for those not meant; None for a server without adapters.

        Requests for the base model need it too: without it the scales of the command line apply, which are 1, and an
        empty list has been answered from cache entries of the adapter before.
        """
        held = [adapter for adapter in wish.adapters if adapter.id is not None]
        if wish.adapter is not None:
            meant = sum(adapter.name == wish.adapter for adapter in held)
            if meant == 0:
                raise Untranslatable(f"The engine holds no LoRA adapter {wish.adapter!r}.", "model")
            if meant > 1:
                raise Untranslatable(f"The engine holds {meant} LoRA adapters called {wish.adapter!r}.", "model")
        if not held:
            return None
        return msgspec.json.encode(
            [{"id": adapter.id, "scale": 1.0 if adapter.name == wish.adapter else 0.0} for adapter in held]
        )

    def read_usage(self, tree: Mapping[str, Any]) -> Usage | None:
        """Builds older than the details in `usage` tell the cached tokens in `timings`."""
        usage = super().read_usage(tree)
        timings = tree.get("timings")
        if usage is not None and usage.cached_tokens is None and isinstance(timings, dict):
            usage.cached_tokens = known_tokens(timings.get("cache_n"))
        return usage

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """`GET /health`: 503 while the model is loaded. It asks for no key, so a wrong one does not show here."""
        return readiness(await side.get("/health"))

    async def info(self, side: SideChannel) -> EngineInfo:
        models = await side.get("/v1/models")
        names = () if models.status in _OFF else tuple(m["id"] for m in models_in(models.expect().json_object()))
        answer = await side.get("/props")
        return info_from({} if answer.status in _OFF else answer.expect().json_object(), names)

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        """From `/slots` and `/metrics`, of which either may be switched off."""
        slots = await side.get("/slots")
        metrics = await side.get("/metrics")
        if slots.status in _OFF and metrics.status in _OFF:
            raise NotOffered("start llama-server with --metrics, and without --no-slots, to have its load reported")
        busy = EngineLoad() if slots.status in _OFF else load_from_slots(slots.expect())
        return busy if metrics.status in _OFF else with_metrics(busy, metrics.expect().body)

    async def adapters(self, side: SideChannel) -> tuple[Adapter, ...]:
        answer = await side.get("/lora-adapters")
        if answer.status in _OFF:
            raise NotOffered("this llama-server does not list its adapters")
        return tuple(_read_adapters(_objects(answer.expect())))

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        raise NotOffered("llama.cpp loads adapters only at its start: name the file with --lora and start it again")

    async def unload_adapter(self, side: SideChannel, name: str) -> None:
        raise NotOffered("llama.cpp keeps the adapters of its start: start it again without the file")


def info_from(props: Mapping[str, Any], models: tuple[str, ...]) -> EngineInfo:
    """Read a `/props` answer.

    The epoch is the marker that stands for images in prompts: random, made once in each process (checked over
    restarts). An owner who fixes it (`LLAMA_MEDIA_MARKER`) has an epoch that never changes.
    """
    settings = props.get("default_generation_settings")
    context = count_or_none(settings.get("n_ctx")) if isinstance(settings, dict) else None
    slots = count_or_none(props.get("total_slots"))
    silent = props.get("endpoint_slots") is False and props.get("endpoint_metrics") is False
    return EngineInfo(
        version=_text(props.get("build_info")),
        models=models,
        epoch=_text(props.get("media_marker")),
        context_tokens=context,
        kv_capacity_tokens=context * slots if context is not None and slots is not None else None,
        max_running=slots or None,
        lacks=(("load", "start llama-server with --metrics, and without --no-slots"),) if silent else (),
    )


def load_from_slots(answer: Answer) -> EngineLoad:
    """Read a `/slots` answer. Raises `SideChannelError`.

    Tokens in use are those of slots at work, prompt and answer so far; what an idle slot still holds is cache.
    """
    slots = _objects(answer)
    working = [slot for slot in slots if slot.get("is_processing") is True]
    capacity = _sum(slots, "n_ctx")
    used = _sum(working, "n_prompt_tokens")
    return EngineLoad(
        running=len(working),
        max_running=len(slots) or None,
        kv_use=min(1.0, used / capacity) if used is not None and capacity else None,
        kv_used_tokens=used,
        kv_capacity_tokens=capacity or None,
    )


def with_metrics(load: EngineLoad, page: bytes) -> EngineLoad:
    """Complete a load with what a `/metrics` page says."""
    found = {name: total(samples) for name, samples in read_page(page, (*_GAUGES, *_COUNTERS), ("llamacpp:",)).items()}
    processing = _whole(found.get("requests_processing"))
    seconds = found.get("prompt_seconds_total")
    return EngineLoad(
        running=processing if load.running is None else load.running,
        max_running=load.max_running,
        waiting=_whole(found.get("requests_deferred")),
        kv_use=load.kv_use,
        kv_used_tokens=load.kv_used_tokens,
        kv_capacity_tokens=load.kv_capacity_tokens,
        prefill_tokens_total=_whole(found.get("prompt_tokens_total")),
        prefill_busy_s_total=seconds if seconds is not None and seconds >= 0 else None,
        generated_tokens_total=_whole(found.get("tokens_predicted_total")),
    )


def _read_adapters(listed: Sequence[Mapping[str, Any]]) -> list[Adapter]:
    read = []
    for each in listed:
        number, path = count_or_none(each.get("id")), each.get("path")
        if number is not None and isinstance(path, str) and adapter_name(path):
            read.append(Adapter(adapter_name(path), path, number))
    return read


def _objects(answer: Answer) -> list[dict[str, Any]]:
    """The objects of an answer that is a list. Raises `SideChannelError`."""
    listed = answer.json()
    if not isinstance(listed, list):
        raise SideChannelError(Trouble.BROKEN, f"{answer.url} did not answer with a JSON list")
    return [each for each in listed if isinstance(each, dict)]


def _sum(slots: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """The sum of a count over slots; None when one of them does not tell it."""
    counts = [count_or_none(slot.get(name)) for slot in slots]
    known = [each for each in counts if each is not None]
    return sum(known) if len(known) == len(counts) else None


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None and value >= 0 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
