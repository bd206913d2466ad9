"""The part of the schema about how many replicas a pool should have, and who sees to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.config.secrets import Secret
from gateway.config.values import DAY_S, HOUR_S, FilePath, Number, Section, Whole

_Seconds = Annotated[Number, Field(ge=0, le=DAY_S)]
_KubeName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
_Usd = Annotated[Number, Field(ge=0, le=1_000_000)]


class KubernetesScale(Section):
    """A workload with the scale subresource; needs the extra `kubernetes` and the right to patch it."""

    kind: Literal["Deployment", "StatefulSet", "LeaderWorkerSet"] = Field(
        default="Deployment", description="What it is. LeaderWorkerSet: for servers that span several nodes."
    )
    name: _KubeName = Field(description="Its name.", examples=["sglang"])
    namespace: _KubeName | None = Field(default=None, description="Null: the gateway's own, else `default`.")
    kubeconfig: FilePath | None = Field(
        default=None, description="Path of a kubeconfig. Null: the service account of the pod, else ~/.kube/config."
    )
    context: Annotated[str, Field(min_length=1, max_length=253)] | None = Field(
        default=None, description="Context of the kubeconfig. Null: its current one."
    )


class CommandScale(Section):
    """A command that sees to it: exit code 0 means that it is done or under way."""

    words: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...], Field(min_length=1)] = Field(
        max_length=100,
        description="The command, in words; {pool}, {count}, {current} and {leave} (names of drained "
        "replicas that should go, with commas) are filled in. No shell.",
        examples=[["/usr/local/bin/resize-group", "{pool}", "{count}"]],
    )
    timeout_s: Annotated[Number, Field(gt=0, le=HOUR_S)] = Field(
        default=60.0, description="Seconds it may take before it is ended."
    )


class WebhookScale(Section):
    """An address that is told, as JSON by POST: pool, count, current, reasons. A 2xx means that it is heard."""

    url: Annotated[str, Field(pattern=r"^https?://[!-~]{1,500}$")] = Field(
        description="The address.", examples=["https://ops.internal/scale"]
    )
    token: Secret | None = Field(
        default=None, description="Bearer token for it, as a reference {env: NAME} or {file: PATH}. Null: none."
    )
    timeout_s: Annotated[Number, Field(gt=0, le=HOUR_S)] = Field(default=10.0, description="Seconds for its answer.")


class Scaling(Section):
    """How many replicas a pool should have. Without a provider it is said, and not acted on."""

    min: Annotated[Whole, Field(ge=0, le=4096)] = Field(
        default=1, description="Never fewer. One: a model that is not there takes minutes to come."
    )
    max: Annotated[Whole, Field(ge=1, le=4096)] = Field(description="Never more.", examples=[8])
    provider: Literal["none", "local", "kubernetes", "command", "webhook"] = Field(
        default="none",
        description="Who acts on it. none: nobody; the count is in /metrics and at /admin/scaling, for KEDA or an HPA. "
        "local: `tidegate fleet up`. kubernetes, command, webhook: as the section of that name says.",
    )
    kubernetes: KubernetesScale | None = Field(default=None, description="For the provider of this name.")
    command: CommandScale | None = Field(default=None, description="For the provider of this name.")
    webhook: WebhookScale | None = Field(default=None, description="For the provider of this name.")
    ttft_target_ms: Annotated[Number, Field(gt=0, le=600_000)] = Field(
        default=2000.0,
        description="Milliseconds to the first token that nine of ten requests should not exceed, "
        "waiting included. Two seconds: people begin to leave.",
    )
    target_use: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.7,
        description="Part of what the replicas can serve that should be in use. 0.7 leaves room for "
        "a burst while another one starts.",
    )
    target_kv: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.85,
        description="Part of the KV cache in use by running requests above which engines begin to "
        "evict and to preempt.",
    )
    tolerance: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.1,
        description="How far demand may be from the target without any change, as a part of it. A tenth, "
        "as Kubernetes' autoscaler.",
    )
    lead_time_s: _Seconds = Field(
        default=300.0,
        description="Seconds from an order to a replica that is ready, until some were seen; then what "
        "most of them took. Demand is foreseen for so long.",
    )
    up_cool_down_s: _Seconds = Field(
        default=0.0, description="Seconds between two steps up. 0: what is under way is counted, so none is needed."
    )
    down_after_s: _Seconds = Field(
        default=600.0,
        description="Seconds for which fewer replicas would have done before one goes. Ten minutes: "
        "what goes takes its cache with it.",
    )
    up_step: Annotated[Number, Field(ge=0.1, le=100)] = Field(
        default=1.0,
        description="Largest step up at once, as a part of what there is; at least four replicas. One: twice as many.",
    )
    down_step: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.25, description="Largest step down at once, as a part of what there is; at least one replica."
    )
    drain_s: _Seconds = Field(
        default=600.0, description="Seconds for the requests of a replica that goes; those that are left are cut."
    )
    usd_per_hour: _Usd = Field(
        default=0.0, description="What a replica costs an hour. 0: unknown; then cost is not weighed."
    )
    max_usd_per_hour: _Usd | None = Field(
        default=None, description="What the pool may cost an hour, which is a ceiling too. Null: as `max` says."
    )
