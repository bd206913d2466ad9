"""Policies as users write them; the tests load them by this path."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from routing.policies.cost import Cost
from routing.types import Chooser, InferenceRequest, Replica, View


class Inheriting(Chooser):
    """A policy that says what it is by inheritance, not by its shape alone."""

    name = "inheriting"
    wants_prefix = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        view.reason = "the last"
        return max(candidates, key=lambda replica: replica.name)


class Heavier(Cost):
    """One that inherits from a policy of ours."""

    name = "heavier"


def choose(request, candidates, view):  # type: ignore[no-untyped-def]
    """What docs/routing.md shows."""
    return min(candidates, key=lambda replica: replica.work.queued_tokens - view.matches.get(replica, 0))
