"""Which LoRA adapters may be loaded where, and which one goes: slots, use, and no taking turns without end."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing import adapters
from routing.adapters import MAX_HOLD_S, NO_SLOT, NOT_THERE, REFUSED_S, Shelf, hold_s, obstacle, victim
from routing.filters import exclusion_reason
from routing.policies import make_policy
from routing.router import PoolState, Router
from routing.types import InferenceRequest, Replica

NAMES = tuple(f"lora-{number}" for number in range(8))


def replica(*held: str, slots: int | None = 2, **fields: object) -> Replica:
    fields.setdefault("loadable", frozenset(NAMES))
    return Replica(
        "r",
        "pool",
        "http://x",
        "sglang",
        adapters=frozenset(held),
        adapter_slots=slots,
        **fields,  # type: ignore[arg-type]
    )


def request(adapter: str | None, number: int = 1) -> InferenceRequest:
    return InferenceRequest(f"req_{number}", "m", stream=False, prompt_bytes=1, adapter=adapter)


def test_what_is_there_or_can_be_loaded_is_no_obstacle() -> None:
    assert obstacle("lora-0", replica("lora-0"), 0.0) is None
    assert obstacle("lora-1", replica("lora-0"), 0.0) is None
    assert obstacle("lora-2", replica("lora-0", "lora-1"), 0.0) is None  # in place of one that nobody uses
    assert obstacle("lora-2", replica("lora-0", "lora-1", slots=None), 0.0) is None
    assert obstacle("other", replica("lora-0"), 0.0) == NOT_THERE
    assert obstacle("lora-1", replica("lora-0", loadable=frozenset()), 0.0) == NOT_THERE


def test_where_nothing_is_known_there_is_nothing() -> None:
    unknown = replica()
    unknown.adapters = None
    assert obstacle("lora-0", unknown, 0.0) == NOT_THERE


def test_slots_that_are_all_in_use_are_waited_for_after_all_else() -> None:
    busy = replica("lora-0", "lora-1", adapter_use={"lora-0": 1, "lora-1": 2})
    assert obstacle("lora-2", busy, 0.0) == NO_SLOT
    assert obstacle("lora-0", busy, 0.0) is None
    assert exclusion_reason(request("lora-2"), busy, 0.0, ()) == NO_SLOT
    assert exclusion_reason(request("lora-2"), busy, 0.0, [busy]) == "already_tried"
    busy.ceiling = busy.in_flight = 1
    assert exclusion_reason(request("lora-2"), busy, 0.0, ()) == NO_SLOT
    busy.max_in_flight = 1
    assert exclusion_reason(request("lora-2"), busy, 0.0, ()) == "full"
    busy.draining = True
    assert exclusion_reason(request("lora-2"), busy, 0.0, ()) == "draining"


def test_beside_adapters_that_never_go_there_is_room_for_one_at_least() -> None:
    own = replica("started-with", "loaded-by-hand")
    assert obstacle("lora-2", own, 0.0) is None
    assert victim(own, (), 0.0) is None
    own.adapters = frozenset({"started-with", "loaded-by-hand", "lora-1"})
    own.adapter_use["lora-1"] = 1
    assert obstacle("lora-2", own, 0.0) == NO_SLOT
    own.adapter_use.clear()
    assert obstacle("lora-2", own, 0.0) is None
    assert victim(own, (), 0.0) == "lora-1"


def test_what_is_being_loaded_takes_a_slot() -> None:
    one = replica("lora-0", loading=frozenset({"lora-1"}), adapter_use={"lora-0": 1})
    assert obstacle("lora-1", one, 0.0) is None
    assert obstacle("lora-2", one, 0.0) == NO_SLOT


def test_the_longest_unused_goes_and_never_one_in_use() -> None:
    one = replica(*NAMES[:4], slots=4)
    one.shelf.used = {"lora-0": 4.0, "lora-1": 1.0, "lora-2": 2.0, "lora-3": 3.0}
    assert victim(one, (), 100.0) == "lora-1"
    one.adapter_use["lora-1"] = 1
    assert victim(one, (), 100.0) == "lora-2"
    assert victim(one, {"lora-2"}, 100.0) == "lora-3"  # the engine says that somebody else uses it


def test_one_that_was_just_loaded_stays_for_some_loads() -> None:
    one = replica("lora-0", slots=1)
    one.speed.adapter_ms = 200.0
    one.shelf.begin(frozenset({"lora-0"}), frozenset(), 50.0)
    assert hold_s(one.speed) == pytest.approx(2.0)
    assert obstacle("lora-1", one, 51.9) == NO_SLOT
    assert victim(one, (), 51.9) is None
    assert victim(one, (), 52.1) == "lora-0"
    assert obstacle("lora-1", one, 52.1) is None
    one.speed.adapter_ms = 60_000.0
    assert hold_s(one.speed) == MAX_HOLD_S


def test_what_was_there_before_anybody_looked_has_not_just_been_loaded() -> None:
    shelf = Shelf()
    shelf.begin(frozenset({"a"}), None, 5.0)
    assert shelf.since == {}
    shelf.begin(frozenset({"a", "b"}), frozenset({"a"}), 6.0)
    assert shelf.since == {"b": 6.0}


def test_names_that_are_gone_do_not_add_up() -> None:
    shelf = Shelf()
    for number in range(10_000):
        shelf.begin(frozenset({f"lora-{number}"}), frozenset(), float(number))
        shelf.used[f"lora-{number}"] = float(number)
        shelf.refuse(f"bad-{number}", float(number))
    assert len(shelf.since) < 100
    assert len(shelf.used) < 100
    assert len(shelf.refused_until) < 100


def test_an_adapter_that_was_refused_is_not_asked_for_again_at_once() -> None:
    one = replica()
    one.shelf.refuse("lora-0", 10.0)
    assert obstacle("lora-0", one, 10.0 + REFUSED_S - 0.1) == NOT_THERE
    assert obstacle("lora-1", one, 10.0) is None
    assert obstacle("lora-0", one, 10.0 + REFUSED_S) is None


def test_the_oldest_is_to_go_next_where_all_are_always_used() -> None:
    one = replica("lora-0", "lora-1", adapter_use={"lora-0": 1, "lora-1": 1})
    one.shelf.since = {"lora-0": 5.0, "lora-1": 1.0}
    assert victim(one, (), 100.0) is None
    assert adapters.next_to_go(one, 100.0) == "lora-1"
    assert adapters.next_to_go(one, 1.1) is None


def test_loading_times_are_learned() -> None:
    one = replica()
    before = one.speed.version
    adapters.learn_load(one, 1000.0)
    assert one.speed.adapter_ms == pytest.approx(1000.0)
    for _ in range(50):
        adapters.learn_load(one, 400.0)
    assert one.speed.adapter_ms == pytest.approx(400.0, rel=0.01)
    assert one.speed.version == before + 51


def test_a_policy_that_does_not_weigh_adapters_stays_where_they_are_loaded() -> None:
    fleet = [replica("lora-0" if place == 2 else "lora-1") for place in range(4)]
    spread = Router(make_policy("round_robin", Random(1)), PoolState(), Random(1))
    asked = request("lora-0")
    assert len({id(spread.decide(asked, fleet, 0.0).replica) for _ in range(8)}) == 4
    stays = Router(make_policy("round_robin", Random(1)), PoolState(), Random(1), stay_where_loaded=True)
    assert {id(stays.decide(asked, fleet, 0.0).replica) for _ in range(8)} == {id(fleet[2])}
    assert stays.decide(request("lora-7"), fleet, 0.0).replica in fleet
    fleet[1].adapter_slots = fleet[3].adapter_slots = fleet[2].adapter_slots = 1
    assert {id(stays.decide(request("lora-7"), fleet, 0.0).replica) for _ in range(8)} == {id(fleet[0])}
    fleet[2].draining = True
    assert stays.decide(asked, fleet, 0.0).replica in (fleet[0], fleet[1], fleet[3])


def test_where_every_slot_is_in_use_the_request_waits_at_one_of_them() -> None:
    fleet = [replica("lora-0", "lora-1", adapter_use={"lora-0": 1, "lora-1": 1}) for _ in range(2)]
    router = Router(make_policy("cost", Random(1)), PoolState(), Random(1))
    decision = router.decide(request("lora-2"), fleet, 0.0)
    assert decision.replica in fleet
    assert decision.reason == NO_SLOT
    assert [each.reason for each in decision.excluded] == [NO_SLOT]
    fleet[0].adapter_use.clear()
    decision = router.decide(request("lora-2"), fleet, 0.0)
    assert decision.replica is fleet[0]


class Keeper:
    """Carries out what the rules say, in no time: what `gateway.adapters` does with real engines."""

    def __init__(self, one: Replica) -> None:
        self.replica = one
        self.loads: list[float] = []

    def ensure(self, name: str, now: float) -> bool:
        one = self.replica
        held = one.adapters or frozenset()
        if name in held:
            return True
        if adapters.lacking_slots(one) > 0:
            gone = victim(one, (), now)
            if gone is None:
                return False
            assert gone not in one.adapter_use
            left = held - {gone}
            one.shelf.begin(left, held, now)
            held = one.adapters = left
        one.shelf.begin(held | {name}, held, now)
        one.adapters = held | {name}
        self.loads.append(now)
        return True


steps = st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 7), st.booleans()), max_size=120)


@settings(max_examples=200)
@given(steps, st.integers(1, 4))
def test_slots_are_never_exceeded_and_what_is_in_use_stays(
    story: Sequence[tuple[float, int, bool]], slots: int
) -> None:
    one = replica(slots=slots)
    keeper, router, now = Keeper(one), Router(make_policy("cost", Random(1)), PoolState(), Random(1)), 0.0
    under_way: list[InferenceRequest] = []
    for number, (pause, which, ends) in enumerate(story):
        now += pause
        if ends and under_way:
            router.finished(under_way.pop(which % len(under_way)), one, now)
        asked = request(NAMES[which], number)
        may = exclusion_reason(asked, one, now, ()) is None
        # The filter and the keeper agree.
        assert keeper.ensure(NAMES[which], now) == may
        if may:
            router.dispatched(asked, one, now)
            under_way.append(asked)
        assert len(one.adapters or ()) <= slots
        assert one.adapter_use.keys() <= (one.adapters or frozenset())


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_a_replica_spends_a_bounded_share_of_its_time_loading(slots: int, seed: int) -> None:
    """Wanted by turns as fast as can be, adapters are loaded at most `slots` times in each hold."""
    one, rng, now = replica(slots=slots), Random(seed), 0.0
    keeper = Keeper(one)
    while now < 60.0:
        keeper.ensure(rng.choice(NAMES), now)
        now += 0.05
    hold = hold_s(one.speed)
    assert len(keeper.loads) <= slots * (60.0 / hold + 1)
    for early, late in zip(keeper.loads, keeper.loads[slots:], strict=False):
        assert late - early >= hold - 1e-9
