"""Replicas, requests and prompts for the tests of policies."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from xxhash import xxh3_64_intdigest

from routing.health import Evidence
from routing.observing import observe
from routing.prefix import Prefix
from routing.types import InferenceRequest, Replica, View

NOW = 1000.0
BLOCK = 100
"""Units between two checkpoints here."""


def replica(name: str = "r", **fields: object) -> Replica:
    return Replica(name, "pool", f"http://{name}", "openai", **fields)  # type: ignore[arg-type]


def replicas(count: int) -> list[Replica]:
    return [replica(f"r{number}") for number in range(count)]


def busy(name: str, queued: int = 0, queued_tokens: int = 0, running: int = 0, running_tokens: int = 0) -> Replica:
    """One with this work, all of it."""
    one = replica(name)
    work = one.work
    work.queued, work.queued_tokens, work.running, work.running_tokens = queued, queued_tokens, running, running_tokens
    return one


def warming(name: str) -> Replica:
    """One that came back from an ejection just now, so its share is a tenth."""
    one = replica(name)
    for _ in range(5):
        observe(one, [one, replica("other")], Evidence.FAILED, NOW)
    one.health.hint_recovered(NOW)
    assert one.health.share(NOW) == 0.1
    return one


def prompt(path: str, total: int | None = None) -> Prefix:
    """A prompt with one block for each letter, which equals another's as far as their letters do."""
    digests = [xxh3_64_intdigest(path[: end + 1].encode()) for end in range(len(path))]
    ends = [BLOCK * (number + 1) for number in range(len(path))]
    whole = BLOCK * len(path) if total is None else total
    tail = xxh3_64_intdigest(f"{path} {whole}".encode())
    tails = [(tail, whole)] if whole > BLOCK * len(path) else []
    return Prefix(digests, ends, whole, tails, 1.0)


def request(path: str = "", tokens: int | None = None, **fields: object) -> InferenceRequest:
    prefix = prompt(path) if path else None
    count = tokens if tokens is not None else BLOCK * len(path)
    return InferenceRequest("q", "m", True, 4 * count, prompt_tokens=count, prefix=prefix, **fields)  # type: ignore[arg-type]


def view(matches: Mapping[Replica, int] | None = None, now: float = NOW) -> View:
    return View(now, Random(1), matches or {}, 100.0)
