"""The shadow of a model's policy at one worker: asked about some of the requests, after they were sent; counted.

Bounded in every way: so many requests a second, one at a time between two turns of the event loop, and numbers per
model and per replica of its pool only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, Metric

from gateway.config import Shadow as ShadowSettings
from routing.policies import make_policy
from routing.router import PoolState
from routing.shadow import Beside, Comparison
from routing.types import InferenceRequest, Replica

if TYPE_CHECKING:
    from gateway.fleet import Fleet, Pool

logger = logging.getLogger("tidegate")


@dataclass(slots=True)
class Numbers:
    """What has come of the comparisons, since the shadow began."""

    compared: int = 0
    same: int = 0
    other: int = 0
    none: int = 0
    """The shadow would have refused."""
    failed: int = 0
    """It raised something, or chose what it could not."""
    passed_over: int = 0
    """Requests that it was not asked about: there were more a second than it may have."""
    with_keys: int = 0
    """Of those compared, with a prompt of which is known what is cached."""
    prompt_tokens: int = 0
    """Of those."""
    real_cached_tokens: int = 0
    shadow_cached_tokens: int = 0
    real_ttft_ms: float = 0.0
    """Sums over the requests for which both would have been sent."""
    shadow_ttft_ms: float = 0.0
    decide_s: float = 0.0
    went: dict[str, int] = field(default_factory=dict)
    """By replica: requests that were sent there, of those compared."""
    would_go: dict[str, int] = field(default_factory=dict)


class ModelShadow:
    """One model's. Used by the event loop of its worker alone."""

    def __init__(self, settings: ShadowSettings, pool: Pool) -> None:
        self.policy = settings.policy
        self.began_unix_s = time.time()
        self.numbers = Numbers()
        self._per_s = settings.per_s
        self._state: PoolState = pool.routing
        self._beside = Beside(make_policy(settings.policy, Random()), pool.routing, Random())
        self._left = settings.per_s
        self._at = time.monotonic()
        self._said = False

    @property
    def wants_prefix(self) -> bool:
        return self._beside.wants_prefix

    def goes_on(self, settings: ShadowSettings, pool: Pool) -> bool:
        """Whether this one will do for these settings, with all that it has counted."""
        if self.policy != settings.policy or self._state is not pool.routing:
            return False
        self._per_s = settings.per_s
        return True

    def sees(self, request: InferenceRequest, pool: Pool, real: Replica, now: float) -> None:
        """A request is about to be dispatched: ask about it afterwards, if it is its turn."""
        left = self._left = min(max(self._per_s, 1.0), self._left + (now - self._at) * self._per_s)
        self._at = now
        if left < 1.0 or pool.routing is not self._state:
            self.numbers.passed_over += 1
            return
        self._left = left - 1.0
        session = None if request.session is None else self._state.sessions.get(request.session)
        # By then the request is on its way: what is written to a connection is sent before anything is awaited.
        asyncio.get_running_loop().call_soon(self._compare, request, pool, real, now, session)

    def _compare(
        self, request: InferenceRequest, pool: Pool, real: Replica, now: float, session: Replica | None
    ) -> None:
        begun, failures = time.perf_counter(), self._beside.failures
        try:
            found = self._beside.compare(request, pool.replicas, real, now, session)
            if self._beside.failures > failures:
                self.numbers.failed += 1
            else:
                self._count(found, request, real)
        except Exception:  # one of the operator's own may raise anything; the requests must not feel it
            self.numbers.failed += 1
            if not self._said:
                self._said = True
                logger.exception("the shadow policy %s fails; said once", self.policy)
        self.numbers.decide_s += time.perf_counter() - begun

    def _count(self, found: Comparison, request: InferenceRequest, real: Replica) -> None:
        numbers = self.numbers
        numbers.compared += 1
        numbers.went[real.name] = numbers.went.get(real.name, 0) + 1
        if found.chosen is None or found.ttft_ms is None:
            numbers.none += 1
            return
        if found.same:
            numbers.same += 1
        else:
            numbers.other += 1
        numbers.would_go[found.chosen.name] = numbers.would_go.get(found.chosen.name, 0) + 1
        numbers.real_ttft_ms += found.real_ttft_ms
        numbers.shadow_ttft_ms += found.ttft_ms
        if found.cached_tokens is not None and found.real_cached_tokens is not None:
            numbers.with_keys += 1
            numbers.prompt_tokens += request.prompt_tokens
            numbers.shadow_cached_tokens += found.cached_tokens
            numbers.real_cached_tokens += found.real_cached_tokens

    def state(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "per_s": self._per_s,
            "began_unix_s": round(self.began_unix_s, 3),
            "numbers": asdict(self.numbers),
        }


def model_shadow(settings: ShadowSettings | None, pool: Pool, previous: ModelShadow | None) -> ModelShadow | None:
    """The shadow that a model's settings ask for; one that stays the same goes on counting."""
    if settings is None:
        return None
    if previous is not None and previous.goes_on(settings, pool):
        return previous
    return ModelShadow(settings, pool)


def merged(states: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    """All workers' numbers as one; None where no worker has a shadow. Those of another policy than the first one's are
    left out: that worker has yet to hear of the change."""
    if not states:
        return None
    alike = [each for each in states if each["policy"] == states[0]["policy"]]
    total: dict[str, Any] = asdict(Numbers())
    for each in alike:
        for name, value in each["numbers"].items():
            if isinstance(value, Mapping):
                for replica, count in value.items():
                    total[name][replica] = total[name].get(replica, 0) + count
            else:
                total[name] += value
    return {
        "policy": alike[0]["policy"],
        "per_s": alike[0]["per_s"],
        "began_unix_s": min(each["began_unix_s"] for each in alike),
        "workers": len(alike),
        **_ratios(total),
        "numbers": total,
    }


def _ratios(total: Mapping[str, Any]) -> dict[str, Any]:
    decided = total["same"] + total["other"]

    def share(count: float, of: float, digits: int = 4) -> float | None:
        return round(count / of, digits) if of else None

    return {
        "agreement": share(total["same"], total["compared"]),
        "ttft_ms": {
            "real": share(total["real_ttft_ms"], decided, 3),
            "shadow": share(total["shadow_ttft_ms"], decided, 3),
        },
        "cached_share": {
            "real": share(total["real_cached_tokens"], total["prompt_tokens"]),
            "shadow": share(total["shadow_cached_tokens"], total["prompt_tokens"]),
        },
        "decide_us": share(total["decide_s"] * 1e6, total["compared"], 1),
    }


def shadow_families(fleet: Fleet) -> Iterator[Metric]:
    """Metrics of all shadows. Labels are models and policies of the configuration."""
    decisions = CounterMetricFamily(
        "tidegate_shadow_decisions",
        "Requests that a shadow policy was asked about, by whether it chose the same replica.",
        labels=["model", "policy", "result"],
    )
    cached = CounterMetricFamily(
        "tidegate_shadow_cached_tokens",
        "Prompt tokens believed to be cached where requests went, and where the shadow policy would have sent them.",
        labels=["model", "policy", "choice"],
    )
    ttft = CounterMetricFamily(
        "tidegate_shadow_predicted_ttft_seconds",
        "Predicted time to first token, summed, of where requests went and of where the shadow policy would have sent "
        "them.",
        labels=["model", "policy", "choice"],
    )
    for name, route in fleet.models.items():
        shadow = route.shadow
        if shadow is None or name != route.name:
            continue
        numbers, labels = shadow.numbers, [name, shadow.policy]
        for result in ("same", "other", "none", "failed", "passed_over"):
            decisions.add_metric([*labels, result], getattr(numbers, result))
        cached.add_metric([*labels, "real"], numbers.real_cached_tokens)
        cached.add_metric([*labels, "shadow"], numbers.shadow_cached_tokens)
        ttft.add_metric([*labels, "real"], numbers.real_ttft_ms / 1000)
        ttft.add_metric([*labels, "shadow"], numbers.shadow_ttft_ms / 1000)
    return iter((decisions, cached, ttft))
