"""The settings tree: every setting with its meaning, unit, bounds, default and the reason for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gateway.config.caps import Caps
from gateway.config.limits import DefaultLimits, Keys, Redis, Tenant
from gateway.config.operators import AdminToken, Oidc, Sessions
from gateway.config.overload import Overload
from gateway.config.secrets import Secret
from gateway.config.slo import Slo
from gateway.config.telemetry import Telemetry
from gateway.config.upstreams import Backend, Model, Timeouts
from gateway.config.values import (
    HOUR_S,
    NAME,
    DatabaseUrl,
    FilePath,
    Host,
    HostName,
    ModelName,
    Name,
    Number,
    Region,
    RequestLines,
    Section,
    SocketPath,
    Store,
    Switch,
    Whole,
)

RESTART_ONLY = ("server", "admin", "auth", "usage_log", "database", "database_password", "store", "redis", "telemetry")
"""What a running gateway cannot change: its listeners, whether it asks for keys, and where its state and records go.
The rest is reloaded. `keys.pepper` is the one part of a section that is not: see `keep_restart_only`."""


class Server(Section):
    """The listener for clients: `/v1/...`, `/livez`, `/readyz`."""

    host: Host = Field(
        default="127.0.0.1",
        description="Address or host name to listen on. Loopback: nothing is exposed before you decide to.",
    )
    port: Whole = Field(
        default=7400,
        ge=0,
        le=65535,
        description="TCP port. 0 takes any free one. 7400 is seldom used by others.",
    )
    uds: SocketPath | None = Field(
        default=None,
        description="Path of a Unix socket to listen on instead of host and port. Null: TCP.",
        examples=["/run/tidegate/tidegate.sock"],
    )
    edge: Literal["protocol", "asgi"] = Field(
        default="protocol",
        description="How hot routes are served: `protocol` straight from the HTTP parser, `asgi` through "
        "the framework. "
        "The behaviour is the same; `protocol` costs less CPU.",
    )
    allowed_hosts: tuple[HostName, ...] = Field(
        default=(),
        max_length=100,
        description="Names that requests may give in `Host`, and web pages in `Origin`, without ports; `.x.org` stands "
        "for all below x.org, `*` for any. Empty: with `auth: insecure` on TCP this machine's own names (localhost, "
        "loopback addresses, `host`), since any web page could have a browser send requests here otherwise; with "
        "keys, any.",
        examples=[["gateway.internal"]],
    )
    max_body_bytes: Whole = Field(
        default=10_485_760,
        ge=1024,
        le=1_073_741_824,
        description="Largest request body, in bytes; a larger one is answered with 413. "
        "10 MiB hold a million tokens of text or a few images.",
    )
    max_header_bytes: Whole = Field(
        default=32_768,
        ge=1024,
        le=1_048_576,
        description="Largest request head, in bytes; a larger one is answered with 431. "
        "32 KiB leave room for long tokens and tracing headers.",
    )
    max_header_count: Whole = Field(
        default=100,
        ge=8,
        le=1000,
        description="Header fields in one request. 100 are far more than clients send.",
    )
    max_connections: Whole = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description="Client connections open at once. 10000 idle ones fit in a small machine's memory; "
        "raise the limit of open files with it.",
    )
    max_connections_per_address: Whole | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Client connections open at once from one address (of IPv6, one /64). Null: no such limit, since "
        "behind a load balancer everybody has one address.",
        examples=[256],
    )
    max_in_flight_bytes: Whole = Field(
        default=536_870_912,
        ge=1024,
        le=1_099_511_627_776,
        description="Request bodies held in memory at once, all requests together, in bytes. "
        "512 MiB bound what a burst of large requests can take; at least max_body_bytes.",
    )
    header_timeout_s: Number = Field(
        default=10.0,
        gt=0,
        le=HOUR_S,
        description="Seconds for a client to send a complete request head. Ten end slow-header attacks.",
    )
    body_timeout_s: Number = Field(
        default=30.0,
        gt=0,
        le=HOUR_S,
        description="Seconds for a client to send a complete body. Thirty carry 10 MiB over 3 Mbit/s.",
    )
    write_stall_timeout_s: Number = Field(
        default=30.0,
        gt=0,
        le=HOUR_S,
        description="Seconds a client may leave its answer unread before the connection is cut, "
        "which also stops the engine. Thirty outlast a hiccup of a mobile network.",
    )
    keep_alive_s: Number = Field(
        default=75.0,
        gt=0,
        le=HOUR_S,
        description="Seconds an idle client connection is kept. 75 exceed the 60 of common load balancers, "
        "so that the balancer closes first and no request is lost to the race.",
    )


class Shutdown(Section):
    """How the gateway stops."""

    grace_s: Number = Field(
        default=5.0,
        ge=0,
        le=HOUR_S,
        description="Seconds to go on accepting requests after /readyz turns red. Five let balancers notice.",
    )
    drain_s: Number = Field(
        default=300.0,
        ge=0,
        le=HOUR_S * 24,
        description="Seconds for running requests to finish before they are cut. Five minutes end nearly "
        "every stream; "
        "give the process supervisor a little more than both together.",
    )


class Admin(Section):
    """The listener for operators: `/metrics`, `/admin/...`."""

    enabled: Switch = Field(
        default=True,
        description="Whether the admin listener runs. On: it is only reachable from this machine.",
    )
    host: Host = Field(
        default="127.0.0.1",
        description="Address to listen on. Loopback: anything else needs a token, so that it is closed by default.",
    )
    port: Whole = Field(
        default=7401, ge=0, le=65535, description="TCP port. 0 takes any free one. One above the server's."
    )
    allowed_hosts: tuple[HostName, ...] = Field(
        default=(),
        max_length=100,
        description="Names that requests may give in `Host`, without ports; `.x.org` stands for all below x.org, `*` "
        "for any. Empty: on a loopback address this machine's own names, so that no web page can make a browser ask "
        "here (DNS rebinding); elsewhere any, since nothing there is open without the token.",
        examples=[["tidegate-admin.internal"]],
    )
    token: Secret | None = Field(
        default=None,
        description="Bearer token for the admin listener, at least 16 bytes, as a reference {env: NAME} or "
        "{file: PATH}. "
        "Null: on loopback, one that is made at the first start and kept in the state directory.",
    )
    tokens: Mapping[Name, AdminToken] = Field(
        default={},
        max_length=100,
        description="Further tokens by the name that the audit gives their bearers, each with a role.",
        examples=[{"grafana": {"role": "reader", "token": {"file": "/run/secrets/grafana"}}}],
    )
    session: Sessions = Field(
        default=Sessions(), description="How long somebody who has logged in to the dashboard stays so."
    )
    oidc: Oidc | None = Field(
        default=None, description="Logging in to the dashboard at an identity provider. Null: with tokens only."
    )
    explained_per_s: Number = Field(
        default=10.0,
        ge=0,
        le=1000,
        description="Requests a second, in each worker, of which it is kept why they went where they went: every "
        "candidate with each term of its cost. Takes half a per cent of a worker's time at most, whatever stands here; "
        "0 keeps none but those of the playground.",
    )


class Stream(Section):
    """How streams are relayed."""

    hold_s: Number = Field(
        default=15.0,
        ge=0,
        le=HOUR_S,
        description="Seconds the response head may be held back while waiting for the first token. Until "
        "then a failure "
        "still gets its true status or another replica. Fifteen stay below common client and proxy timeouts.",
    )
    heartbeat_s: Number = Field(
        default=15.0,
        gt=0,
        le=HOUR_S,
        description="Seconds of silence after which a comment is sent to keep the stream open. "
        "Fifteen stay well below the 60 of common load balancers.",
    )
    max_event_bytes: Whole = Field(
        default=1_048_576,
        ge=4096,
        le=268_435_456,
        description="Largest single event of a stream, in bytes. 1 MiB is far above any real event "
        "and bounds what a broken engine can make the gateway hold.",
    )


class UsageLog(Section):
    """The record of exchanges."""

    path: FilePath | None = Field(
        default=None,
        description="File that gets one JSON line per exchange. Null: records are only kept in memory, "
        "so that nothing is written to disk unasked.",
        examples=["/var/log/tidegate/usage.jsonl"],
    )


class Logging(Section):
    """What is written to standard error. The form of a line is the command line's: `--log-format`, `--log-level`."""

    requests: RequestLines = Field(
        default="true",
        description="Which requests get a line with their outcome: `true` all, `false` none, `errors` those that ended "
        "otherwise than with a whole answer or with the client leaving. A line costs some 5 us of CPU as JSON, 11 us "
        "as text, and 500 bytes.",
        examples=["errors"],
    )


class Settings(BaseSettings):
    """Tidegate's configuration.

    Build it with `load`: constructed directly it reads neither file nor environment and skips the checks
    that need more than one setting.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_default=True,
        env_prefix="TIDEGATE_",
        env_nested_delimiter="__",
    )

    server: Server = Field(default=Server(), description="The listener for clients.")
    shutdown: Shutdown = Field(default=Shutdown(), description="How the gateway stops.")
    admin: Admin = Field(default=Admin(), description="The listener for operators.")
    auth: Literal["insecure", "keys"] = Field(
        default="insecure",
        description="Who may send requests. `insecure`: whoever can connect, so it is only allowed on "
        "loopback and Unix sockets. `keys`: whoever has an API key. Insecure: a first try needs no key.",
    )
    store: Store = Field(
        default="memory",
        description="Where limits and queues are kept. `memory`: in the process, for one worker. Or a Redis, without "
        "user and password: redis://host:port/db, rediss://..., redis+sentinel://host:port,host:port/service, "
        "rediss+sentinel://..., unix:///path. Memory: one gateway needs no Redis.",
        examples=["redis://127.0.0.1:6379"],
    )
    redis: Redis = Field(default=Redis(), description="How to speak to the Redis that `store` names.")
    database: DatabaseUrl = Field(
        default="sqlite:///tidegate.db",
        description="Database of keys, tenants, spend and audit: sqlite:///file, or postgresql://user@host/name for "
        "several nodes. A file: one node needs no server.",
    )
    database_password: Secret | None = Field(
        default=None,
        description="Password for the database, as a reference {env: NAME} or {file: PATH}. Null: none is sent.",
    )
    keys: Keys = Field(default=Keys(), description="API keys, where `auth` is `keys`.")
    tenants: Mapping[Name, Tenant] = Field(default={}, description="Whose keys they are, by name.")
    limits: DefaultLimits = Field(
        default=DefaultLimits(), description="Limits of every key, tenant and user that has none of its own."
    )
    caps: Caps = Field(default=Caps(), description="How much of an engine a single request may ask for.")
    usage_log: UsageLog = Field(default=UsageLog(), description="The record of exchanges.")
    logging: Logging = Field(default=Logging(), description="What is written to standard error.")
    region: Region | None = Field(
        default=None,
        description="Where this gateway runs. Null: not said, so that only measured round trips count.",
        examples=["eu-west"],
    )
    latency_ms: Mapping[Region, Mapping[Region, Annotated[Number, Field(ge=0, le=10_000)]]] = Field(
        default={},
        description="Milliseconds of a round trip between regions; what is given one way holds both ways. A start "
        "value that measured round trips refine: 100 for pairs left out, 0 within a region.",
        examples=[{"eu-west": {"us-east": 80}}],
    )
    stream: Stream = Field(default=Stream(), description="How streams are relayed.")
    overload: Overload = Field(
        default=Overload(), description="What is refused before the gateway would run out of something."
    )
    telemetry: Telemetry = Field(default=Telemetry(), description="What is told to an OpenTelemetry collector.")
    slo: Slo = Field(default=Slo(), description="What the overview measures against: how much may fail.")
    models: Mapping[ModelName, Model] = Field(default={}, description="The models that clients may ask for, by name.")
    backends: Mapping[Name, Backend] = Field(default={}, description="The pools of replicas, by name.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in counts: `load` merges file and environment, and knows every line."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _name_replicas(cls, data: Any) -> Any:
        """Give every replica without a name its default, `<backend>-<position>`."""
        if not isinstance(data, dict) or not isinstance(data.get("backends"), dict):
            return data
        return {**data, "backends": {pool: _with_names(pool, raw) for pool, raw in data["backends"].items()}}

    def effective_timeouts(self, model: str) -> Timeouts:
        """The timeouts of a model (by its name, not an alias): its own where given, else its backend's."""
        chosen = self.models[model]
        overrides = {name: value for name, value in chosen.timeouts if value is not None}
        return self.backends[chosen.backend].timeouts.model_copy(update=overrides)


def _with_names(pool: Any, backend: Any) -> Any:
    if not re.fullmatch(NAME, str(pool)):  # reported as such; names made from it would only repeat that
        return backend
    if not isinstance(backend, dict) or not isinstance(backend.get("replicas"), (list, tuple)):
        return backend
    named = [
        {**raw, "name": raw.get("name") or f"{pool}-{index}"} if isinstance(raw, dict) else raw
        for index, raw in enumerate(backend["replicas"])
    ]
    return {**backend, "replicas": named}
