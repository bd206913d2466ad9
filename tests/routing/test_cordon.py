"""A cordoned replica takes no new prompts, and goes on with those that it holds."""

from __future__ import annotations

from random import Random

from routing.explain import explain
from routing.keys import seed_of, text_prefix
from routing.policies import make_policy
from routing.router import NEW_OR_CORDONED, Router
from routing.types import InferenceRequest, Replica

NOW = 1000.0
SEED = seed_of("m")
SHARED = b"You are a helpful assistant. " * 40
"""More than a block of text, which all prompts have."""


def fleet(count: int = 3) -> list[Replica]:
    return [Replica(f"r{number}", "p", f"http://r{number}", "sglang") for number in range(count)]


def request(number: int, *turns: bytes, session: str | None = None) -> InferenceRequest:
    made = InferenceRequest(f"req_{number}", "m", stream=True, prompt_bytes=1000, prompt_tokens=500, session=session)
    made.prefix = text_prefix([SHARED, *turns], SEED, 500)
    return made


def router(policy: str = "cost") -> Router:
    return Router(make_policy(policy, Random(3)), rng=Random(3))


def serve(routing: Router, asked: InferenceRequest, replica: Replica) -> None:
    routing.dispatched(asked, replica, NOW)
    routing.first_token(asked, replica, NOW)
    routing.finished(asked, replica, NOW)


def test_it_gets_no_new_prompts() -> None:
    replicas, routing = fleet(), router()
    for replica in replicas:
        serve(routing, request(0, b"old " * 300), replica)
    replicas[0].health.cordon(True)
    chosen = {routing.decide(request(n, b"new %d " % n * 300), replicas, NOW).replica for n in range(1, 40)}
    assert replicas[0] not in chosen
    assert len(chosen) == 2


def test_a_conversation_that_it_alone_holds_goes_on_there() -> None:
    replicas, routing = fleet(), router()
    first = request(1, b"my question " * 200)
    serve(routing, first, replicas[0])
    replicas[0].health.cordon(True)
    decision = routing.decide(request(2, b"my question " * 200, b"and more " * 30), replicas, NOW)
    assert decision.replica is replicas[0]
    assert replicas[0] not in [each.replica for each in decision.excluded]


def test_what_another_one_holds_as_well_goes_to_that_one() -> None:
    replicas, routing = fleet(2), router()
    for number, replica in enumerate(replicas):
        serve(routing, request(number, b"my question " * 200), replica)
    replicas[0].health.cordon(True)
    assert routing.decide(request(9, b"my question " * 200), replicas, NOW).replica is replicas[1]


def test_the_first_block_alone_is_no_prompt_that_it_holds() -> None:
    replicas, routing = fleet(2), router()
    head = b"You are a helpful assistant. " * 18  # 522 bytes: one block and a little
    held = InferenceRequest("req_1", "m", stream=True, prompt_bytes=1000, prompt_tokens=500)
    held.prefix = text_prefix([head, b"x" * 4000], SEED, 500)
    serve(routing, held, replicas[0])
    replicas[0].health.cordon(True)
    other = InferenceRequest("req_2", "m", stream=True, prompt_bytes=1000, prompt_tokens=500)
    other.prefix = text_prefix([head, b"y" * 4000], SEED, 500)
    assert routing.view(other, NOW).matches[replicas[0]] > 0
    assert routing.decide(other, replicas, NOW).replica is replicas[1]


def test_a_session_goes_on_there() -> None:
    replicas, routing = fleet(), router()
    for replica in replicas:
        serve(routing, request(0), replica)
    serve(routing, request(1, session="t\x00a"), replicas[0])
    replicas[0].health.cordon(True)
    considered = explain(routing, request(2, b"else " * 200, session="t\x00a"), replicas, NOW)["candidates"]
    assert "r0" in [row["replica"] for row in considered]
    considered = explain(routing, request(3, b"else " * 200, session="t\x00b"), replicas, NOW)["candidates"]
    assert "r0" not in [row["replica"] for row in considered]


def test_it_is_used_when_nobody_else_may_be() -> None:
    replicas, routing = fleet(2), router()
    replicas[0].health.cordon(True)
    replicas[1].draining = True
    decision = routing.decide(request(1), replicas, NOW)
    assert (decision.replica, decision.reason) == (replicas[0], NEW_OR_CORDONED)
    replicas[1].draining = False
    replicas[1].max_in_flight = replicas[1].in_flight = 1
    assert routing.decide(request(2), replicas, NOW).replica is replicas[0]


def test_one_that_has_failed_already_is_not_asked_again() -> None:
    replicas, routing = fleet(2), router()
    serve(routing, request(1, b"mine " * 300), replicas[0])
    replicas[0].health.cordon(True)
    again = routing.decide(request(2, b"mine " * 300), replicas, NOW, tried=[replicas[0]])
    assert again.replica is replicas[1]


def test_one_that_is_at_its_ceiling_is_not_added() -> None:
    replicas, routing = fleet(2), router()
    serve(routing, request(1, b"mine " * 300), replicas[0])
    replicas[0].health.cordon(True)
    replicas[0].ceiling = replicas[0].in_flight = 2
    assert routing.decide(request(2, b"mine " * 300), replicas, NOW).replica is replicas[1]


def test_a_drain_says_more_than_a_cordon_and_ends_alone() -> None:
    replica = fleet(1)[0]
    replica.health.cordon(True)
    replica.draining = True
    assert replica.unavailable_reason(NOW) == "draining"
    replica.draining = False
    assert replica.unavailable_reason(NOW) == "cordoned"
    assert replica.health.state(NOW) == "healthy"
    replica.health.cordon(False)
    assert replica.available(NOW)


def test_an_explanation_says_why_it_was_left_out() -> None:
    replicas, routing = fleet(2), router()
    replicas[0].health.cordon(True)
    told = explain(routing, request(1), replicas, NOW)
    assert told["excluded"] == [{"replica": "r0", "region": None, "reason": "cordoned"}]
