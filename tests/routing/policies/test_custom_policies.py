"""Policies by Python path: what is accepted, what is refused, and that none can stop the router."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from routing.policies import POLICY_NAMES, PolicyError, make_policy
from routing.router import Router
from routing.types import InferenceRequest, Replica, View
from tests.routing.policies.examples import NOW, replica, replicas, request, view

HERE = "tests.routing.policies.test_custom_policies"


def last(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
    return candidates[-1]


class Second:
    name = "second"
    wants_prefix = False

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        view.reason = "second_of_many"
        return candidates[1]

    def method(self) -> None: ...


def factory(rng: Random) -> Second:
    return Second(rng)


instance = Second(Random(1))


def raises(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
    view.reason = "about to fail"
    raise RuntimeError("by the test")


def nothing(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> None:
    return None


def stranger(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
    return replica("stranger")


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("by the test")

    __hash__ = None  # type: ignore[assignment]


def odd(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Unequal:
    return Unequal()


def untidy(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
    view.reason = "two\r\nlines"
    view.predicted_ttft_ms = "soon"  # type: ignore[assignment]
    return candidates[0]


async def coroutine(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
    return candidates[0]


def of_two(request: InferenceRequest, candidates: Sequence[Replica]) -> Replica:
    return candidates[0]


def failing_factory(rng: Random) -> Second:
    raise RuntimeError("by the test")


def empty_factory(rng: Random) -> None:
    return None


class NoRng:
    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        return candidates[0]


number = 7


@pytest.mark.parametrize("attribute", ["Second", "factory", "instance"])
def test_a_class_a_factory_and_an_object_become_a_policy(attribute: str) -> None:
    policy = make_policy(f"{HERE}:{attribute}", Random(1))
    assert (policy.name, policy.wants_prefix) == ("second", False)
    fleet = replicas(3)
    seen = view()
    assert policy(request(), fleet, seen) is fleet[1]
    assert seen.reason == "second_of_many"


def test_a_function_is_named_by_its_path_and_is_shown_matches() -> None:
    policy = make_policy(f"{HERE}:last", Random(1))
    assert policy.name == f"{HERE}:last"[:64]
    assert policy.wants_prefix
    fleet = replicas(3)
    assert policy(request("abc"), fleet, view()) is fleet[-1]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fastest", "no such policy; one of cost, random"),
        ("", "no such policy"),
        (":", "not of the form"),
        (f"{HERE}:", "not of the form"),
        (f"{HERE}:1", "not of the form"),
        (".policies:last", "not of the form"),
        ("no.such.module:last", "cannot import no.such.module: ModuleNotFoundError"),
        (f"{HERE}:none_such", "has no none_such"),
        (f"{HERE}:number", "not callable but int"),
        (f"{HERE}:of_two", "takes neither"),
        (f"{HERE}:NoRng", "takes neither"),
        (f"{HERE}:coroutine", "not an ordinary callable"),
        (f"{HERE}:failing_factory", "raised RuntimeError when called with a random.Random: by the test"),
        (f"{HERE}:empty_factory", "returned no callable but NoneType"),
        (f"{HERE}:Second.method", "not an ordinary callable|takes neither|returned no callable"),
    ],
)
def test_what_is_no_policy_is_refused_by_name_and_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why) as caught:
        make_policy(name, Random(1))
    assert str(caught.value).startswith(f"{name}:")


@pytest.mark.parametrize("error", ["KeyError", "SystemExit"])
def test_a_module_that_fails_as_it_is_imported_is_refused(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_policy_module.py").write_text(f"raise {error}('by the test')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PolicyError, match=f"cannot import broken_policy_module: {error}"):
        make_policy("broken_policy_module:last", Random(1))
    assert "broken_policy_module" not in sys.modules


@pytest.mark.parametrize(
    ("attribute", "complaint"),
    [
        ("raises", "raised RuntimeError"),
        ("nothing", "returned a NoneType, which is not among the candidates"),
        ("stranger", "returned replica stranger, which is not"),
        ("odd", "returned a Unequal"),
    ],
)
def test_one_that_fails_is_replaced_by_least_outstanding_and_logged_once(
    attribute: str, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = make_policy(f"{HERE}:{attribute}", Random(1))
    idle, busy = replica("idle"), replica("busy", in_flight=3)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            seen = view()
            assert policy(request("abc"), [busy, idle], seen) is idle
            assert seen.reason == ""
    assert len(caplog.records) == 1
    assert complaint in caplog.text
    assert f"{HERE}:{attribute}" in caplog.text


def test_one_that_empties_the_list_it_was_given_harms_nobody() -> None:
    fleet = replicas(2)
    assert make_policy(f"{HERE}:clears", Random(1))(request(), fleet, view()) in fleet
    assert len(fleet) == 2


def clears(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
    candidates.clear()  # type: ignore[attr-defined]
    raise AssertionError


def meddles(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
    request.regions = ()
    view.matches.clear()  # type: ignore[attr-defined]
    view.matches = None  # type: ignore[assignment]
    return candidates[0]


def test_one_that_changes_what_it_was_shown_changes_neither_the_request_nor_the_decision() -> None:
    locked = request(regions=("eu",))
    there, seen = replica("there", region="eu"), view()
    seen.matches = {there: 128}
    assert make_policy(f"{HERE}:meddles", Random(1))(locked, [there], seen) is there
    assert (locked.regions, seen.matches) == (("eu",), {there: 128})


def test_what_it_leaves_for_headers_must_be_fit_for_them() -> None:
    seen = view()
    make_policy(f"{HERE}:untidy", Random(1))(request(), replicas(2), seen)
    assert (seen.reason, seen.predicted_ttft_ms) == ("", None)


def test_the_router_survives_it() -> None:
    router = Router(make_policy(f"{HERE}:raises", Random(1)))
    idle, busy = replica("idle"), replica("busy", in_flight=3)
    decision = router.decide(request(), [busy, idle], NOW)
    assert (decision.replica, decision.reason) == (idle, router.name)


def test_every_name_makes_a_policy_of_that_name() -> None:
    assert POLICY_NAMES[0] == "cost"
    assert [make_policy(name, Random(1)).name for name in POLICY_NAMES] == list(POLICY_NAMES)
