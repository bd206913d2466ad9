"""The part of the schema about models and the backends that serve them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from gateway.config.discovery import Discovery
from gateway.config.fallbacks import FallbackEntry, Hedge
from gateway.config.launch import Launch
from gateway.config.limits import LimitBlock, Queue
from gateway.config.prices import ExchangeRates, Price
from gateway.config.replicas import AdapterFile, Engine, HeaderName, HeaderValue, Health, KeyHeader, Replica
from gateway.config.scaling import Scaling
from gateway.config.secrets import Secret
from gateway.config.shadow import Shadow
from gateway.config.spill import Spill
from gateway.config.tls import Tls
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
from gateway.config.warm_up import WarmUp

_Connect = Annotated[Number, Field(gt=0, le=60)]
_Phase = Annotated[Number, Field(gt=0, le=HOUR_S)]
_Total = Annotated[Number, Field(gt=0, le=DAY_S)]

_MediaHost = Annotated[str, Field(pattern=r"^(\*|\.?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)$")]
_FieldName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]

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
    policy: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        default="cost",
        description="How a replica is chosen: a policy's name, or `package.module:attribute` for one of your own. "
        "cost: the replica where the request is predicted to take the fewest milliseconds.",
        examples=["least_outstanding"],
    )
    shadow: Shadow | None = Field(
        default=None,
        description="A policy that decides beside `policy` and sends nothing, to see what it would do. Null: none.",
    )
    ms_per_usd: ExchangeRates = Field(
        default=ExchangeRates(),
        description="What a dollar is worth in time, where replicas of the pool have different prices.",
    )
    spill: Spill | None = Field(
        default=None,
        description="Where its requests go when the model's own replicas would keep them waiting for too long. Null: "
        "nowhere.",
    )
    fallbacks: tuple[FallbackEntry, ...] = Field(
        default=(),
        max_length=16,
        description="Who is asked, in this order, when the model's own replicas cannot answer: names of other models, "
        "or the same model at other backends. None by default: nobody gets another model than the one asked for "
        "unless you say so.",
        examples=[["chat-small", {"backend": "rented"}]],
    )
    hedge: Hedge | None = Field(
        default=None,
        description="When a short prompt whose first token is late is sent to a second replica too. Null: never.",
    )
    limits: LimitBlock = Field(default=LimitBlock(), description="The model as a whole, all tenants together.")
    tenant_limits: LimitBlock = Field(default=LimitBlock(), description="Each tenant's use of this model.")
    tokenizer: FilePath | None = Field(
        default=None,
        description="Path of the model's tokenizer.json, to count prompts exactly; needs the extra `tokenizer`. Null: "
        "prompts are estimated from their length by what the model's own counts have shown, which costs far less.",
        examples=["/models/chat/tokenizer.json"],
    )
    chat_template: FilePath | None = Field(
        default=None,
        description="Path of the model's chat template (Jinja): with `tokenizer`, prompts are recognised by their "
        "tokens instead of their text. Null: chat_template.jinja or tokenizer_config.json beside the tokenizer; where "
        "there is neither, text is compared.",
        examples=["/models/chat/chat_template.jinja"],
    )
    continuation: Switch = Field(
        default=False,
        description="Whether a stream whose replica dies in the middle is gone on with at another one, which is sent "
        "the text so far as the beginning of its answer. False: it ends with an error event, since what follows may be "
        "other words than the first replica's would have been. docs/reliability.md says what it takes.",
    )
    isolate_tenants: Switch = Field(
        default=False,
        description="Whether no tenant's cached prompts count for another's. False: whoever sends the same prompt may "
        "share what is cached; true where the engines keep tenants apart themselves, or where nobody should learn from "
        "the speed of an answer what others have asked.",
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


class Retries(Section):
    """How much a pool may be asked again; each worker process counts for itself."""

    share: Number = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Retries for each request of the last ten seconds. A tenth keeps a pool that fails everything from "
        "being asked twice as much for it. Requests that were under way when their replica died move without charge.",
    )
    per_s: Number = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Retries a second on top, so that a quiet pool has some; ten seconds' worth can be used at once.",
    )
    attempts: Whole = Field(
        default=3,
        ge=1,
        le=10,
        description="How often one request is sent at most. Replicas that are not there do not count, nor do keys that "
        "are refused.",
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
        description="Whether the replicas are rented: asked seldom how they are, and asked again no more than once for "
        "an answer that may have been billed. Null: as the engine is; openai counts as your own, so set it for a "
        "hosted API.",
    )
    api_key: Secret | None = Field(
        default=None,
        description="Key sent to the replicas as a bearer token, as a reference {env: NAME} or {file: PATH}. "
        "Null: none is sent; engines on a private network usually want none.",
    )
    api_keys: tuple[Secret, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="Several keys instead of one api_key, each as a reference. The first is used until it is refused "
        "or limited (401, 402, 403, 429), then the next: not in turn, since providers cache prompts by account. Null: "
        "api_key alone.",
        examples=[[{"env": "FIRST_KEY"}, {"file": "/run/secrets/second_key"}]],
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
        description="LoRA adapters that the gateway has replicas load, where the engine can be told to. Adapters "
        "that the engines load by themselves need no entry.",
        examples=[[{"name": "support-v3", "path": "/adapters/support-v3"}]],
    )
    adapters_load: Literal["auto", "always", "on_demand"] = Field(
        default="auto",
        description="When they are loaded. always: at every replica from its start, and never dropped. on_demand: "
        "where a request is sent that wants one, in place of the one unused for longest. auto: from the start at "
        "replicas with slots for all of them, which costs no request any time; on demand at the others.",
        examples=["on_demand"],
    )
    adapter_slots: Whole | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Adapters that a replica holds at once. Null: as many as its engine says; engines that do not say "
        "are taken to have room for all.",
        examples=[8],
    )
    health: Health = Field(default=Health(), description="When a replica counts as well, and when it is left alone.")
    replicas: tuple[Replica, ...] = Field(
        default=(),
        max_length=4096,
        description="The engine processes of this pool; at least one, unless `discovery` or `launch` says where they "
        "come from.",
        examples=[[{"url": "http://127.0.0.1:30000"}]],
    )
    discovery: Discovery | None = Field(
        default=None, description="Where further replicas are found. Null: there are only those under `replicas`."
    )
    launch: Launch | None = Field(
        default=None,
        description="How `tidegate fleet up` starts servers for this pool, which then register. Null: it starts none.",
    )
    warm_up: WarmUp = Field(
        default=WarmUp(), description="What a replica that is new to the pool gets before its first request."
    )
    scaling: Scaling | None = Field(default=None, description="How many replicas there should be. Null: nobody says.")
    tls: Tls = Field(default=Tls(), description="Certificates for its `https` replicas.")
    timeouts: Timeouts = Field(default=Timeouts(), description="How long each phase of an exchange may take.")
    retries: Retries = Field(
        default=Retries(), description="How much the pool is asked again for requests that failed before an answer."
    )
    connections: Connections = Field(default=Connections(), description="The connections kept to each replica.")
    queue: Queue = Field(default=Queue(), description="Who waits for a full pool, and for how long.")
    remote_media: tuple[_MediaHost, ...] | None = Field(
        default=None,
        max_length=1000,
        description="Hosts from which engines may fetch pictures, sound and video that messages name by URL; `.x.org` "
        "stands for all below x.org, `*` for all. Null: none for your own engines, which stand where clients do not "
        "reach, and all for hosted APIs. Pictures inside of requests (data: URLs) always pass.",
        examples=[["images.example.com"]],
    )
    allow_fields: tuple[_FieldName, ...] = Field(
        default=(),
        max_length=100,
        description="Fields of requests that are refused because they are code or have stopped engines, and that "
        "clients of this pool may set all the same; docs/security.md lists them. None by default.",
        examples=[["mm_processor_kwargs"]],
    )
    max_response_bytes: Whole = Field(
        default=67_108_864,
        ge=1024,
        le=4_294_967_296,
        description="Largest answer without streaming, in bytes. 64 MiB hold long answers with log "
        "probabilities "
        "and keep one broken engine from filling the memory.",
    )
