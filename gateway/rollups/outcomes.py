"""Which outcomes count against the objective."""

from __future__ import annotations

from gateway.record import Outcome

FAILED = frozenset(
    {
        Outcome.UPSTREAM_ERROR,
        Outcome.UPSTREAM_INTERRUPTED,
        Outcome.UNAVAILABLE,
        Outcome.TIMEOUT,
        Outcome.INTERNAL,
        Outcome.DRAINED,
    }
)
"""A client that asked for something that could be had did not get it."""
UNCOUNTED = frozenset({Outcome.REJECTED, Outcome.UPSTREAM_REJECTED, Outcome.CLIENT_LEFT, Outcome.ENDED_BY_OPERATOR})
"""The client's own doing, or what an operator meant to do: neither good nor bad."""
