"""Any server that speaks OpenAI's API and nothing more; what the other dialects build on.

Covers OpenAI itself and every API that differs from it by address and key only (Together, Fireworks, Groq, a
HolySheep-like relay): such an API needs a few lines of configuration and no dialect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from backends.dialects.protocol import (
    CHAT,
    COMPLETIONS,
    Adapter,
    EngineInfo,
    EngineLoad,
    Fault,
    NotOffered,
    Prepared,
    Priority,
    Readiness,
    Untranslatable,
    Wish,
)
from backends.side import Answer, SideChannel, SideChannelError, Trouble
from backends.usage import Usage, read_openai_usage

_ASK_FOR_USAGE = b'{"include_usage":true}'
_STREAMING_PATHS = (CHAT, COMPLETIONS)
_OVERLOAD_WORDS = ("overload", "queue", "capacity", "too many", "busy", "rate limit")
_CONTENT_WORDS = ("violates usage guidelines", "content policy", "content management policy")
"""By which a 403 is about the prompt: xAI says "Content violates usage guidelines." in a refused key's status. Else
three such prompts of one caller would have the key put aside for everybody."""
_MONEY_CODES = frozenset({"insufficient_quota", "billing_not_active", "billing_hard_limit_reached"})
ABSENT = frozenset({404, 405, 501})
"""Statuses by which a server says that it has no such endpoint."""


def usage_option(wish: Wish) -> bytes | None:
    """The `stream_options` that make a stream end with its usage; None when nothing must change.

    Other members of the caller's `stream_options` are kept. One of another type is left for the engine to refuse. An
    `include_usage` of another type is not: engines read null, 0 and "no" as false, and nobody would count the tokens.
    """
    if not wish.stream or wish.path not in _STREAMING_PATHS:
        return None
    options = wish.fields.get("stream_options")
    if options is None:
        return _ASK_FOR_USAGE
    if not isinstance(options, dict) or options.get("include_usage") is True:
        return None
    return msgspec.json.encode({**options, "include_usage": True})


def models_in(tree: Any) -> list[dict[str, Any]]:
    """The model objects of a `GET /v1/models` answer; what is malformed is left out.

    Together answers with the bare list instead of an object around it.
    """
    data = tree.get("data") if isinstance(tree, dict) else tree
    if not isinstance(data, list):
        return []
    return [each for each in data if isinstance(each, dict) and isinstance(each.get("id"), str)]


def with_beginning(fields: Mapping[str, Any], text: str) -> list[Any]:
    """The messages, and the beginning of the assistant's answer after them. Raises `NotOffered`."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise NotOffered("the request has no list of messages")
    return [*messages, {"role": "assistant", "content": text}]


def continuous_usage(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`counting` in the words of vLLM, which SGLang has taken over."""
    options = fields.get("stream_options")
    if not isinstance(options, dict | None) or (options and options.get("continuous_usage_stats")):
        return {}
    return {"stream_options": {**(options or {}), "include_usage": True, "continuous_usage_stats": True}}


def going_on(fields: Mapping[str, Any], text: str) -> dict[str, Any]:
    """`continuation` of a chat as transformers, vLLM and llama.cpp have it, where the two flags belong together."""
    return {"messages": with_beginning(fields, text), "continue_final_message": True, "add_generation_prompt": False}


def _one_prompt(fields: Mapping[str, Any]) -> str:
    prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise NotOffered("only a prompt that is one text can be continued")  # tokens would have to be made of the rest
    return prompt


def is_about_money(error: Mapping[str, Any]) -> bool:
    """Whether a provider says that the account is used up, which OpenAI says with the status of a rate limit (429).

    Its `code` or `type` is then `insufficient_quota`, or another of those that name billing.
    """
    return any(isinstance(said := error.get(key), str) and said in _MONEY_CODES for key in ("code", "type"))


class OpenAI:
    """Closing the connection is the only way to stop a request, `/v1/models` all there is to ask."""

    name = "openai"
    hosted = False
    priority = Priority.NONE
    reserved: frozenset[str] = frozenset()
    risky: frozenset[str] = frozenset({"chat_template"})  # Jinja that the engine runs
    must_know_adapters = False
    adapters_by_path = False
    loads_adapters = False
    strands_requests = False
    completion_tokens: int | None = 16
    """Of a text completion that does not say `max_tokens`; None: as many as there is room for."""

    def head_fields(self, api_key: str | None) -> Sequence[tuple[str, str]]:
        return [] if api_key is None else [("authorization", f"Bearer {api_key}")]

    def prepare(self, wish: Wish) -> Prepared:
        values: dict[str, bytes] = {}
        option = usage_option(wish)
        if option is not None:
            values["stream_options"] = option
        model = self.model_for(wish)
        if model is not None:
            values["model"] = msgspec.json.encode(model)
        return Prepared(wish.path, values)

    def model_for(self, wish: Wish) -> str | None:
        """The value of `model` to send; None leaves the caller's."""
        if wish.adapter is not None:
            raise Untranslatable(f"{self.name} cannot be asked for a LoRA adapter.", "model")
        return wish.model

    def read_usage(self, tree: Mapping[str, Any]) -> Usage | None:
        usage = tree.get("usage")
        return read_openai_usage(usage) if isinstance(usage, dict) else None

    def judge_error(self, status: int, error: Mapping[str, Any]) -> Fault:
        if status == 403 and error.get("code") == "model_not_found":
            return Fault.REQUEST  # OpenAI: the key is good, but not for this model
        if status == 403 and any(words in str(error.get("message") or "").lower() for words in _CONTENT_WORDS):
            return Fault.REQUEST
        if status in (401, 403) and "Missing scopes:" in str(error.get("message") or ""):
            return Fault.REQUEST  # nor is a restricted key that may not do this, embeddings perhaps, a bad one
        if status in (401, 402, 403, 407) or is_about_money(error):
            return Fault.CREDENTIAL
        if self.is_overload(status, error):
            return Fault.OVERLOAD
        if status == 408 or not 400 <= status < 500:
            return Fault.FAILURE
        return Fault.REQUEST

    def is_overload(self, status: int, error: Mapping[str, Any]) -> bool:
        """Whether an error answer means "too much work just now"; part of `judge_error`, for engines to refine."""
        # 409 and 425: a lock, or a request that came too early; OpenAI's own clients come back after either.
        if status in (409, 425, 429, 529):
            return True
        if status != 503:
            return False
        said = str(error.get("message") or "").lower()
        return any(word in said for word in _OVERLOAD_WORDS)

    def abort_request(self, request_id: str) -> tuple[str, bytes] | None:
        return None

    def continuation(self, path: str, fields: Mapping[str, Any], text: str) -> dict[str, Any]:
        """A text completion goes on from prompt and text; OpenAI's chat API cannot be told to go on with a message."""
        if self.hosted:
            raise NotOffered(f"{self.name} bills what it has begun, and answers anew")
        if path == COMPLETIONS:
            # What is left is counted from what the answer may have, also where the request does not say it.
            assumed = {} if self.completion_tokens is None else {"max_tokens": self.completion_tokens}
            return {"prompt": _one_prompt(fields) + text, **(assumed if fields.get("max_tokens") is None else {})}
        if path == CHAT:
            return self.prefilled(fields, text)
        raise NotOffered("only completions can be continued")

    def counting(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def prefilled(self, fields: Mapping[str, Any], text: str) -> dict[str, Any]:
        """`continuation` of a chat, for engines to refine. Raises `NotOffered`."""
        raise NotOffered(f"{self.name} servers cannot be told to go on with a message")

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """`GET /v1/models/{id}`: cheap, authenticated, no generation. Servers without it are asked for the list.

        A restricted key of OpenAI's may serve and yet not be allowed to read models ("Missing scopes: …"). It is known
        then, and requests will show what it is good for.
        """
        if model is not None:
            answer = await side.get(f"/v1/models/{quote(model, safe='/:')}")
            if answer.status not in ABSENT:
                return readiness(answer)
        return readiness(await side.get("/v1/models"))

    async def info(self, side: SideChannel) -> EngineInfo:
        answer = await side.get("/v1/models")
        if answer.status in ABSENT:
            return EngineInfo()
        return EngineInfo(models=tuple(each["id"] for each in models_in(answer.expect().json())))

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        raise NotOffered(f"{self.name} servers do not report their load")

    async def adapters(self, side: SideChannel) -> tuple[Adapter, ...]:
        raise NotOffered(f"{self.name} servers do not list adapters")

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        raise NotOffered(f"{self.name} servers cannot be told to load an adapter")

    async def unload_adapter(self, side: SideChannel, name: str) -> None:
        raise NotOffered(f"{self.name} servers cannot be told to unload an adapter")


def readiness(answer: Answer) -> Readiness:
    """What the status of a health or models endpoint means.

    404 counts as ready: a server without the endpoint is there all the same. 429 is load. 402 is a key without money.
    Raises `SideChannelError` for other failures (500 and the like), which say neither yes nor no.
    """
    if answer.status in (401, 402, 403, 407):
        return Readiness.READY if b"Missing scopes:" in answer.body[:4096] else Readiness.UNAUTHORIZED
    if answer.status == 503:
        return Readiness.NOT_READY
    if answer.status < 500 and answer.status != 408 and not 300 <= answer.status < 400:
        return Readiness.READY
    raise SideChannelError(Trouble.STATUS, f"{answer.url} answered {answer.status}", answer.status)
