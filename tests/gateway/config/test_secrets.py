"""Secrets: found where the file says, and never shown, neither when things go well nor when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import ConfigError, Problem, load
from gateway.config.problems import looks_secret

GOOD = """\
models: {chat: {backend: pool}}
backends:
  pool:
    engine: sglang
    replicas:
      - {url: "http://a"}
"""
"""Six lines; what a test adds begins on line 7."""

CANARY = "canary0123456789abcdef"


def only_problem(folder: Path, addition: str) -> Problem:
    path = folder / "tidegate.yaml"
    path.write_text(GOOD + addition)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    (problem,) = caught.value.problems
    return problem


def test_secrets_do_not_show_in_settings(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{CANARY}key\n")
    path = tmp_path / "tidegate.yaml"
    path.write_text(GOOD + "    api_key: {file: key}\nadmin: {token: {env: TOKEN}}\n")
    settings = load(path, {"TOKEN": f"{CANARY}token"})
    key, token = settings.backends["pool"].api_key, settings.admin.token
    assert key is not None
    assert token is not None
    assert (key.get_secret_value(), token.get_secret_value()) == (f"{CANARY}key", f"{CANARY}token")
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert CANARY not in text


@pytest.mark.parametrize(
    "addition",
    [
        f"admin: {{token: {CANARY}}}",
        f"admin: {{token: {{{CANARY}}}}}",
        f"admin: {{token: {{env: {CANARY}}}}}",
        f"admin: {{token: {{file: {CANARY}}}}}",
        f"admin: {{token: {{env: A, key: {CANARY}}}}}",
        f"admin: {{token: [{CANARY}]}}",
        f"admin: {{tokn: {CANARY}}}",
        f"    api_key: Bearer {CANARY}",
        f"    apikey: {CANARY}",
        f"store: redis://:{CANARY}@h",
        f"store: memcached://u:{CANARY}@h",
        f"store: redis://h/{CANARY}@",
        f"store: redis+sentinel://:{CANARY}@h:1/s",
        f"store: 'redis://h?password={CANARY}'",
        f"redis: {{password: {CANARY}}}",
        f"redis: {{username: {{x: {CANARY}}}}}",
        f"database_password: {CANARY}",
        f"keys: {{pepper: {CANARY}}}",
        f"keys: {{static: [{{name: a, key: {CANARY}}}]}}",
        "auth: keys\nkeys: {static: [{name: a, key: {env: LONG}}, {name: b, key: {env: LONG}}]}",
        f"keys: {{static: [{{name: a, key: {{env: LONG}}, tokn: {CANARY}}}]}}",
        f"database: postgresql://u:{CANARY}@h/d",
        f"database: postgresql://h/d?password={CANARY}",
        f"database: mysql://u:{CANARY}@h/d",
        f"server: {{host: sk-{CANARY}}}",
        f"server: {{port: sk-{CANARY}}}",
        f"usage_log: {{path: sk-{CANARY}}}",
        f"  sk-{CANARY}: {{engine: vllm, replicas: [{{url: http://b}}]}}",
        f"      - {{url: 'http://sk-{CANARY}'}}",
        f"      - {{url: 'http//u:{CANARY}@h'}}",
        f"sk-{CANARY}: 1",
        f"admin: {{port: 7, enabled: true, enabled: {CANARY}}}",
        f"admin: {{token: {{env: LONG}}}}\nserver: *{CANARY}",
        f"admin: {{token: {{env: LONG}}, port: !{CANARY} 1}}",
        f"admin: {{token: &{CANARY} {{env: LONG}}, host: 'a\n",
    ],
)
def test_secrets_do_not_show_in_errors(tmp_path: Path, addition: str) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(GOOD + addition + "\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {"LONG": CANARY})
    error = caught.value
    assert CANARY not in str(error) + repr(error) + repr(error.__cause__)
    assert error.__cause__ is None


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", b"x" * 70_000, b"a\nb", "ü".encode()])
def test_a_secret_file_without_a_usable_secret_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    problem = only_problem(tmp_path, "    api_key: {file: key}\n")
    assert problem.path.startswith("backends.pool.api_key")
    assert problem.line == 7


def test_a_secret_in_an_innocent_place_is_noticed(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, f"usage_log: {{path: sk-proj-{CANARY}}}\n")
    assert (problem.line, problem.path) == (7, "usage_log.path")
    assert problem.message == "the value looks like a secret: a secret in the wrong place"


@pytest.mark.parametrize("text", ["tgk_" + 49 * "a", "key=tgk_Ab3dE6gH", "tg_admin_" + 43 * "-", "tg_pepper_Ab-d_6gH"])
def test_secrets_of_our_own_look_like_secrets(text: str) -> None:
    assert looks_secret(text)


@pytest.mark.parametrize("text", ["deepseek-ai/DeepSeek-V3", "task-force-one", "risk-analysis", "qwen2.5:7b", "sk-1"])
def test_ordinary_names_do_not_look_like_secrets(text: str) -> None:
    assert not looks_secret(text)
