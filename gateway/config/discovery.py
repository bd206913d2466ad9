"""The part of the schema about replicas that are found rather than written down: where to look, and what they are."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gateway.config.prices import Price
from gateway.config.problems import shown, wrong
from gateway.config.replicas import Engine, KvEvents
from gateway.config.values import HOUR_S, FilePath, Host, LookedUpName, ModelName, Number, Region, Section, Whole

PRIVATE_NETWORKS = (
    "127.0.0.0/8",
    "::1/128",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "fc00::/7",
)
"""Loopback, RFC 1918, RFC 6598 and RFC 4193. Not link-local addresses: clouds keep their metadata services there."""

Scheme = Literal["http", "https"]
Port = Annotated[Whole, Field(ge=1, le=65535)]
_Interval = Annotated[Number, Field(ge=0.2, le=HOUR_S)]
_Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,251}[A-Za-z0-9])?$")]
_LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]
_KubeName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
_PortName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?$")]


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError:
        raise wrong(f"{shown(value)} is not a network", "write e.g. 10.0.0.0/8 or 10.1.2.3/32") from None


class Dns(Section):
    """Replicas by name: every address (A, AAAA) or every target (SRV) of the name is one."""

    name: LookedUpName = Field(
        description="The name to look up, such as a headless service; of SRV records the whole name. With a dot at its "
        "end it is looked up as it stands, without the system's search domains.",
        examples=["sglang.models.internal"],
    )
    record: Literal["a", "srv"] = Field(
        default="a",
        description="What to look up. `a`: addresses, IPv6 too, as the system resolves them. `srv`: targets with "
        "their own ports and weights; only those of the best priority are used.",
    )
    port: Port | None = Field(
        default=None, description="Port of the engines. Null: that of the SRV record; with `a` it has to be given."
    )
    scheme: Scheme = Field(default="http", description="How the engines are spoken to. http: on a private network.")
    interval_s: _Interval = Field(
        default=5.0,
        description="Seconds between look-ups; records that live for longer are not asked for sooner. Five: a new "
        "replica waits no longer than its model takes to load.",
    )
    timeout_s: Annotated[Number, Field(gt=0, le=60)] = Field(
        default=3.0, description="Seconds for an answer. What was found last holds while there is none."
    )
    servers: tuple[Host, ...] = Field(
        default=(),
        max_length=8,
        description="Addresses of the DNS servers to ask, for `srv`. Empty: those of the system.",
    )


class Kubernetes(Section):
    """Replicas from EndpointSlices, as the API server tells of them; needs the extra `kubernetes`."""

    namespace: _KubeName | None = Field(
        default=None, description="Namespace of the slices. Null: the gateway's own, else `default`."
    )
    service: _KubeName | None = Field(
        default=None,
        description="Service whose slices are meant (label kubernetes.io/service-name). Null: by `labels` alone.",
        examples=["sglang"],
    )
    labels: Mapping[_Label, _LabelValue] = Field(
        default={},
        max_length=16,
        description="Labels that the slices have as well. None by default.",
        examples=[{"app": "sglang"}],
    )
    port: Port | _PortName | None = Field(
        default=None, description="Number or name of the engines' port. Null: the only one that a slice has."
    )
    scheme: Scheme = Field(default="http", description="How the engines are spoken to. http: on a private network.")
    zones_as_regions: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        description="Whether an endpoint's zone is taken as the replica's region. False: they have that of `defaults`.",
    )
    kubeconfig: FilePath | None = Field(
        default=None, description="Path of a kubeconfig. Null: the service account of the pod, else ~/.kube/config."
    )
    context: Annotated[str, Field(min_length=1, max_length=253)] | None = Field(
        default=None, description="Context of the kubeconfig. Null: its current one."
    )


class ReplicaFile(Section):
    """Replicas from a file that something else writes: YAML or JSON, a list as under `replicas`."""

    path: FilePath = Field(description="The file; relative to the configuration's own.", examples=["replicas.yaml"])
    interval_s: _Interval = Field(
        default=1.0, description="Seconds between looks at it. One that cannot be read changes nothing."
    )


class Registration(Section):
    """Replicas that say themselves where they are (`tidegate register`), for as long as they go on saying so."""

    ttl_s: Annotated[Number, Field(ge=2, le=HOUR_S)] = Field(
        default=15.0,
        description="Seconds after which a replica that is no longer heard of is gone; it renews after a third. "
        "Fifteen: two renewals may get lost.",
    )
    networks: Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], Field(min_length=1, max_length=64)] = (
        Field(
            default=PRIVATE_NETWORKS,
            description="Where they may be: prompts, and the pool's keys, go to whatever registers. Loopback and "
            "private networks; never link-local ones.",
        )
    )
    hosts: tuple[Annotated[str, Field(pattern=r"^\.?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")], ...] = Field(
        default=(),
        max_length=64,
        description="Names they may give instead of an address; `.x.org` stands for all below x.org. None by default.",
        examples=[[".gpu.internal"]],
    )


class MemberDefaults(Section):
    """What replicas that are found are, where nothing says otherwise."""

    engine: Engine | None = Field(default=None, description="What they run. Null: the backend's engine.")
    upstream_model: ModelName | None = Field(
        default=None, description="The name they know the model by. Null: the model's own upstream_model."
    )
    region: Region | None = Field(default=None, description="Where they run. Null: unknown.", examples=["eu-west"])
    weight: Annotated[Number, Field(gt=0, le=1000)] = Field(
        default=1.0, description="Share of the load relative to other replicas. One: all the same."
    )
    price: Price | None = Field(default=None, description="What their tokens cost (`replicas[].price`). Null: nothing.")
    max_in_flight: Annotated[Whole, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="Requests each may work on at once. Null: as many as its engine says."
    )
    kv_events: KvEvents | None = Field(
        default=None, description="Where they publish their KV-cache events (`replicas[].kv_events`). Null: not read."
    )


class Discovery(Section):
    """Where replicas are found, beside those under `replicas`. Several sources add up."""

    dns: Dns | None = Field(default=None, description="By name. Null: not.")
    kubernetes: Kubernetes | None = Field(default=None, description="From EndpointSlices. Null: not.")
    file: ReplicaFile | None = Field(default=None, description="From a file. Null: not.")
    registration: Registration | None = Field(
        default=None, description="By themselves, at the admin listener. Null: nobody can register."
    )
    defaults: MemberDefaults = Field(
        default=MemberDefaults(), description="What they are, where nothing says otherwise."
    )
    keep_s: Annotated[Number, Field(ge=0, le=24 * HOUR_S)] = Field(
        default=3600.0,
        description="Seconds for which what was found last holds while a source does not answer, over restarts too. An "
        "hour: health checks find those that are gone; a name server that is away must take nothing away.",
    )
