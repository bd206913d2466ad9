"""The replicas as all workers together see them."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.roster import Roster, UnknownReplica


def state(name: str = "pool-0", **known: Any) -> dict[str, Any]:
    return {
        "name": name,
        "url": "http://127.0.0.1:1",
        "engine": "sglang",
        "region": None,
        "weight": 1.0,
        "max_in_flight": None,
        "ceiling": None,
        "capacity": {"requests": None, "tokens": None, "source": None},
        "in_flight": 0,
        "in_flight_bytes": 0,
        "available": known.get("unavailable_reason") is None,
        "unavailable_reason": None,
        "health": "healthy",
        "draining": False,
        "cordoned": False,
        "epoch": None,
        "load": None,
        "info": None,
        "adapters": [],
        "lacking": {},
        "refused_fields": [],
        **known,
    }


def answer(*replicas: dict[str, Any]) -> dict[str, Any]:
    return {"up": True, "pools": [{"name": "pool", "adapters": {}, "replicas": list(replicas)}]}


def test_counts_add_up_and_differences_are_shown_by_worker() -> None:
    cooling = state(in_flight=3, unavailable_reason="cooling_down", health="cooling_down")
    merged = Roster.of([(0, answer(state(in_flight=2))), (1, answer(cooling))]).merged("pool", "pool-0")
    assert (merged["in_flight"], merged["empty"], merged["available"]) == (5, False, False)
    assert merged["unavailable_reason"] == "cooling_down"
    assert [(each["worker"], each["available"], each["in_flight"]) for each in merged["workers"]] == [
        (0, True, 2),
        (1, False, 3),
    ]


def test_where_workers_agree_they_are_not_listed() -> None:
    merged = Roster.of([(0, answer(state(in_flight=1))), (1, answer(state()))]).merged("pool", "pool-0")
    assert (merged["workers"], merged["available"], merged["unavailable_reason"]) == ([], True, None)


def test_what_other_gateways_have_under_way_keeps_a_replica_from_being_empty() -> None:
    theirs = state(work={"queued": 0, "running": 1, "queued_tokens": 0, "running_tokens": 9})
    merged = Roster.of([(0, answer(theirs)), (1, answer(state()))]).merged("pool", "pool-0")
    assert (merged["in_flight"], merged["empty"]) == (0, False)


def test_a_worker_that_is_silent_may_still_have_work_there() -> None:
    merged = Roster.of([(0, answer(state())), (1, None), (2, {"worker": 2, "up": False})]).merged("pool", "pool-0")
    assert (merged["in_flight"], merged["empty"], merged["silent_workers"]) == (0, False, [1, 2])


def test_drained_is_what_every_worker_has_heard_of() -> None:
    half = Roster.of([(0, answer(state(draining=True))), (1, answer(state()))])
    assert not half.merged("pool", "pool-0")["draining"]
    assert not half.is_draining("pool", "pool-0", True)
    assert not half.is_draining("pool", "pool-0", False)


def test_the_newest_report_of_load_counts() -> None:
    old, new = {"age_s": 2.0, "running": 9}, {"age_s": 0.1, "running": 1}
    roster = Roster.of([(0, answer(state(load=old))), (1, answer(state(load=new))), (2, answer(state()))])
    assert roster.merged("pool", "pool-0")["load"] == new


@pytest.mark.parametrize(
    ("other", "last"),
    [
        ([], True),
        ([state("pool-1", draining=True, unavailable_reason="draining")], True),
        ([state("pool-1", unavailable_reason="cooling_down")], True),
        ([state("pool-1", unavailable_reason="full")], False),
        ([state("pool-1")], False),
    ],
    ids=["alone", "drained", "ill", "full", "well"],
)
def test_the_last_is_the_one_beside_which_none_takes_work(other: list[dict[str, Any]], last: bool) -> None:
    assert Roster.of([(0, answer(state(), *other))]).is_last("pool", "pool-0") is last


def test_one_worker_that_can_use_another_replica_is_enough() -> None:
    ill = state("pool-1", unavailable_reason="cooling_down")
    assert not Roster.of([(0, answer(state(), ill)), (1, answer(state(), state("pool-1")))]).is_last("pool", "pool-0")


@pytest.mark.parametrize(
    ("pool", "replica", "said"),
    [
        ("pool", "pool-11", r"has no replica 'pool-11'; did you mean pool-1\? There are: pool-0, pool-1\."),
        ("pool", "x", r"has no replica 'x'; there are: pool-0, pool-1\."),
        ("pol", "pool-0", r"no pool 'pol'; did you mean pool\? There are: pool\."),
    ],
)
def test_an_unknown_name_is_answered_with_those_there_are(pool: str, replica: str, said: str) -> None:
    with pytest.raises(UnknownReplica, match=said):
        Roster.of([(0, answer(state(), state("pool-1")))]).merged(pool, replica)


def test_adapters_are_listed_by_name_with_who_holds_them() -> None:
    held = [{"name": "a", "path": "/a", "id": None, "resident": True}]
    cold = [{"name": "b", "path": "/b", "id": None, "resident": False}]
    reply = answer(
        state(adapters=held), state("pool-1", adapters=cold), state("pool-2", lacking={"adapters": "it has none"})
    )
    reply["pools"][0]["adapters"] = {"wanted": "/w"}
    listed = Roster.of([(0, reply)]).adapters(["pool"])
    assert [(each["name"], each["path"], each["replicas"], each["configured"]) for each in listed["adapters"]] == [
        ("a", "/a", ["pool-0"], False),
        ("wanted", "/w", [], True),
    ]
    assert listed["lacking"] == [{"pool": "pool", "replica": "pool-2", "reason": "it has none"}]
