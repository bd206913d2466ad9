"""Which order follows a failed one: chains of spills and fallbacks whose errors are drawn by chance, and each rule."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.refusals import QueueFull, QueueTimeout
from gateway.config import Settings
from gateway.errors import (
    Draining,
    GatewayError,
    InternalError,
    InvalidRequest,
    NoReplicaAvailable,
    StreamInterrupted,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamTimeout,
)
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.keys.records import KeyRecord
from gateway.ledger import Ledger
from gateway.limits.errors import RateLimited
from gateway.metrics import Metrics
from gateway.order import CHAT, EMBEDDINGS, Call, Order, read_order
from gateway.record import Exchange, Outcome
from gateway.runtime import Runtime
from gateway.store.places import Entry, State
from gateway.upstream_errors import UpstreamRejected, UpstreamStalled

NOBODY = Principal(None, ANONYMOUS)
POOLS = ("p0", "p1", "p2", "rented")


def entry(reason: str) -> Entry:
    return Entry(State.REFUSED, reason=reason)


def key_with(**fields: Any) -> KeyRecord:
    return KeyRecord(id="k", digest=b"", tenant="default", **fields)


def limited() -> UpstreamOverloaded:
    error = UpstreamOverloaded("Too many.", code="rate_limit_exceeded")
    error.status = 429
    return error


MOVES: dict[str, GatewayError] = {
    "no_replica": NoReplicaAvailable("None."),
    "queue_refused": QueueFull(entry("pool_full")),
    "queue_timeout": QueueTimeout(1.0),
    "rate_limited": limited(),
    "overloaded": UpstreamOverloaded("Busy."),
    "failed": UpstreamFailed("No."),
    "disconnected": UpstreamFailed("No.", code="upstream_disconnected"),
    "truncated": StreamInterrupted("No.", code="upstream_truncated"),
    "credential_refused": UpstreamFailed("No.", code="upstream_auth_failed"),
    "timeout": UpstreamStalled("Late.", code="first_token_timeout"),
}
OWN: dict[str, GatewayError] = {
    "bad": InvalidRequest("Bad."),
    "rejected": UpstreamRejected(400, "Bad."),
    "too_large": UpstreamRejected(413, "Bad."),
    "limited": RateLimited("Slow down.", retry_after_s=1.0),
    "tenant_full": QueueFull(entry("tenant_full")),
    "draining": Draining("Over."),
    "internal": InternalError("Oh."),
}
ERRORS = {**MOVES, **OWN}


def configuration(models: dict[str, Any], **sections: Any) -> Settings:
    backends: dict[str, Any] = {
        name: {"engine": "openai", "hosted": name == "rented", "replicas": [{"url": f"http://{name}", "region": "eu"}]}
        for name in POOLS
    }
    for name, fields in sections.items():
        backends[name] = {**backends[name], **fields}
    return Settings(models=models, backends=backends)


SPILL = {"backend": "rented", "price": {"input": 1.0}, "usd_per_hour": 100, "usd_per_day": 100}


class Case:
    """One request and what follows its failures."""

    def __init__(
        self, runtime: Runtime, model: str = "m", caller: Principal = NOBODY, path: str = CHAT, **fields: Any
    ) -> None:
        self.runtime, self.caller = runtime, caller
        headers = [(name.encode(), value.encode()) for name, value in fields.pop("headers", {}).items()]
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
        self.call = Call(path, headers, body, time.monotonic())
        self.exchange: Exchange = runtime.begin(self.call)
        self.exchange.tenant = "default"
        self.order: Order = read_order(self.call, runtime.fleet, self.exchange.request_id, caller)

    @property
    def place(self) -> tuple[str, str, str | None]:
        route = self.order.route
        return route.pool.name, route.upstream_model or route.model, route.adapter

    def fails(self, error: GatewayError, now: float | None = None) -> Order | None:
        now = time.monotonic() if now is None else now
        other = self.runtime.fallbacks.instead(self.order, self.exchange, self.caller, error, now)
        self.order = other or self.order
        return other

    def outcome(self, error: GatewayError) -> tuple[Order | None, GatewayError | None]:
        """The next order, or none and the error that is told in place of this one."""
        try:
            return self.fails(error), None
        except GatewayError as told:
            return None, told

    def gone_through(self, error: GatewayError) -> list[tuple[str, str]]:
        """Pool and upstream model of everything that is asked when each fails like this."""
        found = []
        while (other := self.fails(error)) is not None:
            found.append((other.route.pool.name, other.route.upstream_model or ""))
        return found


def runtime_of(settings: Settings) -> Runtime:
    return Runtime(settings, None, Metrics(), Ledger(None))


def chain(model: dict[str, Any], **more: Any) -> Runtime:
    """A gateway whose model m has these settings; `small` and `big` are at p1 and p2."""
    sections = more.pop("sections", {})
    models = {
        "m": {"backend": "p0", **model},
        "small": {"backend": "p1", "upstream_model": "org/small", "price": {"input": 0.5}},
        "big": {"backend": "p2", "fallbacks": ["m"], "timeouts": {"total_s": 5}},
        **more,
    }
    return runtime_of(configuration(models, **sections))


# The whole of it, by chance.

NAMES = ("m0", "m1", "m2", "m3")
ENTRIES = st.one_of(
    st.sampled_from(NAMES),
    st.builds(
        lambda backend, upstream_model: {"backend": backend, "upstream_model": upstream_model},
        st.sampled_from(POOLS),
        st.none() | st.sampled_from(["x", "y"]),
    ),
)
MODELS = st.fixed_dictionaries(
    {
        name: st.builds(
            lambda pool, entries, spills, name=name: {
                "backend": pool,
                "fallbacks": [each for each in entries if each != name],
                "spill": SPILL if spills and pool != "rented" else None,
            },
            st.sampled_from(POOLS),
            st.lists(ENTRIES, max_size=6),
            st.booleans(),
        )
        for name in NAMES
    }
)


@given(models=MODELS, errors=st.lists(st.sampled_from(sorted(ERRORS)), min_size=1, max_size=30), data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_chain_ends_and_asks_nobody_twice(models: dict[str, Any], errors: list[str], data: st.DataObject) -> None:
    allowed = data.draw(st.sets(st.sampled_from(NAMES), min_size=1))
    asked = data.draw(st.sampled_from(sorted(allowed)))
    key = key_with(models=tuple(sorted(allowed)))

    async def go() -> None:
        runtime = runtime_of(configuration(models))
        case = Case(runtime, asked, Principal(key, ANONYMOUS))
        home, came_home, spilled, steps = case.place, 0, 0, 0
        fell_to: list[tuple[str, str, str | None]] = []
        first: GatewayError | None = None
        for name in errors * 20:
            error = ERRORS[name]
            before, away = case.exchange.fallback_from, case.exchange.spill
            first = error if not before else first
            other, told = case.outcome(error)
            if other is None:
                refused = bool(before) and error.outcome in (Outcome.REJECTED, Outcome.UPSTREAM_REJECTED)
                assert told is (first if refused else None)
                break
            steps += 1
            assert before or away or name in MOVES  # what a rented replica refuses comes home
            assert case.order.route.model in allowed
            if case.exchange.fallback_from:
                assert case.exchange.fallback_from == asked
                assert case.place not in fell_to
                assert case.place != home
                fell_to.append(case.place)
            elif case.exchange.spill:
                spilled += 1
            else:
                came_home += 1
        else:
            raise AssertionError("it never ends")
        assert steps <= len(models[asked]["fallbacks"]) + 2
        assert max(spilled, came_home) <= 1
        runtime.settle(case.exchange)
        assert runtime.fallbacks._chains == {}
        await runtime.aclose()

    asyncio.run(go())


# The rules one by one.


async def test_the_entries_are_asked_in_their_order_and_only_the_list_of_the_model_asked_for() -> None:
    runtime = chain({"fallbacks": ["small", {"backend": "p1", "upstream_model": "m-there"}, "big"]})
    case = Case(runtime)
    assert case.gone_through(MOVES["failed"]) == [("p1", "org/small"), ("p1", "m-there"), ("p2", "big")]
    await runtime.aclose()


@pytest.mark.parametrize("name", MOVES)
async def test_what_another_pool_may_not_have_goes_there(name: str) -> None:
    runtime = chain({"fallbacks": ["small"]})
    assert Case(runtime).fails(MOVES[name]) is not None
    await runtime.aclose()


@pytest.mark.parametrize("name", OWN)
async def test_what_is_the_same_anywhere_goes_nowhere(name: str) -> None:
    runtime = chain({"fallbacks": ["small"]})
    assert Case(runtime).fails(OWN[name]) is None
    await runtime.aclose()


async def test_what_a_fallback_refuses_is_not_what_the_client_hears() -> None:
    runtime = chain({"fallbacks": ["small", "big"]})
    case = Case(runtime)
    assert case.fails(MOVES["overloaded"]) is not None
    assert case.fails(OWN["rejected"]) is not None
    with pytest.raises(UpstreamOverloaded):
        case.fails(OWN["limited"])
    await runtime.aclose()


async def test_a_key_that_has_ended_asks_nobody_any_more() -> None:
    runtime = chain({"fallbacks": ["small", "big"]})
    case = Case(runtime)
    case.fails(MOVES["failed"])
    ended = InvalidRequest("Ended.")
    ended.status = 401
    with pytest.raises(UpstreamFailed):
        case.fails(ended)
    await runtime.aclose()


async def test_nothing_is_asked_past_the_deadline_of_the_model_asked_for() -> None:
    runtime = chain({"fallbacks": ["small", "big"], "timeouts": {"total_s": 30}})
    case = Case(runtime)
    began = case.exchange.started_at
    order = case.fails(MOVES["failed"], began + 29.9)
    assert order is not None
    assert order.total_s == 30
    assert case.fails(UpstreamTimeout("Late."), began + 30.0) is None
    await runtime.aclose()


async def test_a_request_that_two_pools_broke_off_goes_no_further() -> None:
    runtime = chain({"fallbacks": ["small", "big"]})
    assert Case(runtime).gone_through(MOVES["disconnected"]) == [("p1", "org/small")]
    await runtime.aclose()


async def test_the_order_is_for_the_other_model_and_its_prompt_is_read_anew() -> None:
    runtime = chain({"fallbacks": ["small"]})
    case = Case(runtime, headers={"x-tidegate-region": "eu"}, max_tokens=7)
    request = case.order.request
    request.prompt_tokens = 99
    order = case.fails(MOVES["failed"])
    assert order is not None
    assert (order.route.name, order.route.price.input if order.route.price else None) == ("small", 0.5)
    assert (order.request.model, order.request.prompt_tokens, order.request.prefix) == ("small", 0, None)
    assert (order.request.regions, order.request.max_output_tokens) == (("eu",), 7)
    assert request.model == "m"  # nobody changes one after it was made
    await runtime.aclose()


async def test_the_same_model_elsewhere_has_that_pools_timeouts_price_and_a_router_that_stays() -> None:
    entry = {"backend": "p1", "price": {"input": 3.0}}
    runtime = chain({"fallbacks": [entry]}, sections={"p1": {"timeouts": {"first_token_s": 7}}})
    one, two = (Case(runtime).fails(MOVES["failed"]) for _ in range(2))
    assert one is not None
    assert two is not None
    assert (one.route.name, one.route.pool.name, one.route.timing.first_token_s) == ("m", "p1", 7)
    assert one.route.price is not None
    assert one.route.price.input == 3.0
    assert one.route.router is two.route.router
    assert one.route.router is not runtime.fleet.models["m"].router
    runtime.reload(runtime.settings)
    three = Case(runtime).fails(MOVES["failed"])
    assert three is not None
    assert three.route.router is one.route.router
    await runtime.aclose()


async def test_a_key_is_not_lent_a_model_that_it_may_not_use() -> None:
    runtime = chain({"fallbacks": ["small", "big"]})
    key = key_with(models=("m", "big"))
    assert Case(runtime, "m", Principal(key, ANONYMOUS)).gone_through(MOVES["failed"]) == [("p2", "big")]
    await runtime.aclose()


async def test_a_lock_to_regions_holds_on_every_way() -> None:
    elsewhere = {"p1": {"replicas": [{"url": "http://p1", "region": "us"}]}}
    runtime = chain({"fallbacks": ["small", {"backend": "p1"}, "big"]}, sections=elsewhere)
    case = Case(runtime, headers={"x-tidegate-region": "eu"})
    assert case.gone_through(MOVES["failed"]) == [("p2", "big")]
    await runtime.aclose()


async def test_a_field_that_the_other_pool_reserves_keeps_it_away() -> None:
    runtime = chain({"fallbacks": ["small", "big"]}, sections={"p1": {"engine": "sglang"}})
    reserved = sorted(runtime.fleet.pools["p1"].rules.refused - runtime.fleet.pools["p0"].rules.refused)[0]
    fields: dict[str, Any] = {reserved: 1}
    assert Case(runtime, **fields).gone_through(MOVES["failed"]) == [("p2", "big")]
    await runtime.aclose()


@pytest.mark.parametrize("whose", ["key", "tenant"])
async def test_who_has_said_never_is_not_sent_to_rented_replicas(whose: str) -> None:
    runtime = chain({"fallbacks": [{"backend": "rented"}, "small"]})
    note = {"spill": "never"}
    key = key_with(metadata=note if whose == "key" else {})
    tenant = ANONYMOUS
    if whose == "tenant":
        tenant = type(ANONYMOUS)(name="default", metadata=note)
    assert Case(runtime, "m", Principal(key, tenant)).gone_through(MOVES["failed"]) == [("p1", "org/small")]
    await runtime.aclose()


async def test_a_model_that_is_rented_itself_may_go_to_other_rented_ones() -> None:
    runtime = chain({"backend": "rented", "fallbacks": [{"backend": "p1"}]}, sections={"p1": {"hosted": True}})
    key = key_with(metadata={"spill": "never"})
    assert Case(runtime, "m", Principal(key, ANONYMOUS)).gone_through(MOVES["failed"]) == [("p1", "")]
    await runtime.aclose()


async def test_embeddings_are_never_another_models() -> None:
    runtime = chain({"fallbacks": ["small", {"backend": "p2"}]})
    case = Case(runtime, path=EMBEDDINGS, input="hi")
    assert case.gone_through(MOVES["failed"]) == [("p2", "")]
    await runtime.aclose()


async def test_an_adapter_goes_only_where_it_is() -> None:
    files = {"adapters": [{"name": "tune", "path": "/a"}], "engine": "vllm"}
    runtime = chain(
        {"fallbacks": ["small", {"backend": "p1"}, "big", {"backend": "p2"}]}, sections={"p0": files, "p2": files}
    )
    case = Case(runtime, "m:tune")
    assert case.gone_through(MOVES["failed"]) == [("p2", "big"), ("p2", "m")]
    assert case.order.route.adapter == "tune"
    assert case.order.request.adapter == "tune"
    only_base = key_with(adapters=())
    with pytest.raises(GatewayError):  # it may not ask for it in the first place
        Case(runtime, "m:tune", Principal(only_base, ANONYMOUS))
    await runtime.aclose()


async def test_a_pool_that_had_no_place_is_not_asked_again_at_once() -> None:
    runtime = chain({"fallbacks": ["near", "small"]}, near={"backend": "p0"})
    assert Case(runtime).gone_through(MOVES["queue_refused"]) == [("p1", "org/small")]
    assert Case(runtime).gone_through(MOVES["rate_limited"]) == [("p0", "near"), ("p1", "org/small")]
    await runtime.aclose()


async def test_the_spill_comes_first_and_the_rented_pool_is_not_asked_twice() -> None:
    runtime = chain({"spill": SPILL, "fallbacks": [{"backend": "rented"}, "small"]})
    case = Case(runtime)
    assert case.fails(MOVES["queue_refused"]) is not None
    assert (case.order.route.pool.name, case.exchange.spill) == ("rented", "queue_refused")
    assert case.fails(MOVES["failed"]) is not None
    assert (case.order.route.pool.name, case.exchange.spill) == ("p0", "")
    assert case.fails(MOVES["failed"]) is not None
    assert (case.order.route.name, case.exchange.fallback_from) == ("small", "m")
    assert case.fails(MOVES["failed"]) is None
    await runtime.aclose()


async def test_what_a_spilled_request_may_have_cost_is_counted_when_it_falls_back() -> None:
    """A first token that never came may be billed all the same; what the fallback costs is no part of the ceilings."""
    runtime = chain({"spill": SPILL, "fallbacks": ["small"]})
    case = Case(runtime)
    case.fails(MOVES["queue_refused"])
    ceilings = runtime.overflow._models["m"].state.ceilings
    reserved = ceilings.day_micros(time.time())
    assert reserved > 0
    assert case.fails(MOVES["timeout"]) is not None
    assert (case.order.route.name, case.exchange.spill, case.exchange.possible_duplicate) == ("small", "", True)
    case.exchange.cost_usd = 50.0
    runtime.settle(case.exchange)
    assert ceilings.reserved == 0
    assert ceilings.day_micros(time.time()) == reserved
    await runtime.aclose()


async def test_what_has_become_of_a_reload_is_passed_over() -> None:
    runtime = chain({"fallbacks": ["small", {"backend": "p1"}, "big"]})
    case = Case(runtime)
    runtime.fleet = replace(
        runtime.fleet,
        pools={"p0": runtime.fleet.pools["p0"]},
        models={name: route for name, route in runtime.fleet.models.items() if name != "small"},
    )
    assert case.gone_through(MOVES["failed"]) == [("p2", "big")]
    await runtime.aclose()


async def test_a_model_without_fallbacks_is_remembered_nowhere() -> None:
    runtime = chain({})
    assert Case(runtime).fails(MOVES["failed"]) is None
    assert runtime.fallbacks._chains == {}
    await runtime.aclose()


async def test_each_fallback_is_counted_with_a_reason_that_no_server_can_make_up() -> None:
    runtime = chain({"fallbacks": ["small", {"backend": "p2"}]})
    Case(runtime).gone_through(UpstreamOverloaded("Busy.", code="a code of its own"))
    (family,) = runtime.fallbacks.families()
    found = {tuple(each.labels.values()): each.value for each in family.samples}
    assert found == {("m", "small", "overloaded"): 1.0, ("m", "p2", "overloaded"): 1.0}
    await runtime.aclose()
