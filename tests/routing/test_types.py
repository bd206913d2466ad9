"""Reserving a replica, and when it is available."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.types import InferenceRequest, Replica


def replica(**fields: object) -> Replica:
    return Replica("r", "pool", "http://127.0.0.1:1", "openai", **fields)  # type: ignore[arg-type]


def request(prompt_bytes: int = 100) -> InferenceRequest:
    return InferenceRequest("req_1", "m", stream=False, prompt_bytes=prompt_bytes)


def test_a_replica_without_a_limit_is_never_full() -> None:
    assert replica(in_flight=10_000).available(0.0)


def test_a_replica_is_full_at_its_limit_and_free_again_after_a_release() -> None:
    one = replica(max_in_flight=1)
    with one.reserve(request()):
        assert one.unavailable_reason(0.0) == "full"
    assert one.unavailable_reason(0.0) is None


def test_full_is_named_before_cooling_down_so_that_panic_cannot_overfill() -> None:
    one = replica(max_in_flight=1, in_flight=1)
    one.cooldown.failed(0.0)
    assert one.unavailable_reason(0.1) == "full"


def test_a_ceiling_makes_full_only_what_seems_well_and_is_no_limit() -> None:
    one = replica(ceiling=1)
    with one.reserve(request()):
        assert one.unavailable_reason(0.0) == "full"
        assert not one.at_limit
        one.cooldown.failed(0.0)
        assert one.unavailable_reason(0.1) == "cooling_down"
    assert replica(max_in_flight=1, in_flight=1).at_limit


def test_replicas_are_told_apart_by_identity_so_that_they_can_be_keys() -> None:
    assert replica() != replica()
    assert len({replica(), replica()}) == 2


def test_a_place_is_released_when_the_block_raises() -> None:
    one = replica()
    with pytest.raises(RuntimeError), one.reserve(request()):
        raise RuntimeError
    assert (one.in_flight, one.in_flight_bytes) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from(["ends", "fails", "is_cancelled"]), st.integers(0, 10_000)), max_size=20))
def test_in_flight_returns_to_zero_after_any_mix_of_endings(endings: Sequence[tuple[str, int]]) -> None:
    one = replica()
    assert asyncio.run(_run_all(one, endings)) == len(endings)
    assert (one.in_flight, one.in_flight_bytes) == (0, 0)


async def _run_all(one: Replica, endings: Sequence[tuple[str, int]]) -> int:
    """Hold all places at once, then let go of each in its own way; return how many were held at the peak."""
    go = asyncio.Event()

    async def work(ending: str, size: int) -> None:
        with one.reserve(request(size)):
            await go.wait()
            if ending == "fails":
                raise RuntimeError(ending)
            if ending == "is_cancelled":
                await asyncio.Event().wait()

    tasks = [asyncio.create_task(work(*each)) for each in endings]
    await asyncio.sleep(0)
    peak = one.in_flight
    assert one.in_flight_bytes == sum(size for _, size in endings)
    go.set()
    for task, (ending, _) in zip(tasks, endings, strict=True):
        if ending == "is_cancelled":
            task.cancel()
    for task in tasks:
        with contextlib.suppress(RuntimeError, asyncio.CancelledError):
            await task
    return peak
