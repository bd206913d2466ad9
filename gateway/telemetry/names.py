"""Every name that goes to OpenTelemetry: spans, attributes, events, metrics. Nowhere else is one written.

The conventions for generative AI are not stable. 1.41 is the last version of theirs in OpenTelemetry's main repository
(https://github.com/open-telemetry/semantic-conventions, pull request 3696 moved them to a repository of their own);
1.36 is the last one that said `gen_ai.system`, which many back ends still look for. What they have no name for is
under `tidegate.`, in every version the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Semconv = Literal["1.41", "1.36"]

SCOPE = "tidegate"
"""The instrumentation scope."""

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""`gen_ai.operation.name` by route."""

PROVIDERS = {
    "openai": "openai",
    "anthropic": "anthropic",
    "deepseek": "deepseek",
}
"""`gen_ai.provider.name` by the engine of a backend, where the conventions have a word for it; else the engine's name,
such as `sglang` or `vllm`, for which they have none."""


@dataclass(frozen=True)
class Names:
    """One version of the conventions."""

    schema_url: str
    provider: str
    cache_read: str
    operation: str = "gen_ai.operation.name"
    request_model: str = "gen_ai.request.model"
    stream: str = "gen_ai.request.stream"
    max_tokens: str = "gen_ai.request.max_tokens"
    first_chunk_s: str = "gen_ai.response.time_to_first_chunk"
    input_tokens: str = "gen_ai.usage.input_tokens"
    output_tokens: str = "gen_ai.usage.output_tokens"
    input_messages: str = "gen_ai.input.messages"
    output_messages: str = "gen_ai.output.messages"
    token_type: str = "gen_ai.token.type"
    token_usage: str = "gen_ai.client.token.usage"
    server_duration: str = "gen_ai.server.request.duration"
    server_ttft: str = "gen_ai.server.time_to_first_token"
    error_type: str = "error.type"
    http_method: str = "http.request.method"
    http_route: str = "http.route"
    http_status: str = "http.response.status_code"
    http_request_bytes: str = "http.request.body.size"
    http_response_bytes: str = "http.response.body.size"
    url_path: str = "url.path"
    url_scheme: str = "url.scheme"
    server_address: str = "server.address"
    server_port: str = "server.port"


def names_of(version: Semconv) -> Names:
    """The names that this version of the conventions has."""
    if version == "1.36":
        # It has no word for cached tokens, and `gen_ai.system` for the provider.
        return Names("https://opentelemetry.io/schemas/1.36.0", "gen_ai.system", "tidegate.usage.cached_tokens")
    return Names(
        "https://opentelemetry.io/schemas/1.41.0", "gen_ai.provider.name", "gen_ai.usage.cache_read.input_tokens"
    )


INPUT, OUTPUT = "input", "output"
"""Values of `gen_ai.token.type`."""

TOKEN_BOUNDS = tuple(float(4**power) for power in range(14))
"""Of the conventions: 1, 4, 16 ... 67,108,864."""
DURATION_BOUNDS_S = tuple(0.01 * 2**power for power in range(14))
"""Of the conventions: 0.01 doubling to 81.92."""
TTFT_BOUNDS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Of the conventions."""

# -- Tidegate's own

REQUEST_ID = "tidegate.request.id"
TENANT = "tidegate.tenant"
KEY_ID = "tidegate.key.id"
PRIORITY_CLASS = "tidegate.class"
OUTCOME = "tidegate.outcome"
POOL = "tidegate.pool"
REPLICA = "tidegate.replica"
REGION = "tidegate.region"
ROUTE_REASON = "tidegate.route.reason"
PREDICTED_CACHED = "tidegate.route.predicted_cached_tokens"
PREDICTED_TTFT_MS = "tidegate.route.predicted_ttft_ms"
ATTEMPTS = "tidegate.attempts"
ATTEMPT = "tidegate.attempt.number"
ATTEMPT_CODE = "tidegate.attempt.code"
QUEUE_MS = "tidegate.queue.wait_ms"
QUEUE_POSITION = "tidegate.queue.position"
SPILL = "tidegate.spill.reason"
FALLBACK_FROM = "tidegate.fallback_from"
HEDGED = "tidegate.hedged"
CONTINUATIONS = "tidegate.continuations"
POSSIBLE_DUPLICATE = "tidegate.possible_duplicate"
COST_USD = "tidegate.cost_usd"
USAGE_ESTIMATED = "tidegate.usage.estimated"
CONTENT_EVENTS = "tidegate.content_events"
KEPT = "tidegate.sampling.kept"
"""Why a span was kept: `sampled`, or one of `tracing.unusual`."""
TRUNCATED = "tidegate.content.truncated"
WORKER = "tidegate.worker"

EVENT_READ = "tidegate.read"
"""The request's last byte had come."""
EVENT_QUEUED = "tidegate.queued"
EVENT_ADMITTED = "tidegate.admitted"
EVENT_DECIDED = "tidegate.decided"
EVENT_CONNECTED = "tidegate.connected"
EVENT_SENT = "tidegate.sent"
EVENT_FIRST_CONTENT = "tidegate.first_content"
EVENT_END = "tidegate.end"

RESPONSE_HEADER = b"traceresponse"
"""Of the W3C's draft of level 2: which trace the response belongs to."""


def span_name(route: str) -> str:
    """Of the request: method and route, as the conventions for HTTP want it."""
    return f"POST {route}"


def attempt_name(operation: str, model: str) -> str:
    """Of an attempt, as the conventions for generative AI want it."""
    return f"{operation} {model}" if model else operation


def provider_of(engine: str, known: Mapping[str, str] = PROVIDERS) -> str:
    """`gen_ai.provider.name` of a backend whose `engine` is this."""
    return known.get(engine, engine)
