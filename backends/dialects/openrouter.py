"""OpenRouter, `https://openrouter.ai/api/v1`: one API in front of many providers.

What differs from plain OpenAI: 403 can be the caller's fault (moderation, guardrails) or the key's; 402 can be a
matter of seconds; errors carry their kind in `metadata.error_type`; `GET /models` needs no key, so that it proves
none. Usage comes unasked, with what was read from and written to caches. `HTTP-Referer` and `X-OpenRouter-Title`, by
which OpenRouter attributes traffic, are the backend's `headers`.
Sources: openrouter.ai/docs, "Errors and Debugging", "Streaming", "Usage Accounting", "Limits" and its `openapi.yaml`
(OpenRouterTeam/docs, c26125a, 22 August 2026; "402 with retry-after" from the page as of autumn 2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from backends.dialects.openai import ABSENT, OpenAI, readiness
from backends.dialects.protocol import Fault, Readiness
from backends.side import SideChannel

_ABOUT_THE_INPUT = frozenset({"flagged_input", "reasons", "patterns"})
"""Members of `metadata` in a 403 by moderation (the first two) or by a guardrail."""
_ASKS_FOR_LESS = re.compile(r"or fewer max_tokens\..* can only afford [1-9]", re.DOTALL)
"""Of a 402: the balance, below which whatever `max_tokens` could cost has to stay, is not used up yet."""
_BLOCKED = ("request blocked", "moderation", "flagged")


class OpenRouter(OpenAI):
    """OpenAI's API with errors of many origins."""

    name = "openrouter"
    hosted = True
    reserved = frozenset({"models", "route", "preset"})
    """Each of them has another model answer, and bill, than the one that the gateway agreed to."""

    def judge_error(self, status: int, error: Mapping[str, Any]) -> Fault:
        metadata = error.get("metadata")
        if not isinstance(metadata, dict):
            metadata = {}
        if status == 403 and _is_about_the_request(error, metadata):
            return Fault.REQUEST
        if status == 402 and metadata.get("limit_source") == "openrouter_in_flight_budget":
            return Fault.OVERLOAD  # what runs just now has used up the budget; it comes with `retry-after`
        said = error.get("message")
        if status == 402 and isinstance(said, str) and _ASKS_FOR_LESS.search(said):
            return Fault.OVERLOAD  # what the caller's max_tokens could cost; smaller requests are served with this key
        return super().judge_error(status, error)

    def is_overload(self, status: int, error: Mapping[str, Any]) -> bool:
        """503 is "no provider is available now", of one model among hundreds: no failure of OpenRouter itself."""
        return status == 503 or super().is_overload(status, error)

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """`GET /v1/key`: says whether the key is good, in a few hundred bytes."""
        answer = await side.get("/v1/key")
        return await super().probe(side, model) if answer.status in ABSENT else readiness(answer)


def _is_about_the_request(error: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Whether a 403 is about what was asked, not about our key ("Key limit exceeded", "Only management keys …")."""
    if _ABOUT_THE_INPUT & metadata.keys() or isinstance(error.get("availability"), dict):
        return True  # `availability`: a model that is not to be had in this region
    said = str(error.get("message") or "").lower()
    return any(word in said for word in _BLOCKED)
