"""The part of the schema about models and the backends that serve them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from gateway.config.limits import LimitBlock, Queue
from gateway.config.replicas import AdapterFile, Engine, HeaderName, HeaderValue, Health, KeyHeader, Replica
from gateway.config.secrets import Secret
from gateway.config.values import (
    DAY_S,
    HOUR_S,
    AdapterName,
    FilePath,
    ModelName,
    Number,
    Section,
    Switch,
    Whole,
)

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
    cache_write: _Usd = Field(
        default_factory=lambda validated: validated.get("input", 0.0),
        description="US dollars per million prompt tokens written to a cache that charges for it (Anthropic). "
        "Left out: the same as `input`.",
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
    adapter: AdapterName | None = Field(
        default=None,
        description="LoRA adapter that answers for this model, addressed in each engine's own way. Null: the base "
        "model. A client can also ask for `<model>:<adapter>` without an entry here.",
        examples=["support-v3"],
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
    limits: LimitBlock = Field(default=LimitBlock(), description="The model as a whole, all tenants together.")
    tenant_limits: LimitBlock = Field(default=LimitBlock(), description="Each tenant's use of this model.")
    tokenizer: FilePath | None = Field(
        default=None,
        description="Path of the model's tokenizer.json, to count prompts exactly; needs the extra `tokenizer`. Null: "
        "prompts are estimated from their length by what the model's own counts have shown, which costs far less.",
        examples=["/models/chat/tokenizer.json"],
    )


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
        description="What the replicas run, or whose API it is; openai stands for anything else that is compatible "
        "with OpenAI's. docs/engines.md says what each one offers.",
        examples=["sglang"],
    )
    hosted: Switch | None = Field(
        default=None,
        description="Whether the replicas are rented: asked seldom how they are, and never asked twice for an answer "
        "that may have been billed. Null: as the engine is; openai counts as your own, so set it for a hosted API.",
    )
    api_key: Secret | None = Field(
        default=None,
        description="Key sent to the replicas as a bearer token, as a reference {env: NAME} or {file: PATH}. "
        "Null: none is sent; engines on a private network usually want none.",
    )
    key_header: KeyHeader | None = Field(
        default=None,
        description="How the key is sent. Null: in the engine's usual way, mostly `authorization: Bearer <key>`.",
    )
    headers: Mapping[HeaderName, HeaderValue] = Field(
        default={},
        description="Further headers for every request to the replicas, such as a referrer that an API asks for. "
        "None by default. Keys belong in api_key.",
        examples=[{"x-title": "Tidegate"}],
    )
    adapters: tuple[AdapterFile, ...] = Field(
        default=(),
        max_length=1000,
        description="LoRA adapters that the gateway has every replica load, where the engine can be told to. Adapters "
        "that the engines load by themselves need no entry.",
        examples=[[{"name": "support-v3", "path": "/adapters/support-v3"}]],
    )
    health: Health = Field(default=Health(), description="When a replica counts as well, and when it is left alone.")
    replicas: tuple[Replica, ...] = Field(
        min_length=1,
        max_length=4096,
        description="The engine processes of this pool; at least one.",
        examples=[[{"url": "http://127.0.0.1:30000"}]],
    )
    timeouts: Timeouts = Field(default=Timeouts(), description="How long each phase of an exchange may take.")
    connections: Connections = Field(default=Connections(), description="The connections kept to each replica.")
    queue: Queue = Field(default=Queue(), description="Who waits for a full pool, and for how long.")
    max_response_bytes: Whole = Field(
        default=67_108_864,
        ge=1024,
        le=4_294_967_296,
        description="Largest answer without streaming, in bytes. 64 MiB hold long answers with log "
        "probabilities "
        "and keep one broken engine from filling the memory.",
    )
