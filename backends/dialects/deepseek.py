"""DeepSeek's own API, `https://api.deepseek.com`.

While a request waits for its turn, up to ten minutes, a stream carries comments (`: keep-alive`) and a whole answer
begins with empty lines; both are valid and are passed on. Which also means that status 200 is sent before anything is
known about the answer.
Sources: api-docs.deepseek.com, "Rate Limit", "Error Codes", "Create Chat Completion", "Lists Models", "Get User
Balance".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.dialects.openai import ABSENT, OpenAI, readiness
from backends.dialects.protocol import Readiness
from backends.side import SideChannel
from backends.usage import Usage, known_tokens


class DeepSeek(OpenAI):
    """OpenAI's API with its own names for cached tokens, and an account that can run dry."""

    name = "deepseek"
    hosted = True

    def read_usage(self, tree: Mapping[str, Any]) -> Usage | None:
        """`prompt_cache_hit_tokens` is DeepSeek's own count; `prompt_tokens_details` came later and says the same."""
        usage = super().read_usage(tree)
        if usage is not None:
            hit = known_tokens(tree["usage"].get("prompt_cache_hit_tokens"))
            if hit is not None:
                usage.cached_tokens = hit
        return usage

    def is_overload(self, status: int, error: Mapping[str, Any]) -> bool:
        """503 is documented as "Server Overloaded", whatever the message says."""
        return status == 503 or super().is_overload(status, error)

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """`GET /user/balance`: shows the key and the money in one small read. There is no `/models/{id}`.

        Where it is missing (another host that calls itself DeepSeek), the list of models is asked for.
        """
        answer = await side.get("/user/balance")
        if answer.status in ABSENT:
            return readiness(await side.get("/v1/models"))
        if answer.ok and answer.json_object().get("is_available") is False:
            return Readiness.UNAUTHORIZED
        return readiness(answer)
