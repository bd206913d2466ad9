"""The part of the schema about single replicas: where they are, what they run, when they count as well."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from gateway.config.prices import Price
from gateway.config.problems import shown, wrong
from gateway.config.urls import parse_address
from gateway.config.values import (
    DAY_S,
    HOUR_S,
    AdapterName,
    ModelName,
    Number,
    OptionalName,
    Region,
    ReplicaUrl,
    Section,
    Switch,
    Whole,
)

Engine = Literal[
    "sglang",
    "vllm",
    "trtllm",
    "lmdeploy",
    "llamacpp",
    "openai",
    "azure",
    "deepseek",
    "openrouter",
    "baseten",
    "anthropic",
]

_OURS = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "x-request-id",
    }
)


def _key_header_name(value: str) -> str:
    if value.lower() in _OURS - {"authorization"}:
        raise wrong(f"the header {shown(value)} is set by the gateway itself", "write e.g. authorization or x-api-key")
    return value


def _header_name(value: str) -> str:
    if value.lower() in _OURS:
        raise wrong(f"the header {shown(value)} is set by the gateway itself", "take it out; keys belong in api_key")
    return value.lower()


def _zmq(value: str) -> str:
    if not re.fullmatch(r"(tcp|ipc)://[!-~]{1,300}", value):
        raise wrong(f"{shown(value)} is not a ZeroMQ address", "write e.g. tcp://10.0.0.7:5557 or ipc:///run/kv.ipc")
    return value


def _page(value: str) -> str:
    hint = "write e.g. http://10.0.0.7:9400/metrics"
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        raise wrong("this is not a URL that can be read", hint) from None
    if not known or not re.fullmatch(r"[!-~]{1,500}", value):
        raise wrong("this is not a URL that can be read", hint)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise wrong("only host, port and path are wanted in this URL", hint)
    return f"{parts.scheme}://{parts.netloc}{parts.path if parts.path.strip('/') else '/metrics'}"


def _auto_or_zmq(value: str) -> str:
    return value if value == "auto" else _zmq(value)


_Label = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
HeaderName = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}$"), AfterValidator(_header_name)]
HeaderValue = Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,998}[!-~])?$")]


class KeyHeader(Section):
    """How an API wants its key."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$"), AfterValidator(_key_header_name)] = Field(
        default="authorization", description="Name of the header that carries the key."
    )
    scheme: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{0,50}$")] = Field(
        default="Bearer", description="Word before the key, as in `Bearer <key>`. Empty: the key stands alone."
    )


class AdapterFile(Section):
    """A LoRA adapter and where the engines find it."""

    name: AdapterName = Field(description="Name that clients and the engines use.", examples=["support-v3"])
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Path or hub name that the engine can read; the gateway does not open it.",
        examples=["/adapters/support-v3"],
    )


class KvEvents(Section):
    """Where an engine publishes what its KV cache stores and drops."""

    endpoint: Annotated[str, AfterValidator(_auto_or_zmq)] = Field(
        default="auto",
        description="ZeroMQ address, such as tcp://10.0.0.7:5557; of rank 0, rank r is at the port plus r. `auto` asks "
        "the engine, where it says (sglang), and takes only a port on the replica's own host.",
    )
    replay_endpoint: Annotated[str, AfterValidator(_zmq)] | None = Field(
        default=None,
        description="ZeroMQ address where missed events can be asked for. Null: what the engine says, or none.",
    )
    topic: Annotated[str, Field(max_length=200)] = Field(default="", description="Topic to subscribe to. Empty: all.")


class Dcgm(Section):
    """Where NVIDIA's DCGM exporter says how busy a replica's GPUs are. It is asked every 15 s, for `/metrics` alone."""

    url: Annotated[str, AfterValidator(_page)] = Field(
        description="The exporter's page, as http or https URL; without a path it is /metrics.",
        examples=["http://10.0.0.7:9400/metrics"],
    )
    gpus: Annotated[tuple[Annotated[Whole, Field(ge=0, le=255)], ...], Field(min_length=1, max_length=64)] | None = (
        Field(
            default=None,
            description="Numbers of the GPUs that are the replica's, by the label `gpu`. Null: all that the page has.",
            examples=[[0, 1]],
        )
    )
    labels: Mapping[_Label, Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default={},
        max_length=16,
        description="Further labels that the replica's samples have, where one page speaks of several machines or "
        "pods. None by default.",
        examples=[{"Hostname": "gpu-node-3"}],
    )

    @property
    def origin(self) -> str:
        """`scheme://host:port`."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def path(self) -> str:
        """Of the page."""
        return urlsplit(self.url).path


class Health(Section):
    """How the gateway learns that a replica is well. What requests show comes first; probes fill the silence."""

    probe: Switch = Field(
        default=True,
        description="Whether replicas are asked how they are, without a generation. Off: only requests tell.",
    )
    probe_interval_s: Annotated[Number, Field(ge=0.1, le=HOUR_S)] | None = Field(
        default=None,
        description="Seconds between probes of a replica; one worker asks for all. Null: 2 for your own engines, "
        "30 for hosted APIs.",
    )
    load_interval_s: Annotated[Number, Field(ge=0.1, le=HOUR_S)] = Field(
        default=1.0,
        description="Seconds between readings of an engine's load. One: it corrects what the gateway counts itself.",
    )
    timeout_s: Annotated[Number, Field(gt=0, le=HOUR_S)] = Field(
        default=5.0,
        description="Seconds for an engine to answer such a question. Five: the endpoints are cheap, the engine busy.",
    )
    eject_after: Annotated[Whole, Field(ge=1, le=1000)] = Field(
        default=5,
        description="Failed requests in a row after which a replica is left alone. Five, as in Envoy and Finagle.",
    )
    failure_ratio: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.5,
        description="Share of failed requests within 30 s, of ten or more, after which a replica is left alone.",
    )
    ejection_s: Annotated[Number, Field(gt=0, le=HOUR_S)] = Field(
        default=10.0,
        description="Seconds a replica is left alone the first time; longer each time in a row, up to 300. Never more "
        "than half of a pool at once.",
    )
    slow_start_s: Annotated[Number, Field(ge=0, le=HOUR_S)] = Field(
        default=60.0,
        description="Seconds in which a replica that came back gets its full share of work again. Sixty warm a cache.",
    )
    stall_s: Annotated[Number, Field(gt=0, le=DAY_S)] = Field(
        default=30.0,
        description="Seconds without a byte from any request at a replica, nor progress in its own counters, after "
        "which nothing new is sent there. Thirty: long prefills show in the counters of most engines.",
    )


class Replica(Section):
    """One engine process, or one hosted API."""

    url: ReplicaUrl = Field(
        description="Address of the engine: http, https, or http+unix with the socket's path "
        "percent-encoded. "
        "A path before a final /v1 is kept; /v1 itself may be written or left out. A host that ends in a dot is looked "
        "up as it stands, without the system's search domains; the engine is told, and its certificate compared with, "
        "the name without it.",
        examples=["http://127.0.0.1:30000"],
    )
    engine: Engine | None = Field(
        default=None,
        description="What this replica runs. Null: the backend's engine. Replicas of different engines can share a "
        "pool when they serve the same model.",
    )
    upstream_model: ModelName | None = Field(
        default=None,
        description="The name this replica knows the model by. Null: the model's own upstream_model.",
    )
    region: Region | None = Field(
        default=None,
        description="Where the replica runs. Null: unknown, for a single place.",
        examples=["eu-west"],
    )
    name: OptionalName = Field(
        default="",
        description="Name in headers, logs and metrics. Left out or null: `<backend>-<position>`, counted from 0.",
        examples=["pool-0"],
    )
    weight: Number = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Share of the load relative to the other replicas. One: all the same.",
    )
    price: Price | None = Field(
        default=None,
        description="What its tokens cost, where that differs within the pool: the policy `cost` weighs it against "
        "time (models.<name>.ms_per_usd). Null: nothing. What is recorded and budgeted goes by the model's price.",
        examples=[{"input": 0.3, "output": 1.2}],
    )
    max_in_flight: Whole | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Requests this replica may work on at once. Null: no limit here, the engine queues by itself.",
        examples=[64],
    )
    dp_rank: Whole | None = Field(
        default=None,
        ge=0,
        le=1023,
        description="Data-parallel rank to send requests to, for engines that take one (sglang). Null: the engine "
        "chooses. One entry per rank, with the same url, makes ranks replicas of their own.",
    )
    kv_events: KvEvents | None = Field(
        default=None,
        description="Where the engine publishes its KV-cache events (sglang and vllm over ZeroMQ). Null: not read.",
    )

    dcgm: Dcgm | None = Field(
        default=None,
        description="Where NVIDIA's DCGM exporter says how busy the replica's GPUs are. Null: not read.",
    )

    @property
    def origin(self) -> str:
        """`scheme://host:port` with the port always written, or `http+unix://<encoded path>`."""
        return parse_address(self.url).origin

    @property
    def path_prefix(self) -> str:
        """What precedes `/v1` in request paths: empty, or such as `/api`."""
        return parse_address(self.url).path_prefix
