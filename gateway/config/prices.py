"""What tokens cost, and what a dollar is worth in time."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.config.values import Number, Section

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


_Rate = Annotated[Number, Field(ge=0, le=1_000_000_000_000)]

_RATE = "Milliseconds that a request of this class may take longer to save a dollar"


class ExchangeRates(Section):
    """What a dollar is worth to each class of requests, where replicas of one pool have different prices."""

    critical: _Rate = Field(default=200_000, description=f"{_RATE}. 200000: a tenth of a cent is worth 0.2 s.")
    standard: _Rate = Field(default=1_000_000, description=f"{_RATE}. 1000000: a tenth of a cent is worth a second.")
    batch: _Rate = Field(default=10_000_000, description=f"{_RATE}. 10000000: a tenth of a cent is worth ten seconds.")
    sheddable: _Rate = Field(default=10_000_000, description=f"{_RATE}. The same as batch.")
