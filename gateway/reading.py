"""What routing wants to know of a prompt: its prefix keys, and about how many tokens it has.

Tokens are estimated from the bytes of the prompt's canonical text, at the ratio that the model's own counts have shown;
where the model has a tokenizer and a template, they are what the engine will see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gateway.prompt import prompt_parts
from routing.keys import seed_of, text_prefix
from routing.types import InferenceRequest

if TYPE_CHECKING:
    from gateway.order import Order
    from gateway.record import Exchange
    from gateway.templates import ExactPrompts

FIRST_TOKENS_PER_BYTE = 0.25
"""English text in the usual vocabularies."""
_LOWEST, _HIGHEST = 1 / 32, 1.0
_FADE = 0.98
"""Weight of what was, at each new count: the last fifty matter."""
_PRIOR_BYTES = 2000.0
_MOST_BYTES = 8_000
"""As so long a prompt a longer one counts."""
_MAX_SEEDS = 4096


def passes_over_cache(fields: Mapping[str, Any]) -> bool:
    """Whether engines compute the whole prompt anew, cached or not: for log-probabilities of its tokens (vLLM,
    `skip_reading_prefix_cache` in `vllm/v1/request.py`; SGLang, `logprob_start_len` in `managers/schedule_batch.py`),
    and where the request says so (llama.cpp, `cache_prompt`)."""
    return (
        fields.get("prompt_logprobs") is not None
        or fields.get("cache_prompt") is False
        or (bool(fields.get("echo")) and fields.get("logprobs") is not None)
    )


class PromptReader:
    """One model's. What it has learned outlasts a reload."""

    def __init__(self, model: str, isolate_tenants: bool, upstream_model: str | None = None) -> None:
        """`isolate_tenants`: one tenant's prompts never count as cached for another's. `upstream_model`: what the
        engines call it, where that is another name; models that are the same one to them share what is cached."""
        self._model = model
        self._cached_as = upstream_model or model
        self.isolates = isolate_tenants
        """Whether each tenant has a cache of its own."""
        self._bytes = _PRIOR_BYTES
        self._tokens = _PRIOR_BYTES * FIRST_TOKENS_PER_BYTE
        self._seeds: dict[tuple[str | None, str | None], int] = {}
        self.exact: ExactPrompts | None = None
        """Makes keys over tokens; None where keys over text must do."""

    def configured(self, isolate_tenants: bool, upstream_model: str | None) -> PromptReader:
        """The same reader under other settings."""
        cached_as = upstream_model or self._model
        if (isolate_tenants, cached_as) != (self.isolates, self._cached_as):
            self.isolates, self._cached_as = isolate_tenants, cached_as
            self._seeds.clear()
        return self

    @property
    def tokens_per_byte(self) -> float:
        return self._tokens / self._bytes

    def read(self, request: InferenceRequest, path: str, fields: Mapping[str, Any], tenant: str) -> None:
        """Put the prefix keys and the estimated length into the request. A thread may do it.

        A request that no cache can help has no keys: nothing is cached for it, and that says nothing of the cache.
        """
        if passes_over_cache(fields):
            self.measure(request)
            return
        seed = self.seed(request.adapter, tenant if self.isolates else None)
        if self.exact is not None:
            prefix = self.exact.prefix(self._model, path, fields, seed)
            if prefix is not None:
                request.prefix, request.prompt_tokens = prefix, prefix.total
                return
        parts = prompt_parts(path, fields)
        size = 0
        for part in parts:
            size += len(part)
        tokens = int(size * self._tokens / self._bytes) + 1
        request.prompt_tokens = tokens
        request.prefix = text_prefix(parts, seed, tokens)

    def takes_long(self, request: InferenceRequest) -> bool:
        """Whether `read` would hold up the event loop: a thread should do it."""
        return self.exact is not None and self.exact.needs_thread(self._model, request.prompt_bytes)

    def event_seed(self, adapter: str | None, cache_salt: str | None) -> int | None:
        """The seed of the keys of a block that an engine tells of; None where prompts have no such keys."""
        if self.exact is None or self._model not in self.exact or self.isolates or cache_salt:
            return None
        return self.seed(adapter, None)

    def measure(self, request: InferenceRequest) -> None:
        """Only the length, from the size of the body, for policies that do not ask what is cached."""
        request.prompt_tokens = int(request.prompt_bytes * self._tokens / self._bytes) + 1

    def learn(self, request: InferenceRequest, prompt_tokens: int) -> None:
        """The engine has counted this prompt."""
        prefix = request.prefix
        if prefix is not None and prefix.unit_tokens == 1.0:
            return  # in tokens already
        size = request.prompt_bytes if prefix is None else prefix.total
        if prompt_tokens > 0 and _LOWEST * size <= prompt_tokens <= _HIGHEST * size:
            # One prompt of megabytes, of digits say, must not set the measure for the next hundred of all tenants.
            weight = 1.0 if size <= _MOST_BYTES else _MOST_BYTES / size
            self._bytes = self._bytes * _FADE + size * weight
            self._tokens = self._tokens * _FADE + prompt_tokens * weight

    def seed(self, adapter: str | None, scope: str | None) -> int:
        """What the keys of such prompts begin with."""
        seed = self._seeds.get((adapter, scope))
        if seed is None:
            if len(self._seeds) >= _MAX_SEEDS:
                self._seeds.clear()
            seed = self._seeds[adapter, scope] = seed_of(self._cached_as, adapter=adapter, scope=scope)
        return seed


def read_prompt(order: Order, exchange: Exchange) -> None:
    """Tell the router about the prompt."""
    route, request = order.route, order.request
    if not route.router.wants_prefix:
        route.reader.measure(request)
    elif request.prefix is None:
        route.reader.read(request, order.path, order.body.fields, exchange.tenant)
