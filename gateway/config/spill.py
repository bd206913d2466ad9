"""The part of the schema about overflow: when requests go to rented replicas, and for how much money."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.config.limits import PriorityClass
from gateway.config.prices import Price
from gateway.config.values import HOUR_S, ModelName, Name, Number, Section

_Target = Annotated[Number, Field(gt=0, le=HOUR_S * 1000)]
_Ceiling = Annotated[Number, Field(gt=0, le=1_000_000_000)]

_TARGET = "Milliseconds to the first token that a request of this class should not wait longer than."


class TtftTargets(Section):
    """How long each class should wait for its first token, at most."""

    critical: _Target | None = Field(default=1000.0, description=f"{_TARGET} One second: people wait for these.")
    standard: _Target | None = Field(default=2000.0, description=f"{_TARGET} Two seconds. Null: such requests stay.")
    batch: _Target | None = Field(default=None, description=f"{_TARGET} Null: such requests stay; jobs can wait.")
    sheddable: _Target | None = Field(default=None, description=f"{_TARGET} Null: such requests stay.")


class SpillAllow(Section):
    """Whose requests may go to the rented replicas. All conditions have to be met."""

    tenants: tuple[Name, ...] | None = Field(
        default=None, description="Tenants whose requests may leave. Null: all.", examples=[["acme"]]
    )
    keys: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] | None = Field(
        default=None,
        description="Keys whose requests may leave, by id (`static:<name>` for those of this file). Null: all.",
        examples=[["static:laptop"]],
    )
    classes: tuple[PriorityClass, ...] | None = Field(
        default=None,
        description="Classes whose requests may leave. Null: all that have a target.",
        examples=[["critical"]],
    )


class Spill(Section):
    """Where a model's requests go when its own replicas would keep them waiting for too long."""

    backend: str = Field(
        description="Name of the backend that takes them. Its replicas have to be hosted ones.", examples=["rented"]
    )
    upstream_model: ModelName | None = Field(
        default=None, description="The name that it knows the model by. Null: the model's own upstream_model."
    )
    price: Price = Field(
        description="What it charges: the ceilings are counted by this, and so are budgets.",
        examples=[{"input": 0.3, "output": 1.2}],
    )
    usd_per_hour: _Ceiling = Field(
        description="US dollars that may be spent in any 60 minutes. No default: nobody's money is spent unasked.",
        examples=[5.0],
    )
    usd_per_day: _Ceiling = Field(
        description="US dollars that may be spent in a calendar day (UTC). No default.", examples=[40.0]
    )
    ttft_target_ms: TtftTargets = Field(
        default=TtftTargets(), description="How long each class should wait for its first token, at most."
    )
    enter: Annotated[Number, Field(ge=1, le=100)] = Field(
        default=1.2,
        description="Requests begin to leave when the predicted wait passes the target by this factor. 1.2: a "
        "prediction a little above the target is within its error.",
    )
    leave: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.8,
        description="They stay again when it falls below this part of the target. 0.8: so that they do not go back and "
        "forth.",
    )
    allow: SpillAllow = Field(default=SpillAllow(), description="Whose requests may leave. By default all.")
