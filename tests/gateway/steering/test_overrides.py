"""The book of overrides, where it is kept, and how it lies over file and environment."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import ConfigError, Settings, read_all
from gateway.config.environment import Overrides
from gateway.config.layer import apply_layer
from gateway.config.origins import rows_of
from gateway.config.tree import setting_paths
from gateway.steering.files import OverrideFile
from gateway.steering.overrides import (
    MAX_HISTORY,
    NOT_SET,
    RULES,
    Book,
    Change,
    changed,
    differences,
    restored,
    rule_for,
    shown,
    undoing,
)
from gateway.steering.reading import ConfigReader

WEIGHT = ("backends", "pool", "replicas", "pool-1", "weight")
POLICY = ("models", "m", "policy")
FILE = """\
models:
  m: {backend: pool}
backends:
  pool:
    engine: openai
    replicas:
      - {url: "http://127.0.0.1:1"}
      - {url: "http://127.0.0.1:2", weight: 3}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tidegate.yaml"
    path.write_text(FILE)
    return path


def book(**settings: Any) -> Book:
    change = Change({{"weight": WEIGHT, "policy": POLICY}[name]: value for name, value in settings.items()})
    return changed(Book(), change, "admin", 1.0, "test")


# -- the book


def test_every_rule_names_a_setting_that_needs_no_restart() -> None:
    known = {path.replace("<name>", "*").replace("[]", ".*") for path, _ in setting_paths(Settings)}
    for rule in RULES:
        path = ".".join(rule.pattern)
        if rule.pattern[-2] == "ttft_target_ms":
            path = path.replace("ttft_target_ms.*", "ttft_target_ms.standard")
        assert any(each == path or each.startswith(f"{path}.") for each in known), path


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("server", "port"),
        ("models", "m"),
        ("models", "m", "backend"),
        ("auth",),
        (*WEIGHT, "x"),
        ("admin", "token"),
    ],
)
def test_nothing_else_may_be_changed(path: tuple[str, ...]) -> None:
    assert rule_for(path) is None


def test_money_is_the_owners() -> None:
    owners = {rule.pattern[-1] for rule in RULES if rule.owner}
    assert owners == {"price", "usd_per_hour", "usd_per_day"}


CHANGES = st.builds(
    Change,
    st.dictionaries(st.sampled_from([WEIGHT, POLICY, ("overload", "enabled")]), st.integers(0, 3), max_size=3),
    st.frozensets(st.sampled_from([("models", "m", "price"), ("overload", "max_loop_lag_ms")]), max_size=2),
)


@given(st.lists(CHANGES, max_size=8), CHANGES)
def test_undoing_a_change_leaves_what_was_before(earlier: list[Change], change: Change) -> None:
    before = Book()
    for each in earlier:
        before = changed(before, each, "a", 0.0, "")
    after = changed(before, change, "b", 1.0, "")
    again = changed(after, undoing(differences(before, after)), "c", 2.0, "")
    assert {each.path: each.value for each in again.overrides} == {each.path: each.value for each in before.overrides}
    assert again.version == before.version + 2


def test_a_former_version_is_restored_as_a_new_one() -> None:
    first = book(weight=2)
    second = changed(first, Change({POLICY: "round_robin"}, frozenset((WEIGHT,))), "jo", 2.0, "switch")
    third = restored(second, first.version, "jo", 3.0)
    assert third is not None
    assert third.version == second.version + 1
    assert [(each.path, each.value) for each in third.overrides] == [(WEIGHT, 2)]
    assert restored(second, 99, "jo", 3.0) is None
    for _ in range(2 * MAX_HISTORY):
        third = changed(third, Change({WEIGHT: third.version}), "jo", 4.0, "again")
    assert len(third.history) == MAX_HISTORY


def test_null_is_a_value_and_no_override_is_none() -> None:
    price = ("models", "m", "price")
    after = changed(Book(), Change({price: None}), "a", 0.0, "")
    assert differences(Book(), after) == {price: (NOT_SET, None)}
    assert shown(("models", "a.b/c", "price")) == 'models."a.b/c".price'


# -- the file


def test_a_book_is_kept_for_its_owner_alone(tmp_path: Path, config: Path) -> None:
    file = OverrideFile(tmp_path / "state", config)
    assert file.read() == Book()
    kept = book(weight=2, policy="round_robin")
    file.write(kept)
    assert OverrideFile(tmp_path / "state", config).read() == kept
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [each.name for each in file.path.parent.iterdir()] == [file.path.name]
    assert OverrideFile(tmp_path / "state", tmp_path / "other.yaml").read() == Book()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": "x"}',
        b"\xff\xfe",
        json.dumps({"version": 1, "overrides": [{"path": ["auth"], "value": 1, "by": "", "at_unix_s": 0}]}).encode(),
    ],
)
def test_a_file_that_cannot_be_used_is_put_aside(
    tmp_path: Path, config: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = OverrideFile(tmp_path / "state", config)
    file.write(book(weight=2))
    file.path.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        found = file.read()
    assert found.overrides == ()
    assert found.version > 1
    assert file.read() == found  # its version stays, so that a change can name it
    assert "cannot be used, and are left out" in caplog.text
    (aside,) = file.path.parent.glob("*.broken-*")
    assert aside.read_bytes() == content


def test_a_file_that_others_can_write_is_not_trusted(tmp_path: Path, config: Path) -> None:
    file = OverrideFile(tmp_path / "state", config)
    file.write(book(weight=2))
    file.path.chmod(0o666)
    assert file.read().overrides == ()
    os.symlink(config, tmp_path / "link")
    file.path.unlink()
    os.symlink(tmp_path / "link", file.path)
    assert file.read().overrides == ()


# -- the layer


def test_a_replica_is_found_by_its_name_and_what_is_gone_is_told() -> None:
    data: dict[str, Any] = {"backends": {"pool": {"replicas": [{"url": "a"}, {"url": "b", "name": "big"}]}}}
    origins = Overrides()
    unused = apply_layer(
        data,
        [
            (("backends", "pool", "replicas", "pool-0", "weight"), 2),
            (("backends", "pool", "replicas", "big", "weight"), 3),
            (("backends", "pool", "replicas", "pool-1", "weight"), 4),
            (("models", "m", "policy"), "cost"),
            (("overload", "enabled"), False),
        ],
        origins,
    )
    assert [each["weight"] for each in data["backends"]["pool"]["replicas"]] == [2, 3]
    assert unused == [("backends", "pool", "replicas", "pool-1", "weight"), ("models", "m", "policy")]
    assert data["overload"] == {"enabled": False}
    assert origins.origin_of(("backends", "pool", "replicas", 1, "weight")) == ("override", "")


def test_an_override_wins_over_file_and_environment_and_each_value_says_its_origin(config: Path) -> None:
    environ = {"TIDEGATE_BACKENDS__POOL__REPLICAS__1__WEIGHT": "7", "TIDEGATE_SERVER__PORT": "7500"}
    plain = read_all(config, environ)
    reading = read_all(config, environ, {"server.host": "localhost"}, layer=[(WEIGHT, 2.5), (POLICY, "round_robin")])
    assert plain.settings.backends["pool"].replicas[1].weight == 7
    assert reading.settings.backends["pool"].replicas[1].weight == 2.5
    rows = {row.name: (row.value, row.origin, row.where) for row in rows_of(reading)}
    assert rows["backends.pool.replicas[1].weight"] == (2.5, "override", "")
    assert rows["models.m.policy"] == ("round_robin", "override", "")
    assert rows["server.port"] == (7500, "environment", "TIDEGATE_SERVER__PORT")
    assert rows["server.host"] == ("localhost", "command line", "")
    assert rows["backends.pool.replicas[1].url"] == ("http://127.0.0.1:2", "file", f"{config}:8")
    assert rows["backends.pool.replicas[0].weight"] == (1.0, "default", "")


def test_no_origin_shows_a_secret(config: Path) -> None:
    secrets = {
        "TIDEGATE_ADMIN__TOKEN": "a-token-that-nobody-should-see",
        "TIDEGATE_BACKENDS__POOL__API_KEYS": '["first-secret-key", "second-secret-key"]',
        "TIDEGATE_BACKENDS__POOL__HEADERS": '{"x-cookie": "hidden-in-a-header"}',
    }
    rows = rows_of(read_all(config, secrets))
    text = json.dumps([row.shown() for row in rows])
    for each in ("nobody-should-see", "first-secret", "second-secret", "hidden-in"):
        assert each not in text
    secret = {row.name: row.value for row in rows if row.secret}
    assert secret["admin.token"] == "set"
    assert secret["backends.pool.api_keys[1]"] == "set"
    assert secret["backends.pool.api_key"] is None


def test_a_wrong_override_is_named_by_its_field(config: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_all(config, {}, layer=[(WEIGHT, -1)])
    (problem,) = caught.value.problems
    assert (problem.file, problem.path) == ("override", "backends.pool.replicas[1].weight")


# -- the reader


def test_an_override_that_no_longer_fits_is_left_out_alone(tmp_path: Path, config: Path) -> None:
    spill = ("models", "m", "spill", "usd_per_hour")
    file = OverrideFile(tmp_path / "state", config)
    kept = changed(book(weight=2), Change({spill: 50.0, POLICY: "round_robin"}), "a", 1.0, "")
    file.write(kept)
    config.write_text(
        FILE.replace("m: {backend: pool}", "m: {backend: pool, spill: {backend: rented, price: {input: 1},"
                     " usd_per_hour: 1, usd_per_day: 20}}")
        + '  rented: {engine: openai, hosted: true, replicas: [{url: "http://127.0.0.1:3"}]}\n'
    )  # fmt: skip
    reader = ConfigReader(config, {}, file=file)
    settings = reader()
    assert settings.backends["pool"].replicas[1].weight == 2
    assert settings.models["m"].policy == "round_robin"
    assert settings.models["m"].spill is not None
    assert settings.models["m"].spill.usd_per_hour == 1
    assert list(reader.last.refused) == [spill]
    assert "usd_per_day" in reader.last.refused[spill]


def test_one_of_many_overrides_that_does_not_fit_is_found_by_few_readings(tmp_path: Path, config: Path) -> None:
    names = [f"r{index}" for index in range(256)]
    replicas = ", ".join(
        f'{{url: "http://127.0.0.1:{9000 + index}", name: {name}}}' for index, name in enumerate(names)
    )
    config.write_text(FILE + f"  many: {{engine: openai, replicas: [{replicas}]}}\n")
    settings: dict[tuple[str, ...], Any] = {("backends", "many", "replicas", name, "weight"): 2 for name in names}
    settings[POLICY] = "is_no_policy"
    file = OverrideFile(tmp_path / "state", config)
    file.write(changed(Book(), Change(settings), "a", 1.0, ""))
    readings: list[Settings] = []
    reader = ConfigReader(config, {}, file=file, check=readings.append)
    weights = {each.weight for each in reader().backends["many"].replicas}
    assert (weights, list(reader.last.refused)) == ({2}, [POLICY])
    assert len(readings) < 20


def test_a_file_that_is_wrong_itself_is_refused_whatever_the_overrides(tmp_path: Path, config: Path) -> None:
    file = OverrideFile(tmp_path / "state", config)
    reader = ConfigReader(config, {}, file=file)
    reader()
    config.write_text(FILE + "modls: {}\n")
    file.write(book(weight=2))
    with pytest.raises(ConfigError, match="modls"):
        reader()
    assert reader.again().backends["pool"].replicas[1].weight == 2  # the file as it was when it was right
