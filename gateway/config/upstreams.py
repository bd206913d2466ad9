"""The part of the schema about models and the backends that serve them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.config.secrets import Secret
from gateway.config.urls import parse_address
from gateway.config.values import (
    DAY_S,
    HOUR_S,
    ModelName,
    Number,
    OptionalName,
    Region,
    ReplicaUrl,
    Section,
    Whole,
)

Engine = Literal["sglang", "vllm", "llamacpp", "openai"]

_Connect = Annotated[Number, Field(gt=0, le=60)]
_Phase = Annotated[Number, Field(gt=0, le=HOUR_S)]
_Total = Annotated[Number, Field(gt=0, le=DAY_S)]

_CONNECT = "Seconds to open a connection to a replica."
_FIRST_TOKEN = "Seconds from sending a streaming request to its first content. Without streaming only `total_s` counts."
_IDLE = "Seconds of silence from the engine once it has begun to answer."
_TOTAL = "Seconds for an exchange from beginning to end, all attempts together."


class Timeouts(Section):
    """How long each phase of an exchange with an engine may take."""

    connect_s: _Connect = Field(
        default=2.0,
        description=f"{_CONNECT} Two allow one lost SYN on a private network; a dead host is left quickly.",
    )
    first_token_s: _Phase = Field(
        default=60.0, description=f"{_FIRST_TOKEN} Sixty cover a long prompt behind a busy queue."
    )
    idle_s: _Phase = Field(
        default=30.0, description=f"{_IDLE} Engines emit many tokens a second, so thirty mean that it hangs."
    )
    total_s: _Total = Field(
        default=600.0, description=f"{_TOTAL} Ten minutes are the default of the OpenAI client libraries."
    )


class ModelTimeouts(Section):
    """One model's exceptions from its backend's timeouts; what is left out is taken from the backend."""

    connect_s: _Connect | None = Field(default=None, description=f"{_CONNECT} Null: the backend's value.")
    first_token_s: _Phase | None = Field(default=None, description=f"{_FIRST_TOKEN} Null: the backend's value.")
    idle_s: _Phase | None = Field(default=None, description=f"{_IDLE} Null: the backend's value.")
    total_s: _Total | None = Field(default=None, description=f"{_TOTAL} Null: the backend's value.")


_Usd = Annotated[Number, Field(ge=0, le=100_000)]


class Price(Section):
    """What a model's tokens cost, in US dollars per million tokens."""

    input: _Usd = Field(default=0.0, description="US dollars per million prompt tokens. Zero: your own hardware.")
    cached_input: _Usd = Field(
        default_factory=lambda validated: validated.get("input", 0.0),
        description="US dollars per million prompt tokens that the engine had in its cache. "
        "Left out: the same as `input`, so that costs are never understated.",
    )
    output: _Usd = Field(default=0.0, description="US dollars per million generated tokens. Zero: your own hardware.")


class Model(Section):
    """A name that clients may ask for, and where its requests go."""

    backend: str = Field(description="Name of the backend that serves this model.", examples=["pool"])
    upstream_model: ModelName | None = Field(
        default=None,
        description="The name the engine knows the model by. Null: the client's name is sent unchanged, "
        "so that the body can be passed on byte for byte.",
    )
    aliases: tuple[ModelName, ...] = Field(
        default=(),
        description="Further names for this model. None by default: every name a client can use is written down.",
        examples=[["gpt-4o-mini"]],
    )
    timeouts: ModelTimeouts = Field(
        default=ModelTimeouts(), description="Exceptions from the backend's timeouts. None by default."
    )
    price: Price | None = Field(
        default=None, description="Price of the model's tokens. Null: unknown, so that no cost is recorded."
    )


class Replica(Section):
    """One engine process, or one hosted API."""

    url: ReplicaUrl = Field(
        description="Address of the engine: http, https, or http+unix with the socket's path "
        "percent-encoded. "
        "A path before a final /v1 is kept; /v1 itself may be written or left out.",
        examples=["http://127.0.0.1:30000"],
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
    max_in_flight: Whole | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Requests this replica may work on at once. Null: no limit here, the engine queues by itself.",
        examples=[64],
    )

    @property
    def origin(self) -> str:
        """`scheme://host:port` with the port always written, or `http+unix://<encoded path>`."""
        return parse_address(self.url).origin

    @property
    def path_prefix(self) -> str:
        """What precedes `/v1` in request paths: empty, or such as `/api`."""
        return parse_address(self.url).path_prefix


class Connections(Section):
    """The connections kept to each replica."""

    max: Whole = Field(
        default=1024,
        ge=1,
        le=65535,
        description="Connections to one replica at once. 1024 is above what an engine runs at a time; "
        "mind the limit of open files when there are many replicas.",
    )
    idle_s: Number = Field(
        default=3.0,
        gt=0,
        le=HOUR_S,
        description="Seconds an unused connection is kept. Three stay below the five after which uvicorn, "
        "which most engines use, closes it from its side.",
    )


class Backend(Section):
    """A pool of interchangeable replicas of one engine."""

    engine: Engine = Field(
        description="What the replicas run: sglang, vllm, llamacpp, or openai for any other OpenAI-compatible API.",
        examples=["sglang"],
    )
    api_key: Secret | None = Field(
        default=None,
        description="Key sent to the replicas as a bearer token, as a reference {env: NAME} or {file: PATH}. "
        "Null: none is sent; engines on a private network usually want none.",
    )
    replicas: tuple[Replica, ...] = Field(
        min_length=1,
        max_length=4096,
        description="The engine processes of this pool; at least one.",
        examples=[[{"url": "http://127.0.0.1:30000"}]],
    )
    timeouts: Timeouts = Field(default=Timeouts(), description="How long each phase of an exchange may take.")
    connections: Connections = Field(default=Connections(), description="The connections kept to each replica.")
    max_response_bytes: Whole = Field(
        default=67_108_864,
        ge=1024,
        le=4_294_967_296,
        description="Largest answer without streaming, in bytes. 64 MiB hold long answers with log "
        "probabilities "
        "and keep one broken engine from filling the memory.",
    )
