"""The router around a policy: hard rules, books, beliefs, and what becomes of them on every way out."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.policies.balanced import LeastOutstanding
from routing.policies.cost import Cost
from routing.prefix import Prefix
from routing.router import Change, PoolState, Router
from routing.types import InferenceRequest, Replica
from routing.work import NOTHING, Totals

PROMPT = Prefix([11, 12], [512, 1024], 1100, [(19, 1100)], 0.25)


def replica(name: str, **fields: object) -> Replica:
    return Replica(name, "pool", f"http://{name}", "sglang", **fields)  # type: ignore[arg-type]


def request(id: str = "q", prefix: Prefix | None = PROMPT, **fields: object) -> InferenceRequest:
    return InferenceRequest(id, "m", True, 1100, prompt_tokens=275, prefix=prefix, **fields)  # type: ignore[arg-type]


def router(state: PoolState | None = None) -> Router:
    return Router(Cost(Random(1)), state, Random(2))


def test_a_prompt_is_believed_where_it_was_sent_from_the_moment_it_is_sent() -> None:
    fleet, one = [replica("a"), replica("b")], router()
    assert one.decide(request(), fleet, 1.0).cached_tokens == 0
    one.dispatched(request(), fleet[1], 1.0)
    decision = one.decide(request("q2"), fleet, 1.0)
    assert one.view(request("q2"), 1.0).matches == {fleet[1]: 275}
    assert decision.excluded == []


def test_what_a_failed_request_brought_is_no_longer_believed_and_what_was_there_before_is() -> None:
    a, one = replica("a"), router()
    one.dispatched(request("first", Prefix([11], [512], 600, [(17, 600)], 0.25)), a, 1.0)
    one.first_token(request("first"), a, 2.0)
    one.dispatched(request("second"), a, 3.0)
    one.failed(request("second"), a, 4.0)
    assert one.view(request(), 5.0).matches == {a: 128}


def test_a_failure_after_the_first_token_leaves_the_belief() -> None:
    a, one = replica("a"), router()
    one.dispatched(request(), a, 1.0)
    one.first_token(request(), a, 2.0)
    one.failed(request(), a, 4.0)
    assert one.view(request(), 5.0).matches == {a: 275}
    assert a.work.own == NOTHING


def test_the_books_count_what_is_uncached_until_the_first_token_and_what_is_held_after_it() -> None:
    a, one = replica("a"), router()
    one.dispatched(request("warmer"), a, 0.0)
    one.finished(request("warmer"), a, 0.5)
    longer = Prefix([11, 12, 13], [512, 1024, 1536], 1600, [(29, 1600), (19, 1100)], 0.25)
    asked = InferenceRequest("q", "m", True, 1600, prompt_tokens=400, prefix=longer)
    one.dispatched(asked, a, 1.0)
    assert a.work.own == Totals(queued=1, queued_tokens=125)
    one.first_token(asked, a, 2.0)
    assert a.work.own == Totals(running=1, running_tokens=400)
    one.finished(asked, a, 3.0, prompt_tokens=410, cached_tokens=280, output_tokens=20)
    assert a.work.own == NOTHING


def test_a_restarted_replica_is_believed_to_hold_nothing() -> None:
    a, one = replica("a"), router()
    a.epoch = "1"
    one.dispatched(request(), a, 1.0)
    one.finished(request(), a, 1.5)
    a.epoch = "2"
    one.state.slot(a)
    assert one.view(request(), 2.0).matches == {}


def test_a_replica_that_leaves_the_pool_is_forgotten_and_its_number_means_another() -> None:
    a, b, one = replica("a"), replica("b"), router()
    one.dispatched(request(), a, 1.0)
    one.finished(request(), a, 1.5)
    one.state.forget(a)
    one.state.slot(b)
    assert one.view(request(), 2.0).matches == {}


def test_peers_are_told_what_was_added_and_what_was_dropped() -> None:
    told: list[Change] = []
    state = PoolState()
    state.on_change = told.append
    a, one = replica("a"), router(state)
    one.dispatched(request("1"), a, 1.0)
    one.dispatched(request("2"), a, 1.0)  # nothing new
    one.failed(request("1"), a, 2.0)
    assert [(set(each.added), set(each.dropped)) for each in told] == [({11, 12, 19}, set()), (set(), {11, 12, 19})]
    assert all(len(each.added) == len(each.added_tokens) for each in told)


def test_an_answer_is_expected_to_be_as_long_as_it_was_when_its_replica_was_chosen() -> None:
    state = PoolState()
    one, asked, a = router(state), request(max_output_tokens=100), replica("a")
    decision = one.decide(asked, [a], 1.0)
    assert decision.output_tokens == state.calibration.output_tokens(asked) == 100.0
    decision.output_tokens = 7.0
    one.dispatched(asked, a, 1.0, decision)
    assert state.flights["q", a].output_tokens == 7.0
    other = request("other", max_output_tokens=50)
    one.dispatched(other, a, 1.0)  # nobody has decided
    assert state.flights["other", a].output_tokens == 50.0


def test_two_models_with_different_policies_keep_one_set_of_books() -> None:
    state = PoolState()
    cost, least = router(state), Router(LeastOutstanding(Random(1)), state)
    a = replica("a")
    cost.dispatched(request("1"), a, 1.0)
    least.dispatched(request("2"), a, 1.0)
    assert a.work.queued == 2
    cost.failed(request("1"), a, 2.0)
    least.finished(request("2"), a, 2.0)
    assert a.work.own == NOTHING


def test_events_of_a_request_that_was_never_sent_change_nothing() -> None:
    a, one = replica("a"), router()
    one.first_token(request(), a, 1.0)
    one.finished(request(), a, 1.0, cached_tokens=5)
    one.failed(request(), a, 1.0)
    assert a.work.own == NOTHING


def test_the_only_candidate_is_predicted_as_well() -> None:
    a, one = replica("a"), router()
    assert (one.decide(request(), [a], 1.0).predicted_ttft_ms or 0) > 0


events = st.lists(
    st.tuples(
        st.sampled_from(["dispatched", "first_token", "finished", "failed", "peer"]),
        st.integers(0, 3),
        st.integers(0, 2),
        st.integers(0, 900),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(events, st.integers(0, 5))
def test_after_any_events_nothing_is_left_in_the_books_once_all_has_ended(
    story: Sequence[tuple[str, int, int, int]], adapters: int
) -> None:
    fleet, one, now = [replica(name) for name in "abc"], router(), 0.0
    adapter = "lora" if adapters == 0 else None
    for what, number, place, amount in story:
        now += 0.1
        asked, target = request(f"q{number}", adapter=adapter), fleet[place]
        if what == "peer":
            target.work.peer(f"peer{number}", Totals(amount % 7, amount, amount % 3, 2 * amount), now)
        else:
            getattr(one, what)(asked, target, now)
        for each in fleet:
            assert min(each.work.own) >= 0
    for id, target in list(one.state.flights):
        one.finished(request(id, adapter=adapter), target, now + 1.0)
    for each in fleet:
        for name, _ in list(each.work.peers):
            each.work.peer(name, None, now)
        work = each.work
        assert (work.queued, work.queued_tokens, work.running, work.running_tokens) == NOTHING
        assert work.own == NOTHING
        assert each.adapter_use == {}


def test_a_prompt_goes_where_it_fits_and_where_it_fits_nowhere_the_engine_may_say_so() -> None:
    short, long, one = replica("short", context_tokens=300), replica("long", context_tokens=4000), router()
    asked = request(max_output_tokens=100)  # 275 and 100
    decision = one.decide(asked, [short, long], 1.0)
    assert decision.replica is long
    assert [(each.replica, each.reason) for each in decision.excluded] == [(short, "context_length")]
    assert one.decide(request(max_output_tokens=10), [short], 1.0).excluded == []
    nowhere = one.decide(asked, [short], 1.0)
    assert (nowhere.replica, nowhere.reason) == (short, "context_length")
    long.draining = True
    assert one.decide(asked, [short, long], 1.0).replica is short
    assert one.decide(asked, [short, long], 1.0, [short]).replica is None


def test_a_request_that_ends_at_a_replica_that_has_left_leaves_nothing_behind() -> None:
    a, one = replica("a"), router()
    one.dispatched(request("before", session="s"), a, 1.0)
    one.state.forget(a)
    one.dispatched(request("after", session="t"), a, 1.0)  # it waited under the configuration of then
    for id in ("before", "after"):
        one.first_token(request(id), a, 2.0)
        one.finished(request(id), a, 3.0, prompt_tokens=275, cached_tokens=0, output_tokens=9)
    one.dispatched(request("fails"), a, 3.0)
    one.failed(request("fails"), a, 4.0)
    state = one.state
    assert (state.slots, state.by_slot, state.flights, state.index.stats().targets) == ({}, {}, {}, {})
    assert state.calibration.known == 0
    assert state.sessions.keys() == {"s"}
    assert a.work.own == NOTHING


def test_where_all_are_busy_a_prompt_still_goes_where_it_fits() -> None:
    short = [replica(str(number), ceiling=0, context_tokens=100) for number in range(9)]
    enough = replica("enough", ceiling=0, context_tokens=1000)
    decision = router().decide(request(), [*short, enough], 1.0)
    assert (decision.replica, decision.reason) == (enough, "over_capacity")
    assert router().decide(request(), short, 1.0).replica in short, "it fits nowhere: the engine is left to say so"


def test_where_all_seem_unwell_a_prompt_still_goes_where_it_fits() -> None:
    short = [replica(str(number), context_tokens=100) for number in range(9)]
    enough = replica("enough", context_tokens=1000)
    for each in (*short, enough):
        each.cooldown.failed(1.0)
    decision = router().decide(request(), [*short, enough], 1.0)
    assert (decision.replica, decision.reason) == (enough, "all_cooling_down")
    assert len(decision.excluded) == len(short)


def test_a_replica_under_suspicion_where_the_prompt_fits_comes_before_a_well_one_where_it_does_not() -> None:
    short, long, one = replica("short", context_tokens=300), replica("long", context_tokens=4000), router()
    long.cooldown.failed(1.0)
    assert one.decide(request(max_output_tokens=100), [short, long], 1.0).replica is long
