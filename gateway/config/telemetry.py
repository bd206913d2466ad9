"""The part of the schema about what is told to OpenTelemetry: traces of requests, metrics, where they go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gateway.config.problems import shown, wrong
from gateway.config.replicas import HeaderName
from gateway.config.secrets import Secret
from gateway.config.urls import parse_address
from gateway.config.values import Name, Number, Section, Switch, Whole

_ATTRIBUTE = r"^[a-z][a-z0-9_.-]{0,127}$"


def _collector(text: str) -> str:
    if text.startswith(("unix:", "http+unix:")):
        raise wrong(
            f"{shown(text)} is a socket, which OTLP over HTTP has no URL for", "write e.g. http://127.0.0.1:4318"
        )
    bare = text.rstrip("/")
    if re.search(r"/v1/(traces|metrics|logs)$", bare):
        raise wrong(
            f"{shown(text)} goes too far: the gateway adds /v1/traces and /v1/metrics itself",
            "write the base URL, e.g. http://127.0.0.1:4318",
        )
    return parse_address(text).url


_CollectorUrl = Annotated[str, AfterValidator(_collector)]
_AttributeName = Annotated[str, Field(pattern=_ATTRIBUTE)]
_AttributeValue = Annotated[str, Field(min_length=1, max_length=1000)]


class Telemetry(Section):
    """What goes to an OpenTelemetry collector. Without an endpoint nothing does, and no library of its is loaded."""

    endpoint: _CollectorUrl | None = Field(
        default=None,
        description="Base URL of the collector, for OTLP over HTTP (protobuf); /v1/traces and /v1/metrics are added. "
        "Null: nothing is sent. OTEL_EXPORTER_OTLP_ENDPOINT does not stand in for it: a platform that sets that for "
        "every container must not make the gateway send what is asked of it.",
        examples=["http://127.0.0.1:4318"],
    )
    token: Secret | None = Field(
        default=None,
        description="Bearer token for the collector, as a reference {env: NAME} or {file: PATH}. Null: none is sent, "
        "unless OTEL_EXPORTER_OTLP_HEADERS has one.",
    )
    headers: Mapping[HeaderName, Secret] = Field(
        default={},
        description="Further headers for the collector, each a reference {env: NAME} or {file: PATH}, such as an API "
        "key. Over those of OTEL_EXPORTER_OTLP_HEADERS; none by default.",
        examples=[{"x-api-key": {"env": "COLLECTOR_KEY"}}],
    )
    timeout_s: Annotated[Number, Field(gt=0, le=60)] | None = Field(
        default=None,
        description="Seconds that one export may take, with what is tried again. Null: OTEL_EXPORTER_OTLP_TIMEOUT, "
        "else 10.",
    )
    service_name: Name | None = Field(
        default=None, description="`service.name` of what is sent. Null: OTEL_SERVICE_NAME, else tidegate."
    )
    resource: Mapping[_AttributeName, _AttributeValue] = Field(
        default={},
        max_length=100,
        description="Further resource attributes, over those of OTEL_RESOURCE_ATTRIBUTES. None by default.",
        examples=[{"deployment.environment.name": "production"}],
    )
    semconv: Literal["1.41", "1.36"] = Field(
        default="1.41",
        description="Version of the conventions for generative AI whose names are used. 1.41: the last one in "
        "OpenTelemetry's main repository; 1.36 for back ends that look for gen_ai.system.",
    )
    traces: Switch = Field(
        default=True, description="Whether traces are sent. On: it is what an endpoint is given for."
    )
    ratio: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.1,
        description="Share of the requests that are traced, by trace id. A tenth is enough to see what is usual.",
    )
    trust_parent: Switch = Field(
        default=False,
        description="Whether a caller's own decision to sample (the flag in `traceparent`) holds. Off: its trace is "
        "joined all the same, but whether it is recorded is drawn here, so that no client decides how much is.",
    )
    keep_unusual: Switch = Field(
        default=True,
        description="Whether requests that failed through no fault of the client's, or were retried, gone on with or "
        "hedged, are kept though the ratio left them out. On: they are what traces are read for.",
    )
    keep_slower_than_s: Annotated[Number, Field(gt=0, le=3600)] | None = Field(
        default=30.0,
        description="Seconds from which a request is kept though the ratio left it out. Null: none is for that. 30 s "
        "are what the slowest hundredth should stay below.",
    )
    max_spans_per_s: Annotated[Whole, Field(ge=1, le=100_000)] = Field(
        default=500,
        description="Spans that a worker sends in a second at most, twice as many at once; the rest is dropped and "
        "counted. 500 cost about a twentieth of a core.",
    )
    propagate: Literal["own", "all", "none"] = Field(
        default="own",
        description="Which servers get `traceparent` with the attempt's span as parent: engines of one's own, rented "
        "APIs as well, or none. Own: what a trace id says of you is nobody else's business.",
    )
    response_header: Switch = Field(
        default=False,
        description="Whether replies say their trace in `traceresponse`. Off: clients are told nothing they did not "
        "ask for.",
    )
    capture_max_bytes: Annotated[Whole, Field(ge=256, le=1_048_576)] = Field(
        default=16_384,
        description="Bytes of a request's text and of its answer's that are kept, each, for keys with capture_content. "
        "16 KiB are four pages.",
    )
    metrics: Switch = Field(
        default=False,
        description="Whether the figures of /metrics are sent as well. Off: most have Prometheus fetch them.",
    )
    metrics_interval_s: Annotated[Number, Field(ge=1, le=3600)] = Field(
        default=60.0, description="Seconds between two reports of metrics. A minute is OpenTelemetry's own default."
    )
