"""The compiled tree (scripts/compiled.py): that it is compiled, and what users rely on there. `make test-compiled`."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from random import Random

import pytest

from routing.explain import rehearsal
from routing.keys import block_prefix, seed_of
from routing.policies import PolicyError, make_policy
from routing.policies.cost import Cost
from routing.router import Router
from routing.types import InferenceRequest, Replica, View

ROOT = Path(__file__).parents[2]
MODULES: Sequence[str] = runpy.run_path(str(ROOT / "scripts" / "compiled.py"))["modules"]()
COMPILED = (ROOT / ".made-by-compiled").exists()
only_compiled = pytest.mark.skipif(not COMPILED, reason="about the compiled tree; this is the interpreted one")


@only_compiled
@pytest.mark.parametrize("name", MODULES)
def test_the_module_is_the_compiled_one_of_this_tree(name: str) -> None:
    file = import_module(name).__file__
    assert file is not None
    assert file.endswith(".so")
    assert Path(file).is_relative_to(ROOT)


@pytest.mark.skipif(COMPILED, reason="about the interpreted tree; this is the compiled one")
@pytest.mark.parametrize("name", MODULES)
def test_nothing_compiled_lies_beside_the_sources(name: str) -> None:
    """It would hide every later change of them."""
    file = import_module(name).__file__
    assert file is not None
    assert file.endswith(".py")


def fleet() -> list[Replica]:
    return [Replica(f"r{number}", "pool", f"http://r{number}", "sglang") for number in range(3)]


def request(id: str = "id-1") -> InferenceRequest:
    prompt = block_prefix([17, 18, 19], block_tokens=512, total_tokens=1400, seed=seed_of("m"))
    return InferenceRequest(id, "m", stream=True, prompt_bytes=5600, prompt_tokens=1400, prefix=prompt)


@pytest.mark.parametrize(("name", "reason"), [("choose", None), ("Inheriting", "the last")])
def test_a_users_policy_is_loaded_by_path_decides_and_is_told(
    name: str, reason: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    router = Router(make_policy(f"users_policies:{name}", Random(1)), rng=Random(2))
    replicas = fleet()
    for number in range(4):
        asked = request(f"id-{number}")
        decision = router.decide(asked, replicas, float(number))
        assert decision.replica in replicas
        assert decision.replica is not None
        if reason is not None:
            assert decision.replica.name == "r2"
            assert decision.reason == reason
        router.dispatched(asked, decision.replica, float(number))
        router.first_token(asked, decision.replica, number + 0.1)
    assert not caplog.records  # which it would have if another policy had had to decide


def test_a_policy_that_inherits_from_ours_works_or_is_refused_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, `Cost` is no base for what is not; that is said at the start, not by the first request."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    if COMPILED:
        with pytest.raises(PolicyError, match="cannot inherit from compiled"):
            make_policy("users_policies:Heavier", Random(1))
    else:
        assert make_policy("users_policies:Heavier", Random(1)).name == "heavier"


def test_the_default_policy_can_be_copied_with_its_weights_and_rehearsed() -> None:
    cost = Cost(Random(1))
    cost.weights = replace(cost.weights, decode=7.0)
    for twin in (deepcopy(cost), copy(cost), rehearsal(cost, 5)):
        assert isinstance(twin, Cost)
        assert twin is not cost
        assert twin.weights.decode == 7.0


def test_what_policies_are_handed_can_be_copied_and_replaced() -> None:
    asked = request()
    assert copy(asked) == asked
    assert replace(asked, model="other").model == "other"
    view = View(0.0, Random(1), {}, 64.0, None)
    assert replace(view, matches={}).now == 0.0
