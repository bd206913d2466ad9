"""What `tidegate keys` and `tidegate tenants` note of a configuration, and which of its secrets they need."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cli import main
from gateway.config import ConfigError, load
from tests.gateway.keys.ordering import Said, environment_of, ordered, refused
from tests.support.process import ROOT


@pytest.fixture(autouse=True)
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database that the environment names."""
    return environment_of(tmp_path, monkeypatch)


NOTED = """\
auth: keys
keys: {pepper: {env: NOT_SET_HERE}}
admin: {token: {env: NOT_SET_EITHER}}
tenants: {search: {}, reports: {}}
models:
  chat: {backend: pool, price: {input: 1, output: 2}}
  code: {backend: pool}
  free: {backend: pool}
backends:
  pool:
    engine: sglang
    api_key: {file: /nowhere/key}
    adapters: [{name: support, path: /adapters/support}]
    replicas: [{url: "http://127.0.0.1:9", region: eu-west}]
"""


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration, of whose secrets only the pepper is there."""
    monkeypatch.setenv("NOT_SET_HERE", "p" * 32)
    config = tmp_path / "noted.yaml"
    config.write_text(NOTED)
    return str(config)


def notes_of(capsys: Said, *arguments: str) -> list[str]:
    """What a command that is done notes, but for the database."""
    assert main(list(arguments)) == 0
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith("written to the database /") for line in said)
    return [line for line in said if line.startswith("note: ") and "made a new database" not in line]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["keys", "create", "--tenant", "serach"], ["knows a tenant 'serach'; did you mean search?"]),
        (["keys", "create", "--tenant", "search", "--regions", "eu-wset"], ["region 'eu-wset'; did you mean eu-west?"]),
        (["keys", "create", "--tenant", "search", "--adapters", "suport"], ["adapter 'suport'; did you mean support?"]),
        (["keys", "create", "--tenant", "search", "--models", "chatt"], ["model 'chatt'; did you mean chat?"]),
        (["keys", "create", "--tenant", "default", "--regions", "eu-west", "--adapters", "support"], []),
        (["tenants", "set", "report", "--weight", "2"], ["knows a tenant 'report'; did you mean reports?"]),
        (["tenants", "set", "search", "--model-limit", "chatt:requests_per_minute=1"], ["did you mean chat?"]),
        (["keys", "create", "--tenant", "search", "--limit", "usd_per_day=0.01"], ["no price for 'code', 'free', so"]),
        (
            ["keys", "create", "--tenant", "search", "--limit", "usd_per_day=1", "--models", "free"],
            ["price for 'free',"],
        ),
        (["keys", "create", "--tenant", "search", "--limit", "usd_per_day=1", "--models", "chat"], []),
        (["keys", "create", "--tenant", "search", "--limit", "usd_per_day=none"], []),
        (["keys", "create", "--tenant", "search", "--limit", "tokens_per_minute=1"], []),
        (["tenants", "set", "search", "--limit", "usd_per_month=1"], ["--limit: ", "model_without_price"]),
        (["tenants", "set", "search", "--user-limit", "usd_per_month=1"], ["--user-limit: ", "'code', 'free'"]),
        (["tenants", "set", "search", "--model-limit", "code:usd_per_day=1"], ["--model-limit: ", "for 'code', so"]),
        (["tenants", "set", "search", "--model-limit", "chat:usd_per_day=1"], []),
        (["tenants", "raise", "search", "--limit", "usd_per_day=1", "--until", "1d"], ["'code', 'free'"]),
    ],
)
def test_what_may_not_be_meant_is_noted_and_done(
    capsys: Said, noted: str, arguments: list[str], words: list[str]
) -> None:
    said = notes_of(capsys, *arguments, "--config", noted)
    assert len(said) == bool(words), said
    for each in words:
        assert each in said[0]


def test_a_tenant_of_the_database_is_no_slip(capsys: Said, noted: str) -> None:
    create = ("keys", "create", "--tenant", "sales", "--config", noted)
    assert len(notes_of(capsys, *create)) == 1
    assert notes_of(capsys, *create) == []


def test_a_budget_of_a_key_is_held_against_the_models_that_it_may_use(capsys: Said, noted: str) -> None:
    config = ("--config", noted)
    one = ordered(capsys, "keys", "create", "--tenant", "search", "--models", "chat", *config)["id"]
    assert notes_of(capsys, "keys", "update", one, "--limit", "usd_per_day=1", *config) == []
    assert notes_of(capsys, "keys", "raise", one, "--limit", "usd_per_day=2", "--until", "1d", *config) == []
    (said,) = notes_of(capsys, "keys", "update", one, "--models", "chat,free", *config)
    assert "no price for 'free', so a budget cannot be counted there" in said
    (said,) = notes_of(capsys, "keys", "raise", one, "--limit", "usd_per_day=2", "--until", "1d", *config)
    assert "no price for 'free'," in said
    (said,) = notes_of(capsys, "keys", "update", one, "--models", "*", "--limit", "usd_per_day=1", *config)
    assert "no price for 'code', 'free'," in said


def test_only_the_secrets_that_a_command_needs_have_to_be_there(
    capsys: Said, noted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered(capsys, "keys", "create", "--tenant", "search", "--config", noted)
    monkeypatch.delenv("NOT_SET_HERE")
    ordered(capsys, "keys", "list", "--config", noted)
    ordered(capsys, "tenants", "set", "search", "--weight", "2", "--config", noted)
    code, said = refused(capsys, "keys", "create", "--tenant", "search", "--config", noted)
    assert code == 2
    assert "keys.pepper.env: the environment variable NOT_SET_HERE is not set" in said
    assert "NOT_SET_EITHER" not in said
    for name in ("cluster", "hosted", "keys", "example"):  # which only an own configuration check asks for more
        with pytest.raises(ConfigError, match="is not set"):
            load(ROOT / "configs" / f"{name}.yaml", {})
        assert load(ROOT / "configs" / f"{name}.yaml", {}, secrets=()).models
