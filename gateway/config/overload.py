"""The part of the schema about what a worker does before it would run out of something."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.config.values import Number, Section, Switch, Whole

_Share = Annotated[Number, Field(gt=0.1, le=1.0)]


class Overload(Section):
    """When requests are shed, the least urgent classes first. Shares are of memory, of descriptors and of
    `server.max_in_flight_bytes`."""

    enabled: Switch = Field(
        default=True,
        description="Whether anything is shed. On: a refusal with a class in mind is better than a process that the "
        "kernel kills with all its streams. Off, the pressures are still measured.",
    )
    shed_sheddable_at: _Share = Field(
        default=0.8,
        description="Share of a resource at which `sheddable` requests are refused. A fifth is left for what is under "
        "way to grow.",
    )
    shed_batch_at: _Share = Field(
        default=0.9,
        description="Share at which `batch` requests are refused as well, and replies close their connections. At "
        "least shed_sheddable_at; half of what was left by then is used up.",
    )
    critical_only_at: _Share = Field(
        default=0.95,
        description="Share from which only `critical` requests are served, and health checks. At least shed_batch_at; "
        "5 % hold a burst of 250 ms, the time between two looks.",
    )
    max_loop_lag_ms: Whole = Field(
        default=250,
        ge=50,
        le=60_000,
        description="Lateness of the event loop, in milliseconds, that counts as shed_batch_at when it lasts for 2 s. "
        "250 are two tokens' time: whoever streams has noticed.",
    )
    max_memory_bytes: Whole | None = Field(
        default=None,
        ge=67_108_864,
        le=1_099_511_627_776,
        description="Resident memory of one worker that counts as all there is, in bytes. Null: the limit of its "
        "cgroup, and where there is none, the machine's memory. Several workers without a container share that: give "
        "each its part.",
        examples=[2_147_483_648],
    )
