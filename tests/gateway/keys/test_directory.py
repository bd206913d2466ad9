"""Who a request is from: what is let in, and that nothing else tells two refusals apart."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config.limits import MAX_KEY_BYTES
from gateway.database.answers import Changes
from gateway.errors import GatewayError
from gateway.keys.configured import static_records, tenant_records
from gateway.keys.directory import Directory, Freshness, merged_tenant
from gateway.keys.errors import Forbidden, KeysUnavailable, Unauthenticated
from gateway.keys.format import digest, mint
from gateway.keys.principal import ANONYMOUS, Principal, allowed_regions, authorise
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.limits.sets import LimitSet, Raise
from tests.gateway.keys.records_of_tests import NOW, PEPPER, bearing, directory_of, made

Headers = list[tuple[bytes, bytes]]


def refusal(directory: Directory, headers: Headers, now_unix_s: float = NOW) -> tuple[int, bytes, Any]:
    """All that a refused client is told."""
    with pytest.raises(GatewayError) as raised:
        directory.authenticate(headers, now_unix_s)
    return raised.value.status, raised.value.body(), raised.value.headers()


# -- who is let in


@pytest.mark.parametrize(
    "header",
    [
        ("authorization", "Bearer {}"),
        ("authorization", "bearer {}"),
        ("authorization", "BEARER   {} "),
        ("x-api-key", "{}"),
        ("api-key", "{}"),
    ],
)
def test_each_header_that_a_client_sends_its_key_in_is_read(header: tuple[str, str]) -> None:
    key, record = made()
    name, form = header
    headers = [(b"host", b"localhost"), (name.encode(), form.format(key).encode())]
    principal = directory_of(record).authenticate(headers, NOW)
    assert principal.key == record
    assert principal.key_id == record.id
    assert principal.tenant == TenantRecord("acme")


@pytest.mark.parametrize("name", [b"x-api-key", b"api-key"])
def test_white_space_around_a_key_is_not_part_of_it(name: bytes) -> None:
    key, record = made()
    directory = directory_of(record)
    for value in (f"{key} ", f"{key}\t", f" \t{key} \t "):
        assert directory.authenticate([(name, value.encode())], NOW).key == record
        assert directory.authenticate([*bearing(key), (name, value.encode())], NOW).key == record
    assert refusal(directory, [(name, b" \t")])[0] == 401


def test_one_key_in_two_headers_is_one_key_and_two_keys_are_none() -> None:
    (key, record), (other, another) = made(), made()
    directory = directory_of(record, another)
    twice = [*bearing(key), (b"x-api-key", key.encode()), (b"api-key", b"")]
    assert directory.authenticate(twice, NOW).key == record
    for headers in (
        [*bearing(key), (b"x-api-key", other.encode())],
        [*bearing(key), (b"authorization", b"Basic eDp5")],
    ):
        assert refusal(directory, headers)[0] == 401


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Basic {key}")],
        [(b"authorization", b"{key}")],
        [(b"authorization", b"Bearer {key}x")],
        [(b"authorization", b"Bearer {key}, Bearer {key}")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"x-api-key", b"Bearer {key}")],
        [(b"cookie", b"{key}")],
        [(b"x-api-key", b"k" * (MAX_KEY_BYTES + 1))],
        [(b"x-api-key", b"' OR 1=1 --")],
    ],
)
def test_what_is_no_valid_key_gets_one_and_the_same_answer(headers: Headers) -> None:
    key, record = made()
    filled = [(name, value.replace(b"{key}", key.encode())) for name, value in headers]
    status, body, hints = refusal(directory_of(record), filled)
    assert status == 401
    assert (status, body, hints) == refusal(directory_of(record), bearing(mint()))
    assert (b"www-authenticate", b"Bearer") in hints
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert key.encode() not in body


def test_unknown_expired_disabled_and_revoked_keys_are_not_told_apart() -> None:
    expired, of_expired = made(expires_unix_s=NOW)
    disabled, of_disabled = made(disabled=True)
    orphan, of_orphan = made("closed")
    revoked, of_revoked = made()
    directory = directory_of(
        of_expired, of_disabled, of_orphan, of_revoked, tenants=(TenantRecord("closed", disabled=True),)
    )
    assert directory.authenticate(bearing(revoked), NOW).key == of_revoked
    directory.apply(Changes(2, gone=(of_revoked.id,)))
    assert {str(refusal(directory, bearing(key))) for key in (mint(), expired, disabled, orphan, revoked)} == {
        str(refusal(directory, bearing("nonsense")))
    }


def test_a_key_is_valid_until_the_second_it_expires() -> None:
    key, record = made(expires_unix_s=NOW + 10)
    directory = directory_of(record)
    assert directory.authenticate(bearing(key), NOW + 9.999).key == record
    assert refusal(directory, bearing(key), NOW + 10)[0] == 401


def test_the_time_of_a_refusal_does_not_tell_why() -> None:
    """Crudely: medians of the same path in turns, within a factor that a look-up elsewhere would exceed."""
    expired, of_expired = made(expires_unix_s=NOW)
    disabled, of_disabled = made(disabled=True)
    directory = directory_of(of_expired, of_disabled, *(made()[1] for _ in range(1000)))
    cases = {"unknown": bearing(mint()), "expired": bearing(expired), "disabled": bearing(disabled)}
    taken: dict[str, list[int]] = {name: [] for name in cases}
    for _ in range(4000):
        for name, headers in cases.items():
            begun = time.perf_counter_ns()
            try:
                directory.authenticate(headers, NOW)
            except Unauthenticated:
                taken[name].append(time.perf_counter_ns() - begun)
    medians = [statistics.median(each) for each in taken.values()]
    assert max(medians) < 1.5 * min(medians), medians


@settings(max_examples=200)
@given(st.lists(st.binary(min_size=1, max_size=80).filter(lambda key: key == key.strip()), min_size=2, unique=True))
def test_no_two_different_keys_share_an_entry(keys: Sequence[bytes]) -> None:
    """Also when one begins like the other: the whole of each is looked up."""
    longer = [keys[0] + b"0", keys[0][:20] + b"another end of it"]
    known = {key: KeyRecord(f"static:{index}", digest(PEPPER, key), "t") for index, key in enumerate(keys)}
    directory = Directory(PEPPER, freshness=Freshness.CURRENT)
    directory.replace_static(known.values(), {})
    assert len(directory) == len(known)
    for key, record in known.items():
        assert directory.authenticate([(b"x-api-key", key)], NOW).key == record
    for key in longer:
        if key not in known:
            assert refusal(directory, [(b"x-api-key", key)])[0] == 401


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"api-key", b"cookie"]), st.binary(max_size=120)),
        max_size=4,
    ),
    st.sampled_from(Freshness),
)
def test_whatever_is_sent_ends_in_a_refusal(headers: Headers, freshness: Freshness) -> None:
    directory = directory_of(*(made()[1] for _ in range(3)))
    directory.mark(freshness)
    assert refusal(directory, headers)[0] == 401


# -- how old the last reading is


def test_a_directory_that_was_never_read_lets_nobody_in_and_blames_nobody() -> None:
    key, record = made()
    directory = Directory(PEPPER)
    status, body, hints = refusal(directory, bearing(key))
    assert (status, json.loads(body)["error"]["code"]) == (503, "keys_unavailable")
    assert dict(hints)[b"retry-after"] in (b"1", b"2")
    directory.apply(Changes(1, keys=(record,), complete=True))
    directory.mark(Freshness.CURRENT)
    assert directory.authenticate(bearing(key), NOW).key == record


def test_an_aged_reading_serves_known_keys_and_leaves_the_others_open() -> None:
    key, record = made()
    disabled, of_disabled = made(disabled=True)
    directory = directory_of(record, of_disabled)
    directory.mark(Freshness.AGED)
    assert directory.authenticate(bearing(key), NOW).key == record
    answers = {str(refusal(directory, bearing(each))[:2]) for each in (mint(), disabled)}
    assert len(answers) == 1
    assert "503" in answers.pop()
    assert refusal(directory, bearing("not-of-our-form"))[0] == 401  # no reading could ever bring that
    assert refusal(directory, [])[0] == 401
    directory.mark(Freshness.STALE)
    with pytest.raises(KeysUnavailable):
        directory.authenticate(bearing(key), NOW)


# -- changes


def test_a_principal_stays_the_same_until_its_key_or_tenant_changes() -> None:
    key, record = made()
    directory = directory_of(record)
    first = directory.authenticate(bearing(key), NOW)
    directory.apply(Changes(2, keys=(record,), tenants=(TenantRecord("acme"),)))
    assert directory.authenticate(bearing(key), NOW) is first
    directory.apply(Changes(3, tenants=(TenantRecord("acme", weight=2.0),)))
    second = directory.authenticate(bearing(key), NOW)
    assert second is not first
    assert (second.tenant.weight, first.tenant.weight) == (2.0, 1.0)
    directory.apply(Changes(4, keys=(msgspec.structs.replace(record, models=("chat",)),)))
    third = directory.authenticate(bearing(key), NOW)
    assert third is not second
    assert third.key is not None
    assert third.key.models == ("chat",)
    assert third.tenant is second.tenant


def test_a_tenant_that_is_disabled_takes_its_keys_with_it_and_brings_them_back() -> None:
    key, record = made()
    directory = directory_of(record)
    directory.apply(Changes(2, tenants=(TenantRecord("acme", disabled=True),)))
    assert refusal(directory, bearing(key))[0] == 401
    directory.apply(Changes(3, gone_tenants=("acme",)))
    assert directory.authenticate(bearing(key), NOW).key == record


def test_a_complete_reading_forgets_what_it_does_not_have() -> None:
    (key, record), (other, another) = made(), made("beta")
    directory = directory_of(record, another, tenants=(TenantRecord("acme", weight=3.0),))
    directory.apply(Changes(1, keys=(another,), complete=True))
    assert refusal(directory, bearing(key))[0] == 401
    assert directory.authenticate(bearing(other), NOW).key == another
    assert directory.tenant("acme") == TenantRecord("acme")
    assert len(directory) == 1
    assert (directory.key(another.id), directory.key(record.id)) == (another, None)


def configured(**sections: Any) -> tuple[list[KeyRecord], dict[str, TenantRecord]]:
    """The records of a configuration's keys and tenants."""
    from gateway.config.limits import StaticKey, Tenant

    keys = [StaticKey.model_validate(each) for each in sections.get("static", [])]
    tenants = {name: Tenant.model_validate(each) for name, each in sections.get("tenants", {}).items()}
    return static_records(keys, PEPPER), tenant_records(tenants)


def test_keys_and_tenants_of_the_configuration_are_replaced_as_a_whole() -> None:
    directory = directory_of()
    directory.replace_static(
        *configured(
            static=[
                {"name": "one", "key": "the first static key", "class": "batch", "limits": {"tokens_per_minute": 9}}
            ],
            tenants={"default": {"weight": 2.0}},
        )
    )
    principal = directory.authenticate([(b"x-api-key", b"the first static key")], NOW)
    assert principal.key is not None
    assert (principal.key.id, principal.key.priority_class, principal.tenant.weight) == ("static:one", "batch", 2.0)
    assert principal.key.limits == LimitSet(tokens_per_minute=9)
    directory.replace_static(*configured(static=[{"name": "two", "key": "the second static key"}]))
    assert refusal(directory, [(b"x-api-key", b"the first static key")])[0] == 401
    second = directory.authenticate([(b"x-api-key", b"the second static key")], NOW)
    assert (second.key_id, second.tenant) == ("static:two", TenantRecord("default"))


def test_a_key_of_the_database_stands_before_a_static_one_with_the_same_text() -> None:
    key, record = made(disabled=True)
    static, none = configured(static=[{"name": "same", "key": key}])
    for directory in (directory_of(record), Directory(PEPPER, freshness=Freshness.CURRENT)):
        directory.replace_static(static, none)
        directory.apply(Changes(2, keys=(record,)))
        assert refusal(directory, bearing(key))[0] == 401
        directory.replace_static(static, none)
        assert refusal(directory, bearing(key))[0] == 401
        directory.apply(Changes(3, gone=(record.id,)))
        assert directory.authenticate(bearing(key), NOW).key_id == "static:same"
        directory.replace_static([], {})
        assert refusal(directory, bearing(key))[0] == 401


def test_a_tenant_is_merged_field_by_field_with_the_database_first() -> None:
    configured_one = TenantRecord(
        "acme",
        weight=4.0,
        limits=LimitSet(requests_per_minute=60, usd_per_day=5.0),
        model_limits={"chat": LimitSet(concurrent_requests=2), "code": LimitSet(concurrent_requests=3)},
        metadata={"team": "x", "room": "1"},
    )
    recorded = TenantRecord(
        "acme",
        limits=LimitSet(requests_per_minute=90),
        user_limits=LimitSet(tokens_per_minute=5),
        model_limits={"chat": LimitSet(tokens_per_minute=7)},
        raises=(Raise(LimitSet(usd_per_day=9.0), NOW),),
        metadata={"team": "y"},
    )
    merged = merged_tenant("acme", configured_one, recorded)
    assert merged == TenantRecord(
        "acme",
        weight=4.0,
        limits=LimitSet(requests_per_minute=90, usd_per_day=5.0),
        user_limits=LimitSet(tokens_per_minute=5),
        model_limits={
            "chat": LimitSet(concurrent_requests=2, tokens_per_minute=7),
            "code": LimitSet(concurrent_requests=3),
        },
        raises=recorded.raises,
        metadata={"team": "y", "room": "1"},
    )
    assert merged_tenant("acme", None, recorded) == recorded
    assert merged_tenant("acme", configured_one, None) == configured_one
    assert merged_tenant("acme", None, None) == TenantRecord("acme")


# -- what a key may ask for


def principal_with(**fields: Any) -> Principal:
    return Principal(made(**fields)[1], TenantRecord("acme"))


def test_models_and_adapters_of_a_key() -> None:
    free, bound = principal_with(), principal_with(models=("chat",), adapters=("support",))
    for principal in (free, bound, Principal(None, ANONYMOUS)):
        authorise(principal, "chat")
        authorise(principal, "chat", "support")
    authorise(free, "anything", "at-all")
    for model, adapter, code in (
        ("code", None, "model_not_allowed"),
        ("code", "support", "model_not_allowed"),
        ("chat", "sales", "adapter_not_allowed"),
    ):
        with pytest.raises(Forbidden) as refused:
            authorise(bound, model, adapter)
        assert (refused.value.status, refused.value.type, refused.value.code) == (403, "request_forbidden", code)
    none = principal_with(models=(), adapters=())
    with pytest.raises(Forbidden):
        authorise(none, "chat")


def test_a_model_that_is_kept_from_a_key_looks_like_one_that_does_not_exist() -> None:
    bound = principal_with(models=("chat",))
    bodies = set()
    for model in ("code", "no-such-model"):
        with pytest.raises(Forbidden) as refused:
            authorise(bound, model)
        bodies.add(refused.value.body())
    assert len(bodies) == 1


@pytest.mark.parametrize(
    ("of_key", "asked", "allowed"),
    [
        ((), (), ()),
        ((), ("eu",), ("eu",)),
        (("eu", "us"), (), ("eu", "us")),
        (("eu", "us"), ("us", "ap"), ("us",)),
        (("eu",), ("eu",), ("eu",)),
        (("eu",), ("us",), None),
    ],
)
def test_regions_are_those_of_the_key_and_the_request(
    of_key: tuple[str, ...], asked: tuple[str, ...], allowed: tuple[str, ...] | None
) -> None:
    principal = principal_with(regions=of_key)
    if allowed is not None:
        assert allowed_regions(principal, asked) == allowed
        return
    with pytest.raises(Forbidden) as refused:
        allowed_regions(principal, asked)
    assert refused.value.code == "data_residency_mismatch"
    assert allowed_regions(Principal(None, ANONYMOUS), asked) == asked


def test_a_known_key_costs_microseconds() -> None:
    """About 2.3 µs on an idle machine; the bound is for one that is not."""
    key, record = made()
    directory = directory_of(record)
    headers = [*((f"x-stainless-{name}".encode(), b"x") for name in range(12)), *bearing(key)]
    best = min(_seconds(directory, headers) for _ in range(20))
    assert best < 20e-6


def _seconds(directory: Directory, headers: Headers) -> float:
    begun = time.perf_counter()
    for _ in range(500):
        directory.authenticate(headers, NOW)
    return (time.perf_counter() - begun) / 500
