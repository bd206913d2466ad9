"""Overrides from the environment: which variable means which setting, and what a misspelt one gets told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.config import ConfigError, Settings, load

FILE = """\
models:
  qwen2.5:7b: {backend: my-pool}
backends:
  my-pool:
    engine: sglang
    api_key: {env: OLD_KEY}
    replicas:
      - {url: "http://a"}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tidegate.yaml"
    path.write_text(FILE)
    return path


def loaded(path: Path, environ: Mapping[str, str]) -> Settings:
    return load(path, {"OLD_KEY": "old", **environ})


def refused(path: Path | None, environ: Mapping[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, {"OLD_KEY": "old", **environ})
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("FALSE", False), ("1", True), ("0", False), ("off", False), ("yes", True)],
)
def test_switches_are_read(text: str, value: bool) -> None:
    assert load(None, {"TIDEGATE_ADMIN__ENABLED": text}).admin.enabled is value


def test_numbers_and_null_are_read() -> None:
    settings = load(None, {"TIDEGATE_STREAM__HOLD_S": "2.5", "TIDEGATE_SERVER__UDS": "null"})
    assert settings.stream.hold_s == 2.5
    assert settings.server.uds is None


def test_names_match_without_case_and_punctuation(path: Path) -> None:
    environ = {
        "TIDEGATE_BACKENDS__MY_POOL__ENGINE": "vllm",
        "TIDEGATE_MODELS__QWEN2_5_7B__UPSTREAM_MODEL": "Q",
    }
    settings = loaded(path, environ)
    assert list(settings.backends) == ["my-pool"]
    assert settings.backends["my-pool"].engine == "vllm"
    assert settings.models["qwen2.5:7b"].upstream_model == "Q"


def test_one_replica_is_changed_and_another_added(path: Path) -> None:
    prefix = "TIDEGATE_BACKENDS__MY_POOL__REPLICAS"
    settings = loaded(path, {f"{prefix}__0__REGION": "eu-west", f"{prefix}__1__URL": "http://b"})
    first, second = settings.backends["my-pool"].replicas
    assert (first.url, first.region, second.url) == ("http://a:80", "eu-west", "http://b:80")


def test_json_replaces_a_list_or_section_and_single_settings_come_after(path: Path) -> None:
    settings = loaded(
        path,
        {
            "TIDEGATE_MODELS__QWEN2_5_7B__ALIASES": '["a", "b"]',
            "TIDEGATE_SERVER": '{"port": 1, "keep_alive_s": 3}',
            "TIDEGATE_SERVER__PORT": "2",
        },
    )
    assert settings.models["qwen2.5:7b"].aliases == ("a", "b")
    assert (settings.server.port, settings.server.keep_alive_s) == (2, 3)


def test_everything_can_come_from_the_environment() -> None:
    settings = load(
        None,
        {
            "TIDEGATE_MODELS__CHAT__BACKEND": "pool",
            "TIDEGATE_BACKENDS__POOL__ENGINE": "vllm",
            "TIDEGATE_BACKENDS__POOL__REPLICAS": '[{"url": "http://a"}]',
            "TIDEGATE_MODELS__CHAT__PRICE__INPUT": "1",
        },
    )
    assert settings.backends["pool"].replicas[0].name == "pool-0"


def test_secrets_may_be_literal_or_references_and_replace_the_files(path: Path) -> None:
    name = "TIDEGATE_BACKENDS__MY_POOL__API_KEY"
    for environ in (
        {name: "new"},
        {f"{name}__ENV": "NEW", "NEW": "new"},
        {name: '{"env": "NEW"}', "NEW": "new"},
    ):
        key = load(path, environ).backends["my-pool"].api_key  # OLD_KEY is not needed any more
        assert key is not None
        assert key.get_secret_value() == "new"


def test_a_secrets_own_variable_may_begin_with_our_prefix(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(FILE.replace("OLD_KEY", "TIDEGATE_UPSTREAM_KEY"))
    assert load(path, {"TIDEGATE_UPSTREAM_KEY": "x"}).backends["my-pool"].api_key is not None


def test_the_variables_of_a_kubernetes_service_are_passed_over() -> None:
    load(
        None,
        {
            "TIDEGATE_PORT": "tcp://10.0.0.1:7400",
            "TIDEGATE_SERVICE_HOST": "10.0.0.1",
            "TIDEGATE_SERVICE_PORT_HTTP": "7400",
            "TIDEGATE_PORT_7400_TCP_ADDR": "10.0.0.1",
            "TIDEGATE_REDIS_PORT": "tcp://10.0.0.2:6379",
            "TIDEGATE_REDIS_SERVICE_HOST": "10.0.0.2",
            "TIDEGATE_REDIS_PORT_6379_TCP_PROTO": "tcp",
        },
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TIDEGATE_SEVER__PORT", "TIDEGATE_SERVER__PORT"),
        ("TIDEGATE_SERVER_PORT", "TIDEGATE_SERVER__PORT"),
        ("TIDEGATE_ADMIN_TOKEN", "TIDEGATE_ADMIN__TOKEN"),
        ("TIDEGATE_SERVER__PORT__X", "TIDEGATE_SERVER__PORT"),
        ("TIDEGATE_BACKENDS__MY_POOL__ENGIN", "TIDEGATE_BACKENDS__MY_POOL__ENGINE"),
        ("TIDEGATE_ADMIN__TOKEN__FIEL", "TIDEGATE_ADMIN__TOKEN__FILE"),
    ],
)
def test_a_misspelt_variable_is_named_and_corrected(path: Path, name: str, meant: str) -> None:
    message = refused(path, {name: "hunter2"})
    assert message.startswith("environment: ")
    assert f"the variable {name} names no setting; did you mean {meant}?" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("name", ["TIDEGATE_", "TIDEGATE_LOG", "TIDEGATE_BACKENDS__MY_POOL__REPLICAS__7__URL"])
def test_a_variable_that_leads_nowhere_is_named(path: Path, name: str) -> None:
    assert f"the variable {name} names no setting" in refused(path, {name: "x"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TIDEGATE_SERVER__PORT", "http", 'server.port: TIDEGATE_SERVER__PORT: "http" is not a whole number'),
        ("TIDEGATE_SERVER__PORT", "", 'server.port: TIDEGATE_SERVER__PORT: "" is not a whole number'),
        ("TIDEGATE_SERVER__PORT", "70000", "TIDEGATE_SERVER__PORT: 70000 is too large; write at most 65535"),
        ("TIDEGATE_STREAM__HOLD_S", "nan", "TIDEGATE_STREAM__HOLD_S: NaN is not a finite number"),
        ("TIDEGATE_ADMIN__ENABLED", "maybe", 'TIDEGATE_ADMIN__ENABLED: "maybe" is not true or false'),
        ("TIDEGATE_SERVER", "{oops", 'TIDEGATE_SERVER: "{oops" is not a mapping'),
        ("TIDEGATE_SERVER", '{"prot": 1}', "server.prot: TIDEGATE_SERVER: is not a known setting"),
        ("TIDEGATE_ADMIN__TOKEN", "short", "TIDEGATE_ADMIN__TOKEN: the token is shorter than 16 bytes"),
        ("TIDEGATE_ADMIN__TOKEN", "", "TIDEGATE_ADMIN__TOKEN: the secret is empty"),
        ("TIDEGATE_SERVER__HOST", "0.0.0.0", "TIDEGATE_SERVER__HOST: auth is insecure"),
        (
            "TIDEGATE_USAGE_LOG__PATH",
            "sk-abcdefgh",
            "TIDEGATE_USAGE_LOG__PATH: the value looks like a secret",
        ),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str, said: str) -> None:
    assert said in refused(None, {name: value})


def test_a_value_that_is_not_text_can_still_be_printed() -> None:
    refused(None, {"TIDEGATE_SERVER__HOST": "\udc80\x1b[1m"}).encode()


def test_options_of_the_command_line_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"^command line: server\.host: auth is insecure"):
        load(None, {}, {"server.host": "0.0.0.0"})
