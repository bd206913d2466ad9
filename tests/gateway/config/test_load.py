"""Loading: precedence, defaults, normalised values, and the example files."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gateway.config import (
    ConfigError,
    LimitBlock,
    Settings,
    json_schema,
    keep_restart_only,
    load,
    needs_shared_store,
    require_database_folder,
    require_models,
    restart_only_changes,
)
from gateway.config.replicas import KeyHeader
from gateway.config.schema import Server
from gateway.config.tree import fields_of, kind_at, model_of, setting_paths
from gateway.limits.sets import LimitSet

ROOT = Path(__file__).parents[3]
TOKEN = "0123456789abcdef"
HOSTED_KEYS = {
    f"{api}_API_KEY": "k"
    for api in ("OPENAI", "AZURE_OPENAI", "DEEPSEEK", "OPENROUTER", "TOGETHER", "HOLYSHEEP", "BASETEN")
}
"""What configs/hosted.yaml wants in its environment."""
OTHER_SECRETS = {
    "SPILL_API_KEY": "b",
    "GATEWAY_ADMIN_TOKEN": TOKEN,
    "GATEWAY_GRAFANA_TOKEN": "grafana-0123456789",
    "GATEWAY_OIDC_SECRET": "o",
    "CHAT_APP_KEY": "chat-app-0123456789",
    "NIGHTLY_KEY": "nightly-0123456789",
    "REDIS_PASSWORD": "r",
    "DATABASE_PASSWORD": "d",
    "KEY_PEPPER": "pepper-" + 25 * "0",
}
"""What the other examples want."""

MINIMAL = """\
models:
  chat: {backend: pool}
backends:
  pool:
    engine: sglang
    replicas:
      - {url: "http://127.0.0.1:30000"}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tidegate.yaml"
    path.write_text(text)
    return path


def with_url(folder: Path, url: str) -> Settings:
    return load(write(folder, MINIMAL.replace("http://127.0.0.1:30000", url)), {})


def test_defaults_alone_are_valid() -> None:
    settings = load(None, {})
    assert settings == Settings()
    assert (settings.server.port, settings.admin.port, settings.auth) == (7400, 7401, "insecure")


def test_an_unrelated_environment_and_the_process_environment_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIDEGATE_SERVER__PORT", "1")
    assert load(None, {"PATH": "/bin", "SERVER__PORT": "2"}).server.port == 7400
    assert Settings().server.port == 7400


def test_command_line_wins_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "server: {port: 7001, keep_alive_s: 9}\n")
    environ = {"TIDEGATE_SERVER__PORT": "7002"}
    assert load(path, {}).server.port == 7001
    assert load(path, environ).server.port == 7002
    assert load(path, environ).server.keep_alive_s == 9
    assert load(path, environ, {"server.port": "7003"}).server.port == 7003


def test_nothing_can_be_changed() -> None:
    settings = load(None, {})
    with pytest.raises(ValidationError):
        settings.server.port = 1
    with pytest.raises(ValidationError):
        settings.auth = "insecure"


def test_settings_survive_the_way_to_a_worker_process(tmp_path: Path) -> None:
    settings = load(write(tmp_path, MINIMAL), {"TIDEGATE_ADMIN__TOKEN": TOKEN})
    copy = pickle.loads(pickle.dumps(settings))
    assert copy == settings
    assert copy.admin.token.get_secret_value() == TOKEN


def test_replicas_are_named_after_their_pool_and_position(tmp_path: Path) -> None:
    text = MINIMAL + '      - {url: "http://b", name: big}\n      - {url: "http://c", name: null}\n'
    names = [replica.name for replica in load(write(tmp_path, text), {}).backends["pool"].replicas]
    assert names == ["pool-0", "big", "pool-2"]


@pytest.mark.parametrize(
    ("written", "origin", "prefix"),
    [
        ("http://127.0.0.1:30000", "http://127.0.0.1:30000", ""),
        ("http://127.0.0.1:30000/", "http://127.0.0.1:30000", ""),
        ("http://127.0.0.1:30000/v1", "http://127.0.0.1:30000", ""),
        ("http://127.0.0.1:30000/v1/", "http://127.0.0.1:30000", ""),
        ("HTTP://Engine.Local", "http://engine.local:80", ""),
        ("https://openrouter.ai/api/v1", "https://openrouter.ai:443", "/api"),
        ("https://example.com/a/b/", "https://example.com:443", "/a/b"),
        ("http://engine_1:8000", "http://engine_1:8000", ""),
        ("http://[::1]:30000/v1", "http://[::1]:30000", ""),
        ("http+unix://%2Frun%2Fllama.sock", "http+unix://%2Frun%2Fllama.sock", ""),
        ("http+unix://%2frun%2fLlama.sock/v1", "http+unix://%2Frun%2FLlama.sock", ""),
    ],
)
def test_replica_urls_are_taken_apart(tmp_path: Path, written: str, origin: str, prefix: str) -> None:
    replica = with_url(tmp_path, written).backends["pool"].replicas[0]
    assert (replica.origin, replica.path_prefix) == (origin, prefix)
    assert replica.url == origin + prefix


def test_a_models_timeouts_override_its_backends_one_by_one(tmp_path: Path) -> None:
    text = MINIMAL.replace("{backend: pool}", "{backend: pool, timeouts: {idle_s: 7}}")
    settings = load(write(tmp_path, text + "    timeouts: {idle_s: 5, total_s: 50}\n"), {})
    timeouts = settings.effective_timeouts("chat")
    assert (timeouts.connect_s, timeouts.idle_s, timeouts.total_s) == (2, 7, 50)


def test_cached_tokens_cost_the_same_unless_told_otherwise(tmp_path: Path) -> None:
    text = MINIMAL.replace("{backend: pool}", "{backend: pool, price: {input: 2, output: 3}}")
    price = load(write(tmp_path, text), {}).models["chat"].price
    assert price is not None
    assert (price.input, price.cached_input, price.output) == (2, 2, 3)


def test_a_model_without_a_price_has_none(tmp_path: Path) -> None:
    assert load(write(tmp_path, MINIMAL), {}).models["chat"].price is None


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, MINIMAL + "server:\nstream:\n"), {}).server == Server()


def test_an_alias_in_yaml_is_a_copy(tmp_path: Path) -> None:
    text = MINIMAL + "    timeouts: &t {idle_s: 5}\n  other:\n    engine: vllm\n    timeouts: *t\n"
    text += "    replicas: [{url: http://o}]\n"
    settings = load(write(tmp_path, text), {"TIDEGATE_BACKENDS__POOL__TIMEOUTS__IDLE_S": "9"})
    assert settings.backends["pool"].timeouts.idle_s == 9
    assert settings.backends["other"].timeouts.idle_s == 5


def test_merge_keys_work(tmp_path: Path) -> None:
    text = MINIMAL + "    timeouts: &t {idle_s: 5, total_s: 50}\n  other:\n    engine: vllm\n"
    text += "    timeouts: {<<: *t, idle_s: 6}\n    replicas: [{url: http://o}]\n"
    timeouts = load(write(tmp_path, text), {}).backends["other"].timeouts
    assert (timeouts.idle_s, timeouts.total_s) == (6, 50)


def test_serving_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models: no models configured"):
        require_models(load(None, {}))
    with pytest.raises(ConfigError, match="no models configured"):
        load(write(tmp_path, ""), {})
    require_models(load(write(tmp_path, MINIMAL), {}))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_example_loads(path: Path) -> None:
    assert load(path, {**OTHER_SECRETS, **HOSTED_KEYS}).models


def test_the_hosted_example_has_each_api_with_a_key_of_its_own() -> None:
    settings = load(ROOT / "configs" / "hosted.yaml", HOSTED_KEYS)
    backends = settings.backends
    assert {backend.engine for backend in backends.values()} == {
        "openai",
        "azure",
        "deepseek",
        "openrouter",
        "baseten",
    }
    assert all(backend.api_key is not None for backend in backends.values())
    assert all(backend.hosted for backend in backends.values() if backend.engine == "openai")
    assert {model.backend for model in settings.models.values()} == set(backends)
    for name in HOSTED_KEYS:
        with pytest.raises(ConfigError, match=name):
            load(ROOT / "configs" / "hosted.yaml", {key: "k" for key in HOSTED_KEYS if key != name})


def test_the_complete_example_has_every_setting() -> None:
    text = (ROOT / "configs" / "example.yaml").read_text()
    missing = [path for path, _ in setting_paths(Settings) if f"{path.rpartition('.')[2]}:" not in text]
    assert not missing


def documented_settings() -> list[tuple[str, FieldInfo]]:
    """Every setting as the document names it: blocks of limits, which stand in many places, are explained once."""
    found = dict(setting_paths(Settings))
    for path in list(found):
        holder = path.rpartition(".")[0]
        kind = kind_at(Settings, tuple(0 if part == "[]" else part for part in re.findall(r"\w+|\[\]", holder)))
        if model_of(kind) is LimitBlock:
            del found[path]
            found[holder] = FieldInfo(default="", description="A block of limits.")
    return [*found.items(), *((f"<limits>.{name}", field) for name, field in fields_of(LimitBlock).items())]


def test_every_setting_and_its_default_is_documented() -> None:
    rows = (ROOT / "docs" / "configuration.md").read_text().splitlines()
    for path, definition in documented_settings():
        row = next((row for row in rows if row.startswith(f"| `{path}` |")), None)
        assert row is not None, f"docs/configuration.md does not explain {path}"
        default = definition.default
        if isinstance(default, float):
            assert f"| `{default:g}` |" in row
        elif isinstance(default, (int, str)) and default != "":
            assert f"| `{default}` |".lower() in row.lower()


def test_every_setting_has_a_description() -> None:
    assert [path for path, definition in setting_paths(Settings) if not definition.description] == []


def test_the_json_schema_describes_every_field_and_shows_secrets_as_references() -> None:
    schema = json_schema()
    json.dumps(schema)
    fields = [field for part in schema["$defs"].values() for field in part["properties"].values()]
    assert all("description" in field or "$ref" in field for field in fields)
    references = schema["$defs"]["Backend"]["properties"]["api_key"]["anyOf"][0]["oneOf"]
    assert [list(one["properties"]) for one in references] == [["env"], ["file"]]
    assert "class" in schema["$defs"]["StaticKey"]["properties"]
    assert schema["additionalProperties"] is False


def test_what_needs_a_restart_is_named(tmp_path: Path) -> None:
    old = load(write(tmp_path, MINIMAL), {})
    new = load(
        write(
            tmp_path,
            MINIMAL.replace("30000", "30001") + "server: {port: 1, host: '::1'}\ndatabase: sqlite:///x\n",
        ),
        {"TIDEGATE_ADMIN__PORT": "2", "TIDEGATE_ADMIN__TOKEN": TOKEN},
    )
    assert restart_only_changes(old, old) == []
    assert restart_only_changes(old, new) == ["server.host", "server.port", "admin.port", "admin.token", "database"]


@pytest.mark.parametrize("name", ["Host", "content-length", "Transfer-Encoding", "x-request-id"])
def test_a_key_does_not_travel_in_a_header_of_the_gateways_own(name: str) -> None:
    with pytest.raises(ValidationError, match="set by the gateway itself"):
        KeyHeader(name=name)
    assert KeyHeader(name="Authorization", scheme="Token").name == "Authorization"


def test_a_new_pepper_needs_a_restart_and_new_static_keys_do_not(tmp_path: Path) -> None:
    keys = "auth: keys\nkeys:\n  pepper: {env: PEPPER}\n  static:\n    - {name: a, key: {env: A}, class: batch}\n"
    old = load(write(tmp_path, MINIMAL + keys), {"PEPPER": "p" * 32, "A": "a" * 16})
    text = MINIMAL + keys + "    - {name: b, key: {env: B}}\nstore: redis://r\nredis: {prefix: other}\n"
    new = load(write(tmp_path, text), {"PEPPER": "q" * 32, "A": "a" * 16, "B": "b" * 16})
    assert restart_only_changes(old, new) == ["store", "redis.prefix", "keys.pepper"]
    kept = keep_restart_only(old, new)
    assert (kept.store, kept.redis.prefix, kept.keys.pepper) == ("memory", "tidegate", old.keys.pepper)
    assert [each.name for each in kept.keys.static] == ["a", "b"]
    assert restart_only_changes(old, kept) == []


def test_a_block_of_limits_becomes_a_set_with_the_same_fields(tmp_path: Path) -> None:
    assert tuple(LimitBlock.model_fields) == LimitSet.__struct_fields__
    text = MINIMAL + "limits: {key: {requests_per_minute: 5, usd_per_day: 1, shadow: true}}\n"
    text = text.replace("{backend: pool}", "{backend: pool, price: {}}")
    limits = load(write(tmp_path, text), {}).limits
    assert limits.key.limit_set() == LimitSet(requests_per_minute=5, usd_per_day=1.0, shadow=True)
    assert limits.user.limit_set() == LimitSet()


def test_a_static_key_has_its_class_and_tenant(tmp_path: Path) -> None:
    text = MINIMAL + "auth: keys\nkeys:\n  static:\n    - {name: a, key: {env: A}, class: batch, metadata: {team: x}}\n"
    (key,) = load(write(tmp_path, text), {"A": "a" * 16}).keys.static
    assert (key.priority_class, key.tenant, key.models, dict(key.metadata)) == ("batch", "default", None, {"team": "x"})
    other = load(write(tmp_path, text), {"A": "a" * 16, "TIDEGATE_KEYS__STATIC__0__CLASS": "critical"})
    assert other.keys.static[0].priority_class == "critical"


@pytest.mark.parametrize(
    ("addition", "setting"),
    [
        ("", None),
        ("limits: {key: {burst_s: null}}", None),
        ("tenants: {acme: {weight: 2}}", None),
        ("auth: keys", "auth: keys"),
        ("limits: {user: {concurrent_requests: 5}}", "limits.user"),
        ("tenants: {acme: {limits: {requests_per_minute: 5}}}", "tenants.acme.limits"),
        ("tenants: {acme: {user_limits: {requests_per_minute: 5}}}", "tenants.acme.user_limits"),
        ("tenants: {acme: {model_limits: {chat: {requests_per_minute: 5}}}}", "tenants.acme.model_limits.chat"),
        ("    queue: {enabled: true}", "backends.pool.queue.enabled: true"),
        ("    queue: {enabled: false}", None),
        ("auth: keys\nstore: redis://127.0.0.1", None),
    ],
)
def test_what_needs_a_shared_store_is_named(tmp_path: Path, addition: str, setting: str | None) -> None:
    assert needs_shared_store(load(write(tmp_path, f"{MINIMAL}{addition}\n"), {})) == setting


@pytest.mark.parametrize("block", ["limits", "tenant_limits"])
def test_a_models_limits_need_a_shared_store(tmp_path: Path, block: str) -> None:
    text = MINIMAL.replace("{backend: pool}", f"{{backend: pool, {block}: {{tokens_per_minute: 5}}}}")
    assert needs_shared_store(load(write(tmp_path, text), {})) == f"models.chat.{block}"


@pytest.mark.parametrize(
    "address",
    [
        "redis://h",
        "redis://h:1/2",
        "rediss://h",
        "redis+sentinel://a:1,b:2/s",
        "rediss+sentinel://a:1,b:2/s/3",
        "unix:///run/r.sock",
    ],
)
def test_every_form_of_a_redis_address_is_taken(tmp_path: Path, address: str) -> None:
    assert load(write(tmp_path, f"{MINIMAL}store: {address}\n"), {}).store == address


def test_secrets_that_a_caller_does_not_need_are_not_looked_for(tmp_path: Path) -> None:
    sections = (
        "auth: keys\nkeys: {pepper: {env: PEPPER}}\nadmin: {token: {file: /nowhere}}\ndatabase_password: {env: D}\n"
    )
    path = write(tmp_path, MINIMAL + sections)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert [problem.path for problem in caught.value.problems] == [
        "keys.pepper.env",
        "admin.token.file",
        "database_password.env",
    ]
    with pytest.raises(ConfigError) as caught:
        load(path, {}, secrets={"keys.pepper"})
    assert [problem.path for problem in caught.value.problems] == ["keys.pepper.env"]
    keys = load(path, {"PEPPER": "p" * 32}, secrets={"keys.pepper"}).keys
    assert keys.pepper is not None
    assert keys.pepper.get_secret_value() == "p" * 32


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("auth: keys\n", True),
        ("tenants: {a: {limits: {usd_per_day: 1}}}\n", True),
        ("tenants: {a: {limits: {requests_per_minute: 1}}}\n", False),
        ("", False),
    ],
)
def test_a_database_that_is_needed_has_to_have_its_directory(tmp_path: Path, text: str, refused: bool) -> None:
    priced = MINIMAL.replace("{backend: pool}", "{backend: pool, price: {}}")
    settings = load(write(tmp_path, f"{priced}database: sqlite:///{tmp_path}/none/a.db\n{text}"), {})
    if refused:
        with pytest.raises(ConfigError, match=f"f: database: there is no directory {tmp_path}/none; make it"):
            require_database_folder(settings, "f")
        (tmp_path / "none").mkdir()
    require_database_folder(settings, "f")
