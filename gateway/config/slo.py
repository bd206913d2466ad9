"""The part of the schema about what service is promised, which the overview measures against."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.config.values import Number, Section


class Slo(Section):
    """The objective of the service: how much may fail before somebody has to act."""

    availability: Annotated[Number, Field(ge=0.5, lt=1.0)] = Field(
        default=0.999,
        description="Share of requests that have to be served. What fails for reasons of the client's own counts "
        "neither way. One in a thousand may fail: what teams that run inference for others promise.",
    )
    ttft_p95_ms: Annotated[Number, Field(gt=0, le=600_000)] | None = Field(
        default=None,
        description="Milliseconds within which 95 of 100 answers have to begin. Null: no objective, since what can be "
        "kept depends on the model.",
        examples=[2000],
    )
    window: Literal["hour", "day", "week"] = Field(
        default="week",
        description="The time over which the error budget is counted, up to now. A week: the longest that is kept, "
        "and weekends are in it.",
    )
