"""Where replicas are: configured latencies, refined by what is measured, and what the default policy makes of it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.geo import UNKNOWN_MS, Distances, latency_ms
from routing.policies import make_policy
from routing.router import Router
from routing.types import InferenceRequest, Replica

MATRIX = {"eu-west": {"us-east": 80.0, "ap-south": 120.0}, "ap-south": {"eu-west": 130.0}}


def replica(name: str, region: str | None = None) -> Replica:
    return Replica(name, "pool", f"http://{name}:1", "sglang", region=region)


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("eu-west", "us-east", 80.0),
        ("us-east", "eu-west", 80.0),
        ("eu-west", "ap-south", 120.0),
        ("ap-south", "eu-west", 130.0),
        ("eu-west", "eu-west", 0.0),
        ("us-east", "ap-south", UNKNOWN_MS),
        ("eu-west", None, 0.0),
        (None, "eu-west", 0.0),
    ],
)
def test_a_latency_holds_both_ways_unless_both_are_given(here: str | None, there: str | None, expected: float) -> None:
    assert latency_ms(MATRIX, here, there) == expected


def test_the_worked_examples_of_the_module() -> None:
    distances = Distances("eu-west", MATRIX)
    far = replica("far", "us-east")
    distances.place([far])
    seen = [far.speed.rtt_ms]
    for _ in range(3):
        distances.observe(far, 20.0)
        seen.append(far.speed.rtt_ms)
    assert seen == [80.0, 50.0, 35.0, 27.5]
    near = replica("near")
    for measured in (20.0, 20.0, 1020.0, 20.0):
        distances.observe(near, measured)
    assert near.speed.rtt_ms == pytest.approx(23.0)


def test_a_replica_that_nobody_has_called_is_as_far_as_its_region_has_shown() -> None:
    distances = Distances("eu-west", MATRIX)
    called, fresh = replica("called", "us-east"), replica("fresh", "us-east")
    for _ in range(20):
        distances.observe(called, 30.0)
    distances.place([called, fresh])
    assert called.speed.rtt_ms == pytest.approx(30.0, abs=0.1)
    assert fresh.speed.rtt_ms == pytest.approx(30.0, abs=0.1)


def test_where_nothing_is_said_the_first_measured_time_is_taken_as_it_is() -> None:
    distances = Distances()
    far, farther = replica("far", "us-east"), replica("farther", "us-east")
    distances.observe(far, 80.0)
    distances.observe(farther, 90.0)
    distances.observe(replica("other"), 5.0)
    assert (far.speed.rtt_ms, farther.speed.rtt_ms) == (80.0, 90.0)
    fresh = replica("fresh", "us-east")
    distances.place([fresh])
    assert fresh.speed.rtt_ms == pytest.approx(81.0)


def test_a_replica_that_is_farther_than_was_said_is_found_to_be_in_a_dozen_connections() -> None:
    distances = Distances("eu-west", {"eu-west": {"us-east": 5.0}})
    far = replica("far", "us-east")
    for _ in range(16):
        distances.observe(far, 80.0)
    assert far.speed.rtt_ms > 50.0


def test_what_is_paid_beside_the_way_there_is_kept() -> None:
    distances = Distances("eu-west", MATRIX)
    far = replica("far", "us-east")
    distances.place([far])
    far.speed.rtt_ms += 15.0  # learned from answers
    distances.observe(far, 60.0)
    assert far.speed.network_ms == 70.0
    assert far.speed.rtt_ms == 85.0


def test_a_reload_keeps_what_was_measured_and_a_move_does_not() -> None:
    distances = Distances("eu-west", MATRIX)
    far = replica("far", "us-east")
    distances.observe(far, 80.0)
    distances.configure("eu-west", {})
    distances.place([far])
    assert far.speed.rtt_ms == 80.0
    distances.configure("us-east", {})
    distances.place([far])
    assert far.speed.rtt_ms == 0.0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=50), st.floats(0.0, 500.0))
def test_an_estimate_stays_between_the_start_and_what_was_measured(measured: list[float], start: float) -> None:
    distances = Distances("a", {"a": {"b": start}})
    far = replica("far", "b")
    distances.place([far])
    for each in measured:
        distances.observe(far, each)
    sane = [each for each in measured if 0.0 <= each < float("inf")]
    assert min([start, *sane]) - 0.1 <= far.speed.rtt_ms <= max([start, *sane]) + 0.1


def deciding(near: Replica, far: Replica, tokens: int) -> set[str]:
    """Which of the two the default policy takes, over twenty decisions."""
    Distances("eu-west", {"eu-west": {"us-east": 80.0}}).place([near, far])
    router = Router(make_policy("cost", Random(1)))
    request = InferenceRequest(id="r", model="m", stream=True, prompt_bytes=tokens * 4, prompt_tokens=tokens)
    decisions = [router.decide(request, [near, far], 0.0) for _ in range(20)]
    return {"" if each.replica is None else each.replica.name for each in decisions}


def test_the_nearest_is_taken_where_nothing_else_differs() -> None:
    assert deciding(replica("near", "eu-west"), replica("far", "us-east"), 100) == {"near"}


@pytest.mark.parametrize(("queued_tokens", "taken"), [(500, "near"), (20_000, "far")])
def test_the_nearest_is_left_when_it_is_busier_by_more_than_it_is_nearer(queued_tokens: int, taken: str) -> None:
    near, far = replica("near", "eu-west"), replica("far", "us-east")
    near.work.queue(queued_tokens, 0.0)  # at 0.04 ms a token: 20 ms, or 800
    assert deciding(near, far, 100) == {taken}


@pytest.mark.parametrize(("tokens", "taken"), [(1_000, "near"), (16_000, "far")])
def test_the_nearest_is_left_when_it_is_colder_by_more_than_it_is_nearer(tokens: int, taken: str) -> None:
    """Far away the prompt is cached: at 0.04 ms a token that saves 40 ms, or 640."""
    near, far = replica("near", "eu-west"), replica("far", "us-east")
    Distances("eu-west", {"eu-west": {"us-east": 80.0}}).place([near, far])
    chooser = make_policy("cost", Random(1))
    router = Router(chooser)
    request = InferenceRequest(id="r", model="m", stream=True, prompt_bytes=tokens * 4, prompt_tokens=tokens)
    view = router.view(request, 0.0)
    view.matches = {far: tokens}
    assert chooser(request, [near, far], view).name == taken
