"""The part of the schema about policies that decide beside the one in force, and send nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.config.values import Number, Section


class Shadow(Section):
    """A second policy for a model: what it would have done is compared with what was done."""

    policy: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="The policy that decides too, by a name that `policy` takes as well. It sends nothing.",
        examples=["least_outstanding"],
    )
    per_s: Annotated[Number, Field(gt=0, le=1000)] = Field(
        default=20.0,
        description="Requests a second that it is asked about, at most, in each worker process. Twenty take about "
        "two thousandths of a core, and give a share within 3 % in a minute.",
    )
