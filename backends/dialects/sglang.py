"""SGLang, spoken natively: the request id is ours, its load comes from `/v1/loads`, adapters are `base:adapter`.

Requests. `rid` is ours, so that a request can be aborted by id even where its socket is not seen. The endpoint is
`POST /abort_request {"rid": …}`; it answers 200 for ids it does not know, and ignores them. Of running requests it ends
every one whose id begins with the one given, so ids of one length must be used. With several prompts SGLang numbers our
id (`rid_0`, …), and with `n > 1` it makes up ids of its own: there the closed connection alone stops it, at once on a
stream and within four seconds on a whole answer. A bare adapter name as `model` is silently served by the base model.

Asked aside. `/health` runs a generation and takes a second at best, so `/ready` is asked where it exists. Answers were
recorded from 0.5.23 (see the tests); older shapes are read from the sources of those versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from backends.dialects import sglang_report as report
from backends.dialects.openai import ABSENT, OpenAI, continuous_usage, models_in, readiness, with_beginning
from backends.dialects.protocol import (
    CHAT,
    COMPLETIONS,
    Adapter,
    AdapterRefused,
    EngineInfo,
    EngineLoad,
    NotOffered,
    Prepared,
    Priority,
    Readiness,
    Untranslatable,
    Wish,
)
from backends.side import Answer, SideChannel, SideChannelError, Trouble

HEALTH_TIMEOUT_S = 30.0
"""`/health` itself gives up after 20 s (`SGLANG_HEALTH_CHECK_TIMEOUT`), then looks once more after a second."""
INFO_TIMEOUT_S = 15.0
"""`/server_info` is answered by the scheduler between two steps, and a step may be a long prefill."""
LOAD_TIMEOUT_S = 10.0
ADAPTER_TIMEOUT_S = 120.0
"""Loading reads files, perhaps over a network, and waits for requests that use the adapter's slot."""

_REDIRECTS = (307, 308)
_OVERLOAD_WORDS = ("higher priority request", "waiting timeout", "memory pressure", "priority is disabled")
"""Of 503 answers besides "The request queue is full." (0.5.23, managers/scheduler.py and schedule_batch.py).

The last, of a server with --abort-on-priority-when-disabled, is no overload; but it is no failure of the server either,
and another replica may take the request.
"""


class SGLang(OpenAI):
    """SGLang 0.5.x; what older versions do not have is answered with `NotOffered`."""

    name = "sglang"
    priority = Priority.HIGHER_FIRST
    loads_adapters = True
    # From entrypoints/openai/protocol.py of 0.5.23. `rid` is not here because `prepare` overwrites it, and `lora_path`
    # because the gateway reads it as an adapter's name and passes it on to nobody.
    reserved = frozenset(
        {
            "bootstrap_host",  # disaggregation: the server to fetch the KV cache from
            "bootstrap_port",  # its port
            "bootstrap_room",  # the transfer on it, anybody's
            "routed_dp_rank",  # the rank that runs the request
            "data_parallel_rank",  # the same before it was renamed
            "disagg_prefill_dp_rank",  # the rank of the prefill server that has the KV cache
            "session_params",  # continues, replaces or aborts requests of a session, anybody's, by id
            "session_id",  # the cache of a session, likewise
            "custom_logit_processor",  # pickled code that the engine runs
            "custom_params",  # its arguments
            "custom_labels",  # labels of the engine's own metrics, one series for each value
        }
    )
    risky = frozenset(
        {
            "chat_template",  # Jinja that the engine runs
            "stop_regex",  # searched in the text after each token, by the process that serves everybody
            "input_ids",  # the prompt in place of the messages, which is not what the gateway has counted
            "embed_overrides",  # tensors in place of tokens
            "mm_processor_kwargs",  # arguments of code of the model's
            "images_config",  # the same, for single kinds of media
            "video_config",
            "return_hidden_states",  # a vector of thousands of numbers for each token, as JSON
            "return_routed_experts",  # the same of experts
            "return_sampling_mask",  # the same of the vocabulary
        }
    )

    def prepare(self, wish: Wish) -> Prepared:
        prepared = super().prepare(wish)
        values = prepared.values
        values["rid"] = msgspec.json.encode(wish.request_id)
        if wish.urgency is not None:
            _set_priority(values, wish)
        # Embeddings have no such field.
        if wish.dp_rank is not None and wish.path in (CHAT, COMPLETIONS):
            values["routed_dp_rank"] = b"%d" % wish.dp_rank
        if wish.cache_salt is not None and wish.path in (CHAT, COMPLETIONS):
            # It stands before the caller's `extra_key`, and is of one length: no two tenants can make the same of both.
            values["cache_salt"] = msgspec.json.encode(wish.cache_salt)
        return prepared

    def model_for(self, wish: Wish) -> str | None:
        if wish.adapter is None:
            return wish.model
        base = wish.model if wish.model is not None else wish.fields.get("model")
        if not isinstance(base, str):
            raise Untranslatable("SGLang needs the name of the base model beside that of the LoRA adapter.", "model")
        return f"{base}:{wish.adapter}"

    def is_overload(self, status: int, error: Mapping[str, Any]) -> bool:
        if super().is_overload(status, error):
            return True
        said = str(error.get("message") or "").lower()
        return status == 503 and any(words in said for words in _OVERLOAD_WORDS)

    def abort_request(self, request_id: str) -> tuple[str, bytes] | None:
        return "/abort_request", msgspec.json.encode({"rid": request_id})

    def counting(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return continuous_usage(fields)

    def prefilled(self, fields: Mapping[str, Any], text: str) -> dict[str, Any]:
        """0.5.23 renders the chat up to where the assistant speaks, and appends the tokens of the text as it is.

        `add_generation_prompt` must not be false, which would leave out the words that begin the assistant's turn; its
        `/v1/chat/completions` does not know the field, newer versions may.
        """
        return {"messages": with_beginning(fields, text), "continue_final_message": True, **_turn_begun(fields)}

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """`GET /ready`; versions without it are asked for `/health`, which generates a token and has its time."""
        answer = await side.get("/ready")
        if answer.status in ABSENT:
            answer = await side.get("/health", timeout_s=HEALTH_TIMEOUT_S)
        return readiness(answer)

    async def info(self, side: SideChannel) -> EngineInfo:
        """From `/server_info`, `/model_info` and `/v1/models`; the first two had other names in older versions."""
        server = await _object(side, "/server_info", "/get_server_info")
        model = await _object(side, "/model_info", "/get_model_info")
        cards = await _object(side, "/v1/models")
        return report.info(server, model, models_in(cards))

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        """From `/v1/loads`, else `/metrics`, else `/get_load` of the versions of 2025."""
        answer = await side.get("/v1/loads?include=core,lora", timeout_s=LOAD_TIMEOUT_S)
        if answer.status not in ABSENT:
            loads = answer.expect().json_object().get("loads")
            if not isinstance(loads, list):
                raise SideChannelError(Trouble.BROKEN, f"{answer.url} did not answer with loads")
            return report.load(loads, dp_rank)
        answer = await side.get("/metrics", timeout_s=LOAD_TIMEOUT_S)
        if answer.status in _REDIRECTS:
            # Where it is a mounted application, only the path with the slash answers.
            answer = await side.get("/metrics/", timeout_s=LOAD_TIMEOUT_S)
        if answer.ok:
            found = report.load_in_metrics(answer.body, dp_rank)
            if found is not None:
                return found
        answer = await side.get("/get_load", timeout_s=LOAD_TIMEOUT_S)
        if answer.status in ABSENT:
            raise NotOffered("this SGLang has no /v1/loads; start it with --enable-metrics, or use a newer one")
        return report.old_load(answer.expect().json(), dp_rank)

    async def adapters(self, side: SideChannel) -> tuple[Adapter, ...]:
        """All in host memory; SGLang moves them to the device as requests need them."""
        answer = await side.get("/v1/models")
        cards = models_in(answer.expect().json_object())
        if any("parent" in card for card in cards):
            return report.adapters(cards)
        # Versions whose model list leaves adapters out name at least those they were started with.
        return report.adapters_at_start(await _object(side, "/server_info", "/get_server_info"))

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        await _change_adapters(side, "/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload_adapter(self, side: SideChannel, name: str) -> None:
        await _change_adapters(side, "/unload_lora_adapter", {"lora_name": name})


def _turn_begun(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"add_generation_prompt": True} if "add_generation_prompt" in fields else {}


def _set_priority(values: dict[str, bytes], wish: Wish) -> None:
    """Said of every request, the ordinary ones (0) too, since one without a priority goes behind all that have one.

    0.5.23 gives it the lowest there is (`_set_or_validate_priority` in managers/scheduler.py), and a difference above
    the preemption threshold, 10, has running requests thrown out for others. Without --enable-priority-scheduling it
    is not said: the server ignores it, or answers 503 (`--abort-on-priority-when-disabled`). Null is no priority.
    """
    assert wish.urgency is not None
    if wish.priority is Priority.NONE:
        if "priority" in wish.fields:
            values["priority"] = b"null"
    else:
        values["priority"] = b"%d" % (-wish.urgency if wish.priority is Priority.LOWER_FIRST else wish.urgency)


async def _object(side: SideChannel, *paths: str) -> dict[str, Any]:
    """The answer of the first path that exists; empty when none does. Raises `SideChannelError`."""
    for path in paths:
        answer = await side.get(path, timeout_s=INFO_TIMEOUT_S)
        if answer.status not in ABSENT:
            return answer.expect().json_object()
    return {}


async def _change_adapters(side: SideChannel, path: str, content: dict[str, str]) -> None:
    answer = await side.post(path, content, timeout_s=ADAPTER_TIMEOUT_S)
    if answer.status in ABSENT:
        raise NotOffered(f"this SGLang has no {path}")
    if answer.status in (401, 403):
        answer.expect()
    reason = _refusal(answer)
    if reason is None:
        return
    if "LoRA is not enabled" in reason:
        raise NotOffered(reason)
    raise AdapterRefused(reason)


def _refusal(answer: Answer) -> str | None:
    """Why an adapter was not loaded or unloaded; None when it was. Raises `SideChannelError` for no such answer."""
    try:
        tree = answer.json_object()
    except SideChannelError:
        answer.expect()
        raise
    if answer.ok and tree.get("success") is True:
        return None
    said = tree.get("error_message") or tree.get("message") or tree.get("detail")
    if not isinstance(said, str):
        answer.expect()
        raise SideChannelError(Trouble.BROKEN, f"{answer.url} did not say whether it succeeded", answer.status)
    return said
