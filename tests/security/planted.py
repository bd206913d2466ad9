"""A routing policy with a defect: it raises, with words of a prompt in the message and in its locals."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from routing.types import InferenceRequest, Replica, View

PLANTED = "planted-words-of-a-prompt-7d1f"


class Broken:
    """Every decision fails, as code with a bug does."""

    name = "broken"
    wants_prefix = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        words = f"{PLANTED} {request.id}"
        try:
            raise ValueError(words)
        except ValueError as error:
            raise RuntimeError(f"could not choose for {words}") from error
