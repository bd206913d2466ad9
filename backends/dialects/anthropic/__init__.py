"""Anthropic's Messages API behind OpenAI's chat completions, both ways, whole and streamed.

Written after the anthropic SDK 2.12.0 (its types are the published schema) and https://platform.claude.com/docs, both
read on 2026-11-22. What becomes of each field of a request; everything not named here is left out, as Anthropic's own
OpenAI-compatible endpoint does (https://platform.claude.com/docs/en/api/openai-sdk):

    messages: system, developer     `system`, in order, wherever they stand. Newer models take a system message in the
                                    middle of a conversation, older ones answer 400 to it: this works with all
    messages: tool                  `tool_result` at the head of one user turn
    messages: thinking_blocks       signed and redacted thinking goes back as it came, between the same tool calls;
                                    reasoning_content alone is left out: Anthropic takes only what it has signed
    content: text, image_url, file  text, image (base64 or https), document (PDF, plain text; base64 or https)
    content: input_audio            refused
    name on messages                left out
    cache_control                   kept, on parts, messages, tools and the request
    tools, tool_choice              kept; `strict` too. Only functions; functions and function_call are refused
    parallel_tool_calls: false      `disable_parallel_tool_use`
    max_completion_tokens,          `max_tokens`; 32,000 when neither is given
      max_tokens
    stop                            `stop_sequences`; those of white space only are dropped, Anthropic refuses them
    temperature                     0 to 1; more becomes 1, as with Anthropic's own endpoint. 1 is the default and left
                                    out, because models since Claude Opus 4.7 refuse every other value
    top_p, top_k                    kept; top_p 1 (the default) and top_k -1 are left out
    reasoning_effort                `output_config.effort`; none and minimal are low. It switches no thinking on:
                                    with thinking, models refuse a forced tool and a temperature, and older ones a
                                    history without signed thinking. `thinking` itself is kept
    response_format                 json_schema is `output_config.format`; json_object is refused: there is no such mode
    safety_identifier, user         `metadata.user_id`, unless it looks like an e-mail address or a telephone number,
                                    to which Anthropic answers 400
    service_tier: default           `standard_only`
    n > 1, logprobs, top_logprobs,  refused: the answer would not be what was asked for
      logit_bias, audio, modalities
      other than text,
      web_search_options
    seed, presence_penalty,         left out: hints that change no promise
      frequency_penalty, store,
      metadata, prediction,
      prompt_cache_key, verbosity

The version of the API is 2023-06-01. The later 2026-10-21 has neither temperature, top_p nor top_k and answers 400 to
requests that name them (https://platform.claude.com/docs/en/api/migration-2026-10-21).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from backends.dialects.anthropic.request import DEFAULT_MAX_TOKENS, translated
from backends.dialects.anthropic.stream import AnthropicTranslation
from backends.dialects.openai import ABSENT, OpenAI, models_in
from backends.dialects.protocol import CHAT, EngineInfo, Fault, Prepared, Untranslatable, Wish
from backends.side import SideChannel

API_VERSION = "2023-06-01"
_MESSAGES = "/v1/messages"
_MOST_MODELS = 1000
"""The longest page that `GET /v1/models` gives; without asking it gives 20."""
_MONEY = re.compile(r"your credit balance is too low|you have reached your specified (?:\w+ )?api usage limits", re.I)
"""Said with status 400 and the type of an invalid request: the account is empty, or a limit that it set is reached.

Looked for at the beginning only: other 400s quote the request ("Input tag '…' found using 'type'"), and a caller who
writes these words into it must not have the key put aside for everybody."""
_ACCOUNT_CODES = frozenset({"contract_spend_limit_reached", "enforced_spend_limit_reached", "organization_on_hold"})
"""`details.error_code` of errors that are said with status 400 or 429 and that waiting does not mend."""


class Anthropic(OpenAI):
    """Anthropic, or a server that speaks its Messages API."""

    name = "anthropic"
    hosted = True

    def __init__(self, default_max_tokens: int = DEFAULT_MAX_TOKENS, now: Callable[[], float] = time.time) -> None:
        self._default_max_tokens = default_max_tokens
        self._now = now

    def head_fields(self, api_key: str | None) -> Sequence[tuple[str, str]]:
        fields = [("anthropic-version", API_VERSION)]
        return fields if api_key is None else [("x-api-key", api_key), *fields]

    def prepare(self, wish: Wish) -> Prepared:
        if wish.path != CHAT:
            raise Untranslatable(f"Anthropic answers chat completions only, not {wish.path}.", "model")
        model = self.model_for(wish)
        body = translated(
            wish.fields,
            wish.fields.get("model") if model is None else model,
            stream=wish.stream,
            default_max_tokens=self._default_max_tokens,
        )
        return Prepared(_MESSAGES, {}, body, AnthropicTranslation(self._now))

    def judge_error(self, status: int, error: Mapping[str, Any]) -> Fault:
        details = error.get("details")
        code = details.get("error_code") if isinstance(details, dict) else None
        if isinstance(code, str) and code in _ACCOUNT_CODES:
            return Fault.CREDENTIAL
        said = error.get("message")
        if status == 400 and isinstance(said, str) and _MONEY.match(said):
            return Fault.CREDENTIAL
        return super().judge_error(status, error)

    async def info(self, side: SideChannel) -> EngineInfo:
        answer = await side.get(f"/v1/models?limit={_MOST_MODELS}")
        if answer.status in ABSENT:
            return EngineInfo()
        return EngineInfo(models=tuple(each["id"] for each in models_in(answer.expect().json_object())))


__all__ = ["API_VERSION", "DEFAULT_MAX_TOKENS", "Anthropic", "AnthropicTranslation"]
