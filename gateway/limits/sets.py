"""A set of limits, as an operator writes it: in the configuration, on a key, on a tenant."""

from __future__ import annotations

import msgspec


class LimitSet(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one holder may use. None everywhere: no limit of that kind here."""

    requests_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and output together."""
    concurrent_requests: int | None = None
    usd_per_day: float | None = None
    """US dollars per calendar day, UTC."""
    usd_per_month: float | None = None
    """US dollars per calendar month, UTC."""
    burst_s: float | None = None
    """Seconds' worth of a rate that may come at once; None: the default, 10."""
    strict_window: bool | None = None
    """Never more than the limit in any 60 seconds, at the cost of the burst in sustained rate."""
    hard_tokens: bool | None = None
    """Reserve what a request can use at most, instead of what it is expected to; None: the default, no."""
    shadow: bool | None = None
    """Judge and count, never refuse; None: the default, no."""


class Raise(msgspec.Struct, frozen=True, omit_defaults=True):
    """A temporary change: the fields that are set stand in place of the holder's own until then."""

    limits: LimitSet
    until_unix_s: float


def overlaid(base: LimitSet, over: LimitSet) -> LimitSet:
    """`base` with every field that `over` sets."""
    changes = {name: value for name in LimitSet.__struct_fields__ if (value := getattr(over, name)) is not None}
    return msgspec.structs.replace(base, **changes) if changes else base
