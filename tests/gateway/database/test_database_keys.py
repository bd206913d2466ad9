"""Keys and tenants of record, on both databases."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.database import answers, turns
from gateway.database.database import Database
from gateway.database.errors import Conflict, DatabaseInvalid, InvalidValue, NotFound
from gateway.database.tables import counters, keys, tenants
from gateway.keys.format import mint
from gateway.keys.records import TenantRecord
from gateway.limits.sets import LimitSet, Raise
from tests.gateway.database.making import key

FULL: dict[str, Any] = {
    "name": "the batch job, n° 7",
    "hint": "aB3d",
    "models": ("chat", "org/model:8b"),
    "adapters": (),
    "regions": ("eu-west",),
    "priority_class": "batch",
    "deadline_ms": 30_000,
    "max_output_tokens": 512,
    "limits": LimitSet(requests_per_minute=60, usd_per_day=1.5, hard_tokens=True),
    "raises": (Raise(LimitSet(usd_per_day=10.0), 4e9),),
    "expires_unix_s": 4e9,
    "metadata": {"team": "search", "cost": [1, {"centre": "ä"}]},
    "capture_content": True,
}


def test_key_comes_back_as_it_was_stored(database: Database) -> None:
    plain, full = key(), key(**FULL)
    stored = [database.keys.create(record, "me") for record in (plain, full)]
    assert stored[1] == msgspec.structs.replace(full, created_unix_s=stored[1].created_unix_s)
    assert abs(stored[0].created_unix_s - time.time()) < 60
    assert [database.keys.get(record.id) for record in stored] == stored
    assert database.keys.list() == tuple(stored)
    assert database.keys.list("acme") == tuple(stored)
    assert database.keys.list("other") == ()


def test_same_id_or_key_again_is_a_conflict_and_leaves_no_trace(database: Database) -> None:
    stored = database.keys.create(key(), "me")
    for again in (key(id=stored.id), key(digest=stored.digest)):
        with pytest.raises(Conflict) as caught:
            database.keys.create(again, "me")
        assert caught.value.__cause__ is None
    assert database.keys.changed_since(0).version == 1
    assert len(database.audit.list()) == 1


def test_update_changes_what_it_names_and_takes_json(database: Database) -> None:
    stored = database.keys.create(key(**FULL), "me")
    changed = database.keys.update(stored.id, {"limits": {"requests_per_minute": 5}, "models": ["a"]}, "you")
    assert changed == msgspec.structs.replace(stored, limits=LimitSet(requests_per_minute=5), models=("a",))
    assert database.keys.get(stored.id) == changed
    assert database.keys.update(stored.id, {"models": None}, "you").models is None
    entry = database.audit.list()[1]
    assert (entry.actor, entry.action, entry.object) == ("you", "key.update", stored.id)
    assert entry.diff["models"] == [["chat", "org/model:8b"], ["a"]]


def test_update_that_changes_nothing_is_none(database: Database) -> None:
    stored = database.keys.create(key(**FULL), "me")
    assert database.keys.update(stored.id, {"name": stored.name, "limits": stored.limits}, "me") == stored
    assert database.keys.changed_since(0).version == 1
    assert len(database.audit.list()) == 1


def test_disable_enable_expire_are_named_in_the_audit(database: Database) -> None:
    stored = database.keys.create(key(), "me")
    assert database.keys.update(stored.id, {"disabled": True}, "me").disabled
    assert not database.keys.update(stored.id, {"disabled": False}, "me").disabled
    now = time.time()
    assert database.keys.update(stored.id, {"expires_unix_s": now}, "me").expires_unix_s == now
    actions = [entry.action for entry in reversed(database.audit.list())]
    assert actions == ["key.create", "key.disable", "key.enable", "key.expire"]


def test_rotation_puts_a_new_key_beside_the_old_one(database: Database) -> None:
    old, new = database.keys.create(key(), "me"), key()
    ends = time.time() + 3600
    after = database.keys.rotate(old.id, new, ends, "me")
    assert after == msgspec.structs.replace(old, replaced_by=new.id, expires_unix_s=ends)
    assert {each.id for each in database.keys.changed_since(1).keys} == {old.id, new.id}
    assert database.audit.list()[0].action == "key.rotate"
    with pytest.raises(Conflict, match="replaced already"):
        database.keys.rotate(old.id, key(), ends, "me")


def test_rotation_never_prolongs_and_needs_a_working_key(database: Database) -> None:
    soon = time.time() + 60
    old = database.keys.create(key(expires_unix_s=soon), "me")
    assert database.keys.rotate(old.id, key(), soon + 999, "me").expires_unix_s == soon
    off = database.keys.create(key(disabled=True), "me")
    with pytest.raises(Conflict, match="disabled"):
        database.keys.rotate(off.id, key(), soon, "me")
    on = database.keys.create(key(), "me")
    with pytest.raises(InvalidValue, match="same tenant"):
        database.keys.rotate(on.id, key(tenant="other"), soon, "me")
    assert database.keys.get(on.id) == on


def test_removed_key_is_gone_and_every_reader_hears_of_it(database: Database) -> None:
    stored = database.keys.create(key(), "me")
    database.keys.remove(stored.id, "me")
    assert database.keys.changed_since(1).gone == (stored.id,)
    assert database.keys.changed_since(0) == answers.Changes(2, complete=True)
    assert database.keys.list() == ()
    for call in (
        lambda: database.keys.get(stored.id),
        lambda: database.keys.remove(stored.id, "me"),
        lambda: database.keys.update(stored.id, {"disabled": False}, "me"),
    ):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(Conflict):
        database.keys.create(key(digest=stored.digest), "me")


def test_tenants_are_put_read_replaced_and_removed(database: Database) -> None:
    acme = TenantRecord(
        "acme", 2.5, LimitSet(tokens_per_minute=9), LimitSet(concurrent_requests=1), {"chat": LimitSet(burst_s=1.0)}
    )
    assert database.tenants.put(acme, "me") == acme
    assert database.tenants.get("acme") == acme
    beta = database.tenants.put(TenantRecord("beta", metadata={"a": None}, raises=FULL["raises"]), "me")
    assert database.tenants.list() == (acme, beta)
    assert database.keys.changed_since(1).tenants == (beta,)
    acme = database.tenants.put(TenantRecord("acme", disabled=True), "me")
    database.tenants.remove("beta", "me")
    changes = database.keys.changed_since(2)
    assert (changes.version, changes.tenants, changes.gone_tenants) == (4, (acme,), ("beta",))
    with pytest.raises(NotFound):
        database.tenants.get("beta")
    assert database.tenants.put(beta, "me") == database.tenants.get("beta")
    assert [entry.action for entry in database.audit.list(2)] == ["tenant.put", "tenant.remove"]


def test_tenant_with_keys_cannot_be_removed(database: Database) -> None:
    database.tenants.put(TenantRecord("acme"), "me")
    stored = database.keys.create(key(), "me")
    with pytest.raises(Conflict, match="has 1 keys"):
        database.tenants.remove("acme", "me")
    database.keys.remove(stored.id, "me")
    database.tenants.remove("acme", "me")


def test_reader_of_a_database_that_was_put_back_gets_everything(database: Database) -> None:
    stored = database.keys.create(key(), "me")
    changes = database.keys.changed_since(99)
    assert changes.complete
    assert (changes.version, changes.keys) == (1, (stored,))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tenant": "a b"}, "tenant"),
        ({"tenant": "a\n"}, "tenant"),
        ({"digest": b"short"}, "digest"),
        ({"id": "key_1"}, "id"),
        ({"name": "x" * 201}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"models": ("",)}, "models"),
        ({"models": tuple(f"m{n}" for n in range(1001))}, "models"),
        ({"adapters": ("../x",)}, "adapters"),
        ({"regions": ("EU",)}, "regions"),
        ({"priority_class": "urgent"}, "priority_class"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"deadline_ms": "5"}, "deadline_ms"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"limits": LimitSet(requests_per_minute=0)}, "limits.requests_per_minute"),
        ({"limits": LimitSet(usd_per_day=float("nan"))}, "limits.usd_per_day"),
        ({"limits": LimitSet(tokens_per_minute=10**13)}, "limits.tokens_per_minute"),
        ({"raises": (Raise(LimitSet(burst_s=-1.0), 1.0),)}, "raises[0].limits.burst_s"),
        ({"expires_unix_s": 1.0}, "expires_unix_s"),
        ({"expires_unix_s": float("inf")}, "expires_unix_s"),
        ({"metadata": {"a": "x" * 4096}}, "metadata"),
        ({"metadata": {"a": {"b": "\ud800"}}}, "metadata"),
        ({"metadata": {"a": mint()}}, "metadata"),
        ({"name": f"for {mint()}"}, "name"),
    ],
)
def test_wrong_value_is_refused_by_its_field(sqlite_database: Database, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        sqlite_database.keys.create(key(**changes), "me")
    assert caught.value.field == field
    if set(changes) <= {"id", "digest", "tenant"}:
        return
    stored = sqlite_database.keys.create(key(), "me")
    with pytest.raises(InvalidValue) as caught:
        sqlite_database.keys.update(stored.id, changes, "me")
    assert caught.value.field == field
    assert sqlite_database.keys.get(stored.id) == stored


def test_update_refuses_what_never_changes(sqlite_database: Database) -> None:
    stored = sqlite_database.keys.create(key(), "me")
    for field in ("tenant", "digest", "id", "created_unix_s", "replaced_by", "colour"):
        with pytest.raises(InvalidValue) as caught:
            sqlite_database.keys.update(stored.id, {field: "x"}, "me")
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"user_limits": LimitSet(concurrent_requests=0)}, "user_limits.concurrent_requests"),
        ({"model_limits": {"a b": LimitSet()}}, "model_limits"),
        ({"model_limits": {"m": LimitSet(burst_s=0.0)}}, "model_limits.m.burst_s"),
    ],
)
def test_wrong_tenant_is_refused_by_its_field(sqlite_database: Database, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        sqlite_database.tenants.put(TenantRecord("acme", **fields), "me")
    assert caught.value.field == field


def test_deep_metadata_is_refused(sqlite_database: Database) -> None:
    for depth in (17, 5000):
        nested: Any = 1
        for _ in range(depth):
            nested = [nested]
        with pytest.raises(InvalidValue):
            sqlite_database.keys.create(key(metadata={"a": nested}), "me")


def test_more_keys_than_a_gateway_holds_are_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_KEYS", 2)
    first, _ = database.keys.create(key(), "me"), database.keys.create(key(), "me")
    with pytest.raises(Conflict, match="2 keys already"):
        database.keys.create(key(), "me")
    with pytest.raises(Conflict, match="2 keys already"):
        database.keys.rotate(first.id, key(), time.time() + 9, "me")
    assert database.keys.get(first.id).replaced_by is None
    database.keys.remove(first.id, "me")
    database.keys.create(key(), "me")


def test_field_of_a_newer_version_is_left_out_and_said(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    stored = database.keys.create(key(limits=LimitSet(requests_per_minute=3)), "me")
    with database._engine.write() as connection:
        newer = '{"requests_per_minute": 3, "images_per_minute": 1}'
        connection.execute(
            keys.update().values(
                limits=newer, priority_class="royal", raises=f'[{{"limits": {newer},"until_unix_s": 4e9}}]'
            )
        )
    (found,) = database.keys.changed_since(0).keys
    assert found.limits == stored.limits
    assert found.raises == (Raise(stored.limits, 4e9),)
    assert found.priority_class == "sheddable"
    assert not found.disabled
    assert "images_per_minute (2)" in caplog.text
    assert "royal" in caplog.text
    database.keys.update(stored.id, {"name": "x"}, "me")
    with database._engine.read() as connection:
        assert connection.execute(sa.select(keys.c.limits)).scalar() == newer


SPOILT: list[dict[str, Any]] = [
    {"limits": "not JSON"},
    {"limits": "[]"},
    {"limits": '{"requests_per_minute": -5}'},
    {"limits": '{"requests_per_minute": "5"}'},
    {"limits": '{"usd_per_day": 1e999}'},
    {"models": "7"},
    {"models": "[" * 3000},
    {"raises": '{"limits": 1}'},
    {"raises": "[1]"},
    {"metadata": "null"},
    {"digest": b"short"},
    {"deadline_ms": -1},
]


def test_unreadable_key_is_disabled_and_the_others_go_on(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    good = database.keys.create(key(), "me")
    bad = [database.keys.create(key(), "me").id for _ in SPOILT]
    with database._engine.write() as connection:
        for id, values in zip(bad, SPOILT, strict=True):
            connection.execute(keys.update().where(keys.c.id == id).values(**values))
    by_id = {each.id: each for each in database.keys.changed_since(0).keys}
    assert by_id[good.id] == good
    assert [(by_id[id].disabled, by_id[id].models) for id in bad] == [(True, ())] * len(bad)
    assert f"{len(bad)} rows cannot be read and count as disabled: key {bad[0]}" in caplog.text
    database.keys.remove(bad[0], "me")


def test_wrongly_typed_row_of_sqlite_is_disabled(sqlite_database: Database) -> None:
    ids = [sqlite_database.keys.create(key(), "me").id for _ in range(4)]
    with sqlite_database._engine.write() as connection:
        for id, column in zip(ids, ("digest", "disabled", "tenant", "created_unix_s"), strict=True):
            value = "x'ff'" if column == "tenant" else "'text'"
            connection.exec_driver_sql(f"UPDATE tidegate_keys SET {column} = {value} WHERE id = '{id}'")
    for column in ("name", "tenant", "limits", "metadata"):
        id = sqlite_database.keys.create(key(metadata={"a": "b"}), "me").id
        not_utf8 = "CAST(x'7b22ff227d' AS TEXT)"
        with sqlite_database._engine.write() as connection:
            connection.exec_driver_sql(f"UPDATE tidegate_keys SET {column} = {not_utf8} WHERE id = '{id}'")
    assert len(sqlite_database.keys.list()) == 8
    assert all(each.disabled for each in sqlite_database.keys.list())


def test_unreadable_tenant_is_disabled(database: Database) -> None:
    for name in ("a", "b", "c"):
        database.tenants.put(TenantRecord(name), "me")
    with database._engine.write() as connection:
        connection.execute(tenants.update().where(tenants.c.name == "a").values(model_limits='{"m": 5}'))
        connection.execute(tenants.update().where(tenants.c.name == "b").values(weight=-1.0))
    assert [each.disabled for each in database.keys.changed_since(0).tenants if each.name != "c"] == [True, True]
    assert not database.tenants.get("c").disabled


def test_counters_that_are_gone_are_said(database: Database) -> None:
    with database._engine.write() as connection:
        connection.execute(counters.delete())
    with pytest.raises(DatabaseInvalid, match="counters"):
        database.keys.changed_since(0)
    with pytest.raises(DatabaseInvalid, match="counters"):
        database.keys.create(key(), "me")


def test_pepper_is_that_of_the_keys(database: Database) -> None:
    database.confirm_pepper(b"one")
    database.confirm_pepper(b"two")
    database.keys.create(key(), "me")
    database.confirm_pepper(b"two")
    with pytest.raises(DatabaseInvalid, match="another pepper"):
        database.confirm_pepper(b"one")


HOSTILE = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["'; DROP TABLE tidegate_keys; --", '"', "%s", ":name", "\\'", "{}", "$1", "?", "\0", "a' OR '1'='1"]
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=HOSTILE, other=HOSTILE)
def test_text_is_only_ever_a_value(database: Database, text: str, other: str) -> None:
    before = len(database.keys.list())
    for call in (
        lambda: database.keys.get(text),
        lambda: database.tenants.get(text),
        lambda: database.keys.update(text, {"name": other}, "me"),
    ):
        with pytest.raises(NotFound):
            call()
    with contextlib.suppress(InvalidValue):
        database.keys.create(key(tenant=text), "me")
    database.keys.list(text)
    try:
        stored = database.keys.create(key(name=text, metadata={text: other}), other)
    except InvalidValue:
        return
    assert database.keys.get(stored.id) == stored
    assert (stored.name, stored.metadata) == (text, {text: other})
    assert database.audit.list(1)[0].actor == other
    assert database.spend.add(stored.id, {(text or "x", "d1"): 1})
    assert database.spend.totals([(text or "x", "d1")])[text or "x", "d1"] >= 1
    assert len(database.keys.list()) > before
