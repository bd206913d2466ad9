"""`tidegate keys` and `tidegate tenants`, from the command line to the database and a gateway's directory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main
from gateway.database.database import Database
from gateway.keys.commands import run
from gateway.keys.directory import Directory, Freshness
from gateway.keys.format import well_formed
from gateway.keys.moments import parse_moment, parse_span_s, shown
from gateway.keys.pepper import PepperError, load_pepper
from tests.gateway.keys.ordering import Said, environment_of, ordered, refused
from tests.gateway.keys.records_of_tests import bearing
from tests.support.command import run_tidegate, write_config

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database that the environment names."""
    return environment_of(tmp_path, monkeypatch)


def directory(url: str) -> Directory:
    """What a gateway on this database knows now."""
    known = Directory(load_pepper(None, url), freshness=Freshness.CURRENT)
    database = Database.open(url)
    known.apply(database.keys.changed_since(0))
    database.close()
    return known


def opens(url: str, key: str, after_s: float = 0.0) -> bool:
    try:
        directory(url).authenticate(bearing(key), time.time() + after_s)
    except Exception:
        return False
    return True


# -- the real command


async def test_a_key_goes_through_its_life_by_command(tmp_path: Path, url: str) -> None:
    environ = {"TIDEGATE_DATABASE": url}
    code, out, said = await run_tidegate("keys", "create", "--tenant", "acme", "--name", "ci", environ=environ)
    assert code == 0, said
    key = out.removesuffix("\n")
    assert well_formed(key)  # alone on standard output
    assert "not shown again" in said
    assert key not in said
    assert opens(url, key)
    code, out, said = await run_tidegate("keys", "list", "--json", environ=environ)
    (listed,) = json.loads(out)["data"]
    assert (listed["tenant"], listed["name"], listed["hint"], listed["state"]) == ("acme", "ci", key[-4:], "valid")
    assert key not in out
    code, out, said = await run_tidegate("keys", "rotate", listed["id"], "--overlap", "0", "--json", environ=environ)
    assert code == 0, said
    new = json.loads(out)
    assert opens(url, new["key"])
    assert not opens(url, key)
    code, out, said = await run_tidegate("keys", "revoke", new["id"], environ=environ)
    assert (code, out) == (0, f"{new['id']} is revoked for good\n"), said
    assert not opens(url, new["key"])
    assert holding_keys(tmp_path) == []


def holding_keys(folder: Path) -> list[Path]:
    """Files of the database that have the beginning of a key in them."""
    files = list(folder.glob("keys.db*"))
    assert files
    return [file for file in files if b"tgk_" in file.read_bytes()]


async def test_tenants_by_command(url: str) -> None:
    environ = {"TIDEGATE_DATABASE": url}
    code, out, said = await run_tidegate("tenants", "set", "acme", "--weight", "2", environ=environ)
    assert (code, out) == (0, "acme is set\n"), said
    code, out, said = await run_tidegate("tenants", "list", environ=environ)
    assert [line.split() for line in out.splitlines()] == [
        ["TENANT", "STATE", "WEIGHT", "LIMITS"],
        ["acme", "enabled", "2", "-"],
    ]


# -- creating and changing


def test_everything_that_a_key_may_be_bound_to(capsys: Said, url: str) -> None:
    made = ordered(
        capsys,
        *("keys", "create", "--tenant", "acme", "--models", "chat,org/code", "--adapters", "support"),
        *("--regions", "eu-west,us", "--class", "batch", "--deadline-ms", "30000", "--max-output-tokens", "512"),
        *("--limit", "requests_per_minute=60", "--limit", "usd_per_month=12.5", "--limit", "shadow=true"),
        *("--expires", "2099-12-31", "--metadata", "team=x", "--metadata", "note=a=b", "--name", "a name"),
        "--capture-content",
    )
    record = directory(url).authenticate(bearing(made["key"]), NOW).key
    assert record is not None
    expected = {
        "tenant": "acme",
        "name": "a name",
        "hint": made["key"][-4:],
        "state": "valid",
        "models": ["chat", "org/code"],
        "adapters": ["support"],
        "regions": ["eu-west", "us"],
        "class": "batch",
        "deadline_ms": 30000,
        "max_output_tokens": 512,
        "limits": {"requests_per_minute": 60, "usd_per_month": 12.5, "shadow": True},
        "raises": [],
        "disabled": False,
        "expires": "2099-12-31T00:00:00Z",
        "replaced_by": None,
        "metadata": {"team": "x", "note": "a=b"},
        "capture_content": True,
    }
    assert {name: made[name] for name in expected} == expected
    assert set(made) == {*expected, "key", "id", "created", "database"}
    assert f"sqlite:///{made['database']}" == url
    shown = ordered(capsys, "keys", "show", made["id"])
    assert shown == {name: value for name, value in made.items() if name not in ("key", "database")}
    assert (record.id, record.priority_class, record.limits.usd_per_month) == (made["id"], "batch", 12.5)
    assert ordered(capsys, "tenants", "show", "acme")["weight"] == 1.0  # made with its first key


def test_an_update_changes_what_is_named_and_nothing_else(capsys: Said, url: str) -> None:
    made = ordered(capsys, "keys", "create", "--tenant", "t", "--models", "a", "--limit", "tokens_per_minute=5")
    changed = ordered(capsys, "keys", "update", made["id"], "--limit", "requests_per_minute=7", "--class", "critical")
    assert changed["limits"] == {"requests_per_minute": 7, "tokens_per_minute": 5}
    assert (changed["models"], changed["class"]) == (["a"], "critical")
    changed = ordered(capsys, "keys", "update", made["id"], "--models", "*", "--limit", "tokens_per_minute=none")
    assert (changed["models"], changed["limits"]) == (None, {"requests_per_minute": 7})
    assert opens(url, made["key"])


def test_disable_is_taken_back_and_revoke_is_not(capsys: Said, url: str) -> None:
    made = ordered(capsys, "keys", "create", "--tenant", "t")
    assert ordered(capsys, "keys", "disable", made["id"])["state"] == "disabled"
    assert not opens(url, made["key"])
    assert ordered(capsys, "keys", "enable", made["id"])["state"] == "valid"
    assert opens(url, made["key"])
    assert ordered(capsys, "keys", "revoke", made["id"])["state"] == "revoked"
    assert not opens(url, made["key"])
    for action in ("enable", "revoke", "show", "rotate"):
        code, said = refused(capsys, "keys", action, made["id"])
        assert code == 2
        assert f"there is no key '{made['id']}'" in said


def test_a_key_ends_when_it_was_told_to(capsys: Said, url: str) -> None:
    made = ordered(capsys, "keys", "create", "--tenant", "t", "--expires", "12h")
    assert opens(url, made["key"], 12 * 3600 - 60)
    assert not opens(url, made["key"], 12 * 3600 + 1)
    assert ordered(capsys, "keys", "expire", made["id"], "--at", "now")["state"] == "expired"
    assert not opens(url, made["key"])
    assert ordered(capsys, "keys", "expire", made["id"], "--at", "never")["expires"] is None
    assert opens(url, made["key"], 1e9)


def test_a_rotated_key_keeps_its_rights_and_rotates_again(capsys: Said, url: str) -> None:
    first = ordered(capsys, "keys", "create", "--tenant", "t", "--models", "a", "--limit", "tokens_per_minute=5")
    second = ordered(capsys, "keys", "rotate", first["id"])
    assert (second["models"], second["limits"], second["tenant"]) == (["a"], {"tokens_per_minute": 5}, "t")
    old = ordered(capsys, "keys", "show", first["id"])
    assert old["replaced_by"] == second["id"]
    for key in (first["key"], second["key"]):
        assert opens(url, key, 24 * 3600 - 60)
    assert not opens(url, first["key"], 24 * 3600 + 1)
    assert opens(url, second["key"], 24 * 3600 + 1)
    third = ordered(capsys, "keys", "rotate", second["id"], "--overlap", "0")
    assert (opens(url, second["key"]), opens(url, third["key"])) == (False, True)
    code, said = refused(capsys, "keys", "rotate", first["id"])
    assert code == 1
    assert f"was replaced by {second['id']}: rotate that one" in said
    ordered(capsys, "keys", "disable", third["id"])
    code, said = refused(capsys, "keys", "rotate", third["id"])
    assert (code, "is disabled" in said) == (1, True)


def test_tenants_are_set_field_by_field_and_raised_for_a_time(capsys: Said, url: str) -> None:
    ordered(capsys, "tenants", "set", "acme", "--weight", "2.5", "--limit", "usd_per_day=5")
    ordered(capsys, "tenants", "set", "acme", "--user-limit", "requests_per_minute=3")
    ordered(capsys, "tenants", "set", "acme", "--model-limit", "ollama:7b:tokens_per_minute=9")
    tenant = ordered(capsys, "tenants", "raise", "acme", "--limit", "usd_per_day=50", "--until", "2099-01-01")
    assert f"sqlite:///{tenant.pop('database')}" == url
    assert tenant == {
        "name": "acme",
        "weight": 2.5,
        "limits": {"usd_per_day": 5.0},
        "user_limits": {"requests_per_minute": 3},
        "model_limits": {"ollama:7b": {"tokens_per_minute": 9}},
        "raises": [{"limits": {"usd_per_day": 50.0}, "until": "2099-01-01T00:00:00Z"}],
        "disabled": False,
        "metadata": {},
    }
    made = ordered(capsys, "keys", "create", "--tenant", "acme")
    assert ordered(capsys, "tenants", "set", "acme", "--disable")["weight"] == 2.5
    assert not opens(url, made["key"])
    assert ordered(capsys, "tenants", "list")["data"][0]["disabled"]
    ordered(capsys, "tenants", "set", "acme", "--enable")
    assert opens(url, made["key"])
    raised = ordered(capsys, "keys", "raise", made["id"], "--limit", "requests_per_minute=9", "--until", "2h")
    assert raised["raises"][0]["limits"] == {"requests_per_minute": 9}


def test_what_was_ordered_is_in_the_audit_with_who_ordered_it(capsys: Said, url: str) -> None:
    made = ordered(capsys, "keys", "create", "--tenant", "acme")
    ordered(capsys, "keys", "disable", made["id"])
    database = Database.open(url)
    entries = database.audit.list()
    database.close()
    assert [entry.action for entry in entries] == ["key.disable", "key.create", "tenant.put"]
    assert {entry.actor.partition(":")[0] for entry in entries} == {"cli"}
    assert made["key"] not in str(entries)


def test_lists_for_people(capsys: Said, url: str) -> None:
    made = ordered(capsys, "keys", "create", "--tenant", "acme", "--models", "a,b")
    ordered(capsys, "keys", "create", "--tenant", "other")
    assert main(["keys", "list", "--tenant", "acme"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["ID", "TENANT", "NAME"]
    assert row.split() == [made["id"], "acme", "-", made["key"][-4:], "valid", "standard", "a,b", "never"]
    made = ordered(capsys, "keys", "create", "--tenant", "third", "--expires", "90d")
    assert main(["keys", "list", "--tenant", "third"]) == 0
    assert capsys.readouterr().out.split()[-1] == made["expires"][:19] + "Z"  # without parts of seconds
    assert main(["keys", "show", made["id"]]) == 0
    assert "tenant             third" in capsys.readouterr().out


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class", "critcal"], "--class: 'critcal' is not a class; did you mean critical?"),
        (["--class", "x"], "write one of critical, standard, batch, sheddable"),
        (["--expires", "tomorrow"], "--expires: 'tomorrow' is not a time; write a span from now such as 30d"),
        (["--expires", "2026-02-30"], "--expires: '2026-02-30' is not a time"),
        (["--expires", "2026-12-31T10:00:00"], "is not a time"),
        (["--expires", "2001-01-01"], "--expires: 2001-01-01T00:00:00Z has passed; write a time to come"),
        (["--limit", "requests=5"], "--limit requests: is not a known limit"),
        (["--limit", "requests_per_minut=5"], "did you mean requests_per_minute?"),
        (["--limit", "requests_per_minute=lots"], '--limit requests_per_minute: "lots" is not a whole number'),
        (["--limit", "requests_per_minute=0"], "--limit requests_per_minute: 0 is too small"),
        (["--limit", "usd_per_day=nan"], "--limit usd_per_day: "),
        (["--limit", "5"], "--limit: '5' has no name and value; write LIMIT=VALUE"),
        (["--models", "a b"], '--models: "a b" is not a valid name; use 1 to 200 printable'),
        (["--regions", "EU"], '--regions: "EU" is not a valid name; use at most 32 lower-case'),
        (["--deadline-ms", "99999999999"], "--deadline-ms: 99999999999 is out of range"),
        (["--metadata", "x"], "--metadata: 'x' has no name and value; write NAME=TEXT"),
        (["--tenant", "a/b"], '--tenant: "a/b" is not a valid name'),
        (["--deadline-ms", "soon"], "'soon' is not a whole number above 0"),
    ],
)
def test_a_value_that_cannot_be_taken_is_named_with_what_to_write(
    capsys: Said, url: str, arguments: list[str], words: str
) -> None:
    code, said = refused(capsys, "keys", "create", "--tenant", "acme", *arguments)
    assert code == 2
    assert words.replace("'", "").replace('"', "") in said.replace("'", "").replace('"', "")
    assert ordered(capsys, "keys", "list") == {"data": []}


def test_an_error_is_json_where_json_is_asked_for(capsys: Said) -> None:
    assert main(["keys", "show", "key_nobody", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "there is no key" in json.loads(out)["error"]
    assert "there is no key" in err


def test_a_database_in_a_directory_that_is_missing_is_named(capsys: Said, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TIDEGATE_DATABASE", f"sqlite:///{tmp_path}/nowhere/keys.db")
    for arguments in (["list"], ["create", "--tenant", "acme"]):
        code, said = refused(capsys, "keys", *arguments)
        assert code == 2
        assert f"there is no directory {tmp_path}/nowhere: make it, or change the setting database" in said


def test_a_file_that_is_no_database_is_named(capsys: Said, tmp_path: Path) -> None:
    (tmp_path / "keys.db").write_bytes(b"not a database " * 1000)
    code, said = refused(capsys, "keys", "list")
    assert code == 2
    assert "keys.db cannot be used: file is not a database" in said


def test_a_server_that_does_not_answer_is_named(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_DATABASE", "postgresql://tidegate@127.0.0.1:9/tidegate")
    code, said = refused(capsys, "keys", "list")
    assert code == 1
    assert "127.0.0.1:9" in said


def test_keys_are_not_made_with_another_pepper_than_before(capsys: Said, tmp_path: Path, monkeypatch: Any) -> None:
    ordered(capsys, "keys", "create", "--tenant", "acme")
    monkeypatch.setenv("TIDEGATE_KEYS__PEPPER", "p" * 32)
    code, said = refused(capsys, "keys", "create", "--tenant", "acme")
    assert code == 2
    assert "another pepper" in said


def test_a_lost_pepper_is_not_replaced_before_the_keys_are_gone(capsys: Said, tmp_path: Path, url: str) -> None:
    made = ordered(capsys, "keys", "create", "--tenant", "acme")
    file = tmp_path / "keys.db.pepper"
    pepper = file.read_bytes()
    file.unlink()
    for action in (["create", "--tenant", "acme"], ["rotate", made["id"]]):
        code, said = refused(capsys, "keys", *action)
        assert code == 2
        assert f"{file}, is gone" in said
        assert "put the file back" in said
    with pytest.raises(PepperError, match="is gone"):
        load_pepper(None, url)
    assert not file.exists()
    file.write_bytes(pepper)
    file.chmod(0o600)
    assert opens(url, made["key"])
    file.unlink()
    ordered(capsys, "keys", "revoke", made["id"])
    new = ordered(capsys, "keys", "create", "--tenant", "acme")
    assert file.read_bytes() != pepper
    assert opens(url, new["key"])


def test_a_configuration_names_the_database_and_is_held_against_what_is_ordered(
    capsys: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIDEGATE_DATABASE")
    config = tmp_path / "tidegate.yaml"
    database = f"sqlite:///{tmp_path / 'other.db'}"
    models = {"chat": {"backend": "pool", "aliases": ["gpt-x"]}}
    write_config(config, ["http://127.0.0.1:9"], database=database, models=models)
    code = main(["keys", "create", "--tenant", "acme", "--models", "chat,gpt-x,cht", "--config", str(config)])
    out, said = capsys.readouterr()
    assert code == 0, said
    assert opens(database, out.strip())
    assert "'gpt-x' is an alias" in said
    assert "write the model's name, 'chat'" in said
    assert "has no model 'cht'" in said
    assert "auth: insecure" in said
    config.write_text(config.read_text().replace("server:", "sever:"))
    code, said = refused(capsys, "keys", "list", "--config", str(config))
    assert code == 2
    assert "sever: is not a known setting; did you mean server?" in said


def test_the_database_that_is_written_to_is_named(
    capsys: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that is relative is relative to the working directory: in another one, another database is made."""
    monkeypatch.setenv("TIDEGATE_DATABASE", "sqlite:///own.db")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        file = tmp_path / name / "own.db"
        assert main(["keys", "create", "--tenant", "acme"]) == 0
        said = capsys.readouterr().err.splitlines()
        assert f"note: made a new database: {file}" in said
        assert said[-1] == f"written to the database {file}"
        assert main(["tenants", "set", "acme"]) == 0
        assert capsys.readouterr().err == f"written to the database {file}\n"
        assert ordered(capsys, "tenants", "set", "acme")["database"] == str(file)
        assert main(["keys", "list"]) == 0
        assert capsys.readouterr().err == ""


def test_a_key_in_the_place_of_an_id_is_not_repeated(capsys: Said, url: str) -> None:
    key = ordered(capsys, "keys", "create", "--tenant", "acme")["key"]
    for arguments in (
        ["keys", "show", key],
        ["keys", "revoke", f"x{key}y"],
        ["keys", "rotate", key[:40]],
        ["tenants", "show", key],
        ["tenants", "set", key],
        ["keys", key],
        ["keys", "show", "key_a", key],
        ["keys", "create", "--tenant", "acme", "--deadline-ms", key],
        ["keys", "create", "--tenant", "acme", "--limit", key],
        ["keys", "create", "--tenant", "acme", "--expires", key],
        ["keys", "create", "--tenant", "acme", "--class", key],
    ):
        code, said = refused(capsys, *arguments)
        assert code == 2
        assert key[8:30] not in said, said
    assert main(["keys", "show", key, "--json"]) == 2
    out, err = capsys.readouterr()
    assert key[8:30] not in out + err
    assert "looks like a key: ids begin with key_" in json.loads(out)["error"]


def test_an_update_of_nothing_is_refused(capsys: Said, url: str) -> None:
    made = ordered(capsys, "keys", "create", "--tenant", "acme")
    code, said = refused(capsys, "keys", "update", made["id"])
    assert code == 2
    assert "nothing was given to change" in said


def test_none_takes_a_number_away_and_is_no_model(capsys: Said, url: str) -> None:
    numbers = ("--deadline-ms", "500", "--max-output-tokens", "9")
    made = ordered(capsys, "keys", "create", "--tenant", "acme", "--models", "a", *numbers)
    changed = ordered(capsys, "keys", "update", made["id"], "--deadline-ms", "none", "--max-output-tokens", "none")
    assert (changed["deadline_ms"], changed["max_output_tokens"], changed["models"]) == (None, None, ["a"])
    for flag in ("--models", "--adapters", "--regions"):
        code, said = refused(capsys, "keys", "update", made["id"], flag, "none")
        assert code == 2
        assert f"{flag}: 'none' is no name; write '*' for all" in said
    assert ordered(capsys, "keys", "update", made["id"], "--name", "none")["name"] == "none"


def test_the_command_is_quick_to_start() -> None:
    """What every command would have to wait for is only imported by those that need it."""
    code = "import sys, gateway.cli; gateway.cli._parser(); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"sqlalchemy", "alembic", "pydantic", "msgspec", "gateway.config"} & set(loaded) == set()
    assert callable(run)


def test_the_admin_routes_bring_in_no_database_library() -> None:
    code = "import sys, gateway.key_routes, gateway.keys.sync, gateway.keys.directory; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"sqlalchemy", "alembic", "redis"} & set(loaded) == set()


# -- times


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("30d", 2_592_000), ("2w", 1_209_600), ("5m", 300), ("0", 0)]
)
def test_spans(text: str, seconds: float) -> None:
    assert parse_span_s(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "-1h", "1y", "1h30m", "h", "1e3s", "٣h"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(ValueError, match="write a number and s, m, h, d or w"):
        parse_span_s(text)


@pytest.mark.parametrize("text", ["999999w", "36526d"])
def test_a_span_that_is_too_long_is_called_so(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is too long: write at most 100 years, which are 36525d"):
        parse_span_s(text)
    assert parse_span_s("36525d") == 36_525 * 86_400


def test_moments() -> None:
    assert parse_moment("now", NOW) == NOW
    assert parse_moment("12h", NOW) == NOW + 43_200
    assert shown(parse_moment("2026-12-31", NOW)) == "2026-12-31T00:00:00Z"
    assert shown(parse_moment("2026-12-31T18:00:00+02:00", NOW)) == "2026-12-31T16:00:00Z"
    assert shown(parse_moment("2026-12-31t18:00:00.250z", NOW)) == "2026-12-31T18:00:00.250Z"
    assert parse_moment(shown(NOW), 0) == NOW
    for text in ("", "2026-13-01", "2026-12-31T18:00:00", "31.12.2026", "1767139200", "20261231"):
        with pytest.raises(ValueError, match="write a span"):
            parse_moment(text, NOW)
