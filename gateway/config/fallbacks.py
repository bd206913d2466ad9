"""The part of the schema about what else is asked: other pools and models when one fails, a second replica when one is
late."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gateway.config.prices import Price
from gateway.config.values import HOUR_S, ModelName, Number, Section, Whole


class Fallback(Section):
    """Who is asked when a model cannot answer: another model, or the same one at another backend."""

    model: ModelName | None = Field(
        default=None,
        description="Name of another model of this configuration. An entry that is only a text is this name. Null: "
        "the same model, at `backend`.",
        examples=["chat-small"],
    )
    backend: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Name of another backend that serves the same model. Null: the entry names a `model`.",
        examples=["rented"],
    )
    upstream_model: ModelName | None = Field(
        default=None, description="The name that this backend knows the model by. Null: the model's own upstream_model."
    )
    price: Price | None = Field(
        default=None, description="Price of the tokens at this backend. Null: the model's own price."
    )


def _entry(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


FallbackEntry = Annotated[Fallback, BeforeValidator(_entry, json_schema_input_type=str | Fallback)]


class Hedge(Section):
    """When a short prompt whose first token is late is sent to a second replica too. The first content wins."""

    share: Annotated[Number, Field(gt=0, le=0.5)] = Field(
        default=0.02,
        description="Requests that may be sent twice, as a part of those answered. 0.02: what it takes for one late "
        "prompt in fifty.",
    )
    max_prompt_tokens: Annotated[Whole, Field(ge=1, le=10_000_000)] = Field(
        default=2048,
        description="Longer prompts are never sent twice. 2048: above that, a second prefill costs more than it saves.",
    )
    max_busy: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.7,
        description="Part of the pool's places that may be taken. 0.7: fuller pools are late because they are full, "
        "and more work would make them later.",
    )
    min_delay_ms: Annotated[Number, Field(ge=0, le=HOUR_S * 1000)] = Field(
        default=50.0,
        description="Milliseconds that the first replica has at least, however quick the others are. 50: nobody "
        "notices less.",
    )
