"""What is known of the policies of each model: in force, in shadow, compared."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any

from gateway.admin.desk import Desk
from gateway.config import Model
from gateway.errors import InvalidRequest, ModelNotFound
from gateway.sources import ask_all
from gateway.steering import compare as comparing
from gateway.steering.errors import ComparisonRunning, NotChangeable, UnknownComparison
from gateway.steering.service import Steering
from gateway.steering.shadow import merged
from routing.policies import POLICY_NAMES

_WORDS = {
    "cost": "the replica with the least predicted cost: wait, prefill, cache, decoding, price",
    "random": "any, by chance",
    "round_robin": "one after the other",
    "least_outstanding": "the one with the fewest requests under way",
    "power_of_two": "the emptier of two drawn by chance",
    "consistent_hash": "always the same one for a beginning of a prompt, or a session",
    "bounded_hash": "the same, until it has too much more than others",
    "sglang_cache_aware": "SGLang's router: the longest match in the cache, unless loads differ too much",
    "sglang_cache_aware_cli": "the same with the values of its command line",
    "dynamo": "NVIDIA Dynamo's formula",
    "llmd": "llm-d's scorers",
    "lmetric": "LMetric: prefill to be done times requests there",
    "aibrix": "AIBrix's prefix-cache policy",
    "vllm_load_aware": "vLLM production-stack's load-aware policy",
    "ttft": "the least predicted time to first token",
    "smg_least_load": "SMG's least load",
    "least_prefill": "the least prefill to be done",
}


class Policies:
    """For the admin process."""

    def __init__(self, desk: Desk, steering: Steering) -> None:
        self._desk = desk
        self._steering = steering
        self._job: comparing.Comparison | None = None

    async def shown(self) -> dict[str, Any]:
        """All models, what their shadows have shown, and the last comparison."""
        answers = await ask_all(self._desk.sources, lambda source: source.policies())
        workers = [found["models"] for _, found in answers if found is not None]
        return {
            "models": [self._model(name, model, workers) for name, model in self._desk.settings.models.items()],
            "policies": [{"name": name, "what": _WORDS.get(name, "")} for name in POLICY_NAMES],
            "version": self._steering.version,
            "comparison": None if self._job is None else self._job.shown(),
            "silent_workers": [index for index, found in answers if found is None],
        }

    def _model(self, name: str, model: Model, workers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        told = [each[name] for each in workers if name in each]
        book = self._steering.overridden()
        return {
            "name": name,
            "policy": model.policy,
            "backend": model.backend,
            "replicas": len(self._desk.settings.backends[model.backend].replicas),
            "overridden": ("models", name, "policy") in book,
            "shadow_overridden": ("models", name, "shadow") in book,
            "shadow": merged([each["shadow"] for each in told if each["shadow"] is not None]),
            "shadow_set": None if model.shadow is None else model.shadow.model_dump(mode="json"),
            "recent_requests": sum(each["recent_requests"] for each in told),
        }

    # -- comparing

    def compare(self, model: str, policies: Sequence[str], wanted: int, by: str) -> comparing.Comparison:
        """Begin a comparison. Raises `GatewayError`."""
        settings = self._desk.settings
        if model not in settings.models:
            known = ", ".join(sorted(settings.models))
            raise ModelNotFound(f"There is no model {model[:200]!r}; there are: {known}.", param="model")
        chosen = list(dict.fromkeys(policies)) or [settings.models[model].policy, "least_outstanding", "round_robin"]
        configured = {each.policy for each in settings.models.values()}
        configured |= {each.shadow.policy for each in settings.models.values() if each.shadow is not None}
        for policy in chosen:
            if policy not in POLICY_NAMES and policy not in configured:
                raise NotChangeable(
                    f"No policy is called {policy[:200]!r}; there are: {', '.join(POLICY_NAMES)}. One of your own has "
                    "to be named in the configuration file first.",
                    param="policies",
                )
        if len(chosen) > comparing.MAX_POLICIES:
            raise InvalidRequest(f"At most {comparing.MAX_POLICIES} policies at once.", param="policies")
        if self._job is not None and self._job.state == "running":
            raise ComparisonRunning("A comparison is running; wait for its end, or cancel it.")
        job = comparing.Comparison(
            f"cmp_{secrets.token_hex(4)}", model, tuple(chosen), by, time.time(), of=len(chosen) * comparing.SEEDS
        )
        job.task = asyncio.get_running_loop().create_task(
            comparing.run(job, self._desk.sources, wanted), name="policy comparison"
        )
        self._job = job
        return job

    def comparison(self) -> comparing.Comparison:
        """The last one. Raises `UnknownComparison`."""
        if self._job is None:
            raise UnknownComparison("Nothing has been compared since this gateway was started.")
        return self._job

    async def cancel(self) -> comparing.Comparison:
        job = self.comparison()
        if job.task is not None and not job.task.done():
            job.task.cancel()
            await asyncio.gather(job.task, return_exceptions=True)
        return job

    async def aclose(self) -> None:
        if self._job is not None:
            await self.cancel()
