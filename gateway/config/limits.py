"""The part of the schema about who may call, how much, and who waits: keys, tenants, limits, queues, Redis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from gateway.config.secrets import Secret
from gateway.config.values import (
    DAY_S,
    HOUR_S,
    PREFIX,
    AdapterName,
    FilePath,
    ModelName,
    Name,
    Number,
    Region,
    Section,
    Switch,
    Whole,
)
from gateway.limits.sets import LimitSet

PriorityClass = Literal["critical", "standard", "batch", "sheddable"]

DEFAULT_TENANT = "default"
"""The tenant of keys that name none, and of every request where nobody is asked for a key. It always exists."""

MIN_PEPPER_BYTES = 32
"""Of `keys.pepper`: 128 bits, if it was drawn as hexadecimal digits."""
MAX_KEY_BYTES = 1024
"""Of a static key. Nothing longer that a client sends is looked for: keys of ours have 53 bytes."""

_PerMinute = Annotated[Whole, Field(ge=1, le=1_000_000_000)]
_Usd = Annotated[Number, Field(gt=0, le=1_000_000_000)]
_Metadata = Mapping[
    Annotated[str, Field(min_length=1, max_length=64)],
    Annotated[str, Field(max_length=512)],
]


class LimitBlock(Section):
    """What one holder may use. Null: no limit of that kind here, or the one that it inherits."""

    requests_per_minute: _PerMinute | None = Field(default=None, description="Requests a minute. Null: no limit.")
    input_tokens_per_minute: _PerMinute | None = Field(
        default=None, description="Prompt tokens a minute. Null: no limit."
    )
    output_tokens_per_minute: _PerMinute | None = Field(
        default=None, description="Generated tokens a minute. Null: no limit."
    )
    tokens_per_minute: _PerMinute | None = Field(
        default=None, description="Tokens a minute, prompt and output together. Null: no limit."
    )
    concurrent_requests: Annotated[Whole, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="Requests under way at once. Null: no limit."
    )
    usd_per_day: _Usd | None = Field(
        default=None,
        description="US dollars per calendar day (UTC), by the prices of the models. Null: no limit.",
    )
    usd_per_month: _Usd | None = Field(
        default=None,
        description="US dollars per calendar month (UTC), by the prices of the models. Null: no limit.",
    )
    burst_s: Annotated[Number, Field(ge=0.1, le=60)] | None = Field(
        default=None,
        description="Seconds' worth of a rate that may come at once. Null: 10, so that no minute sees more than 1.17 "
        "times the limit; for tokens 60 in hard mode and 30 with strict_window, so that large requests still pass.",
    )
    strict_window: Switch | None = Field(
        default=None,
        description="Never more than the limit in any 60 seconds, for which the sustained rate is lowered by the "
        "burst. Null: no; the limit is what can be sustained.",
    )
    hard_tokens: Switch | None = Field(
        default=None,
        description="Reserve all the tokens that a request could use instead of those it is expected to, so that a "
        "token limit is never overshot. Null: no; that would admit a fraction of what most clients really use.",
    )
    shadow: Switch | None = Field(
        default=None,
        description="Judge and count, but never refuse: to try a limit out. Null: no; limits limit.",
    )

    def limit_set(self) -> LimitSet:
        """The same as the rest of the gateway holds it."""
        return LimitSet(**{name: getattr(self, name) for name in LimitSet.__struct_fields__})


class DefaultLimits(Section):
    """Limits of every key, tenant and user that has none of its own, field by field."""

    key: LimitBlock = Field(default=LimitBlock(), description="For each key.")
    tenant: LimitBlock = Field(default=LimitBlock(), description="For each tenant, all its keys together.")
    user: LimitBlock = Field(
        default=LimitBlock(), description="For each end user (`user` or `safety_identifier`) of a tenant."
    )


class Tenant(Section):
    """Whose keys they are: a team, a customer, an application. The database's values stand in place of these."""

    weight: Annotated[Number, Field(ge=0.01, le=1000)] = Field(
        default=1.0,
        description="Share of a busy pool relative to the other tenants'. One: all the same.",
    )
    limits: LimitBlock = Field(default=LimitBlock(), description="All of the tenant's requests together.")
    user_limits: LimitBlock = Field(default=LimitBlock(), description="Each of the tenant's end users.")
    model_limits: Mapping[ModelName, LimitBlock] = Field(
        default={}, description="The tenant's use of single models, by name of the model."
    )
    metadata: _Metadata = Field(
        default={}, description="The operator's own notes, names and texts. None by default.", examples=[{"team": "x"}]
    )


class StaticKey(Section):
    """An API key from the file, for small set-ups."""

    name: Name = Field(description="Its name in logs and metrics: `static:<name>`.", examples=["laptop"])
    key: Secret = Field(
        description="The key, 16 bytes to 1 KiB, as a reference {env: NAME} or {file: PATH}. Any text will do; "
        "`openssl rand -hex 32` makes one."
    )
    tenant: Name = Field(
        default=DEFAULT_TENANT,
        description="Whose key it is: a name under tenants. `default` always exists.",
    )
    models: tuple[ModelName, ...] | None = Field(
        default=None, description="Models that it may use, by name. Null: all.", examples=[["chat"]]
    )
    adapters: tuple[AdapterName, ...] | None = Field(
        default=None, description="LoRA adapters that it may use. Null: all."
    )
    regions: tuple[Region, ...] = Field(
        default=(), description="The only regions its requests may be served in. Empty: any."
    )
    priority_class: PriorityClass = Field(
        default="standard",
        alias="class",
        description="How urgent its requests are when a pool is full. Standard: room is left above and below.",
    )
    deadline_ms: Annotated[Whole, Field(ge=1, le=DAY_S * 1000)] | None = Field(
        default=None,
        description="Milliseconds its requests may take when they do not say so themselves. Null: the model's "
        "timeouts alone.",
    )
    max_output_tokens: Annotated[Whole, Field(ge=1, le=10_000_000)] | None = Field(
        default=None,
        description="Most tokens that a request may ask for, and what hard mode reserves for one that names none. "
        "Null: no limit.",
    )
    limits: LimitBlock = Field(default=LimitBlock(), description="The key's own limits.")
    metadata: _Metadata = Field(
        default={}, description="The operator's own notes, names and texts. None by default.", examples=[{"owner": "x"}]
    )
    capture_content: Switch = Field(
        default=False,
        description="Whether the texts of its requests and their answers go into their traces, where telemetry is "
        "configured. Off: what people write is nobody's to keep unasked.",
    )


class Keys(Section):
    """API keys, where `auth` is `keys`. Most live in the database; a few may stand here."""

    pepper: Secret | None = Field(
        default=None,
        description="What the database's digests of keys are made with, at least 32 bytes, as a reference {env: NAME} "
        "or {file: PATH}. Every gateway needs the same one, and without it no key is known any more. Null: one that "
        "is made at the first start and kept beside the SQLite file.",
    )
    stale_s: Annotated[Number, Field(ge=1, le=DAY_S)] = Field(
        default=900.0,
        description="Seconds for which known keys are served while the database cannot be read. Fifteen minutes "
        "outlast a restart of it; a revocation may stay unknown for as long.",
    )
    static: tuple[StaticKey, ...] = Field(
        default=(),
        max_length=1000,
        description="Keys from this file. None by default.",
        examples=[[{"name": "laptop", "key": {"env": "LAPTOP_KEY"}}]],
    )


class Redis(Section):
    """How to speak to the Redis that `store` names."""

    username: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="User of Redis's access control list. Null: the default user."
    )
    password: Secret | None = Field(
        default=None,
        description="Its password, as a reference {env: NAME} or {file: PATH}. Null: none is sent.",
    )
    sentinel_password: Secret | None = Field(
        default=None,
        description="Password of the Sentinels, as a reference {env: NAME} or {file: PATH}. Null: none is sent.",
    )
    ca_file: FilePath | None = Field(
        default=None,
        description="File of the certificates that a `rediss` server's is checked against. Null: the system's.",
        examples=["/etc/ssl/redis-ca.pem"],
    )
    cert_file: FilePath | None = Field(
        default=None,
        description="File of the certificate that the gateway shows to a `rediss` server. Null: it shows none.",
        examples=["/etc/ssl/gateway.pem"],
    )
    key_file: FilePath | None = Field(
        default=None,
        description="File of that certificate's private key, without a password. Null: none; the two come together.",
        examples=["/etc/ssl/gateway.key"],
    )
    timeout_ms: Annotated[Whole, Field(ge=1, le=10_000)] = Field(
        default=50,
        description="Milliseconds for Redis to answer. Fifty are a hundred times what it takes; a request that waits "
        "longer is admitted by this gateway's own share of the limits.",
    )
    connections: Annotated[Whole, Field(ge=1, le=64)] = Field(
        default=2,
        description="Connections from each worker. Two: requests share pipelines, and one connection may be stuck.",
    )
    prefix: Annotated[str, Field(pattern=PREFIX)] = Field(
        default="tidegate",
        description="Beginning of every key in Redis. Change it where two fleets share one Redis.",
    )


_Share = Annotated[Whole, Field(ge=1, le=100)]


class Shares(Section):
    """What each class is guaranteed of a full pool, in percent. What one does not use, the others borrow."""

    critical: _Share = Field(default=50, description="Percent for `critical`. Half: people wait for these.")
    standard: _Share = Field(default=30, description="Percent for `standard`.")
    batch: _Share = Field(default=15, description="Percent for `batch`. Enough that jobs always move.")
    sheddable: _Share = Field(default=5, description="Percent for `sheddable`. The least that is not starvation.")


class Queue(Section):
    """Who waits for a full pool, and for how long."""

    enabled: Switch | None = Field(
        default=None,
        description="Whether requests wait here for a place instead of inside the engines. Null: where the store can "
        "carry it (one worker, or Redis) and some capacity of the pool is known.",
    )
    shares: Shares = Field(default=Shares(), description="What each class is guaranteed.")
    max_waiting: Annotated[Whole, Field(ge=1, le=1_000_000)] = Field(
        default=1024,
        description="Requests that may wait at once; `sheddable` ones may only take half of that. 1024 are more than "
        "a pool serves within max_wait_s, and little memory.",
    )
    max_waiting_per_tenant: Annotated[Whole, Field(ge=1, le=1_000_000)] = Field(
        default=256,
        description="Requests of one tenant that may wait at once. A quarter: one tenant cannot fill the queue.",
    )
    max_wait_s: Annotated[Number, Field(gt=0, le=HOUR_S)] = Field(
        default=30.0,
        description="Seconds a request may wait; one that is predicted to wait longer is refused at once. Thirty are "
        "what people bear. Deadlines shorten it; `flex` requests wait as long as they may run.",
    )
    start_wait_s: Annotated[Number, Field(ge=0, le=HOUR_S)] | None = Field(
        default=None,
        description="Seconds a request may wait for the first replica of a pool that has none and gets one; 0: none "
        "waits. Null: 300, where replicas start or `scaling` has a provider that acts; with a number also where others "
        "act on what `scaling` wants. Deadlines shorten it.",
    )
    max_tokens: Annotated[Whole, Field(ge=1, le=1_000_000_000)] | None = Field(
        default=None,
        description="Tokens of KV cache that requests may take on each replica, prompt and reserved output together. "
        "Null: what the engine says it has.",
    )
    headroom: Annotated[Whole, Field(ge=0, le=1000)] = Field(
        default=2,
        description="Requests to send to each replica above its measured capacity, so that it never idles. Two: the "
        "next one is there when one ends.",
    )
