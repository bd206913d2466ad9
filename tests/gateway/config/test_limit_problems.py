"""What is refused about keys, tenants, limits and queues: the exact setting, line and message."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import ConfigError, Problem, load

GOOD = """\
models: {chat: {backend: pool}}
backends:
  pool:
    engine: sglang
    replicas:
      - {url: "http://a"}
"""
"""Six lines; what a test adds begins on line 7."""

ENVIRON = {
    "SHORT": "123456789012345",
    "LONG": "0123456789abcdef",
    "OTHER": "fedcba9876543210",
    "ENDLESS": "k" * 1025,
    "PEPPER": "p" * 31,
}


def problems_of(folder: Path, text: str) -> list[Problem]:
    path = folder / "tidegate.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, ENVIRON)
    return list(caught.value.problems)


def static(*entries: str) -> str:
    """A file's static keys; the first one is on line 10."""
    return "auth: keys\nkeys:\n  static:\n" + "\n".join(f"    - {entry}" for entry in entries)


BAD = [
    (
        "auth: keys\ndatabase: postgresql://h/d",
        8,
        "database",
        "every gateway that uses one PostgreSQL needs the same keys.pepper",
    ),
    ("keys: {pepper: {env: PEPPER}}", 7, "keys.pepper", "the pepper is shorter than 32 bytes"),
    (static("{name: a, key: {env: ENDLESS}}"), 10, "keys.static[0].key", "the key is longer than 1024 bytes"),
    ("keys: {static: [{name: a, key: {env: LONG}}]}", 7, "keys.static", "auth is insecure, so that nobody is asked"),
    (static("{name: a, key: {env: SHORT}}"), 10, "keys.static[0].key", "the key is shorter than 16 bytes (128 bits)"),
    (static("{name: a, key: 0123456789abcdef}"), 10, "keys.static[0].key", "a literal secret does not belong"),
    (
        static("{name: a, key: {env: LONG}}", "{name: b, key: {env: LONG}}"),
        11,
        "keys.static[1].key",
        "the key is the same as keys.static[0].key",
    ),
    (
        static("{name: a, key: {env: LONG}}") + "\nadmin: {token: {env: LONG}}",
        10,
        "keys.static[0].key",
        "the key is the same as admin.token",
    ),
    (
        static("{name: a, key: {env: LONG}}", "{name: a, key: {env: OTHER}}"),
        11,
        "keys.static[1].name",
        '"a" is already the name of static[0]',
    ),
    (
        static("{name: a, key: {env: LONG}, class: urgent}"),
        10,
        "keys.static[0].class",
        "\"urgent\" is not one of 'critical', 'standard', 'batch' or 'sheddable'",
    ),
    (static("{name: a, key: {env: LONG}, clas: batch}"), 10, "keys.static[0].clas", "did you mean class?"),
    (static("{name: a, key: {env: LONG}, priority_class: batch}"), 10, "keys.static[0].priority_class", "not a known"),
    (
        static("{name: a, key: {env: LONG}, tenant: acm}") + "\ntenants: {acme: {}}",
        10,
        "keys.static[0].tenant",
        '"acm" is not the name of a tenant; did you mean acme?',
    ),
    (static("{name: a, key: {env: LONG}, tenant: x}"), 10, "keys.static[0].tenant", 'add it under tenants, as "x": {}'),
    (static("{name: a, key: {env: LONG}, models: [cat]}"), 10, "keys.static[0].models[0]", "did you mean chat?"),
    ("tenants: {a: {model_limits: {cat: {}}}}", 7, "tenants.a.model_limits.cat", '"cat" is not the name of a model'),
    ("tenants: {a: {weight: 0}}", 7, "tenants.a.weight", "0 is too small; write at least 0.01"),
    ("tenants: {'a b': {}}", 7, 'tenants["a b"]', "is not a valid name"),
    ("limits: {key: {requests_per_minute: 0}}", 7, "limits.key.requests_per_minute", "0 is too small"),
    ("limits: {key: {requests_per_minut: 1}}", 7, "limits.key.requests_per_minut", "did you mean requests_per_minute?"),
    ("limits: {key: {burst_s: 61}}", 7, "limits.key.burst_s", "61 is too large; write seconds, at most 60"),
    ("limits: {key: {usd_per_day: 1}}", 7, "limits.key.usd_per_day", 'nothing is known of the price of "chat"'),
    ("tenants: {a: {user_limits: {usd_per_month: 1}}}", 7, "tenants.a.user_limits.usd_per_month", "give each a price"),
    (
        static("{name: a, key: {env: LONG}, models: [chat], limits: {usd_per_day: 2}}"),
        10,
        "keys.static[0].limits.usd_per_day",
        "nothing is known of the price",
    ),
    ("    queue: {max_wait_s: 0}", 7, "backends.pool.queue.max_wait_s", "0 is too small"),
    ("    queue: {shares: {batch: 0}}", 7, "backends.pool.queue.shares.batch", "0 is too small; write at least 1"),
    ("    queue: {shares: {batch: 16}}", 7, "backends.pool.queue.shares", "together they guarantee 101 percent"),
    ("database: mysql://h/d", 7, "database", '"mysql://h/d" is not a database this gateway knows'),
    ("database: 'sqlite:'", 7, "database", "names no database file"),
]


@pytest.mark.parametrize(("addition", "line", "path", "words"), BAD, ids=[bad[0][-40:] for bad in BAD])
def test_a_bad_limit_is_reported(tmp_path: Path, addition: str, line: int, path: str, words: str) -> None:
    (problem,) = problems_of(tmp_path, GOOD + addition + "\n")
    assert (problem.line, problem.path) == (line, path)
    assert words in str(problem)


def test_only_models_that_a_key_can_use_need_a_price_for_its_budget(tmp_path: Path) -> None:
    models = "models: {chat: {backend: pool, price: {}}, dear: {backend: pool}}\n" + GOOD.partition("\n")[2]
    (problem,) = problems_of(tmp_path, models + static("{name: a, key: {env: LONG}, limits: {usd_per_day: 2}}\n"))
    assert 'nothing is known of the price of "dear"' in problem.message
    path = tmp_path / "good.yaml"
    path.write_text(models + static("{name: a, key: {env: LONG}, models: [chat], limits: {usd_per_day: 2}}\n"))
    assert load(path, ENVIRON).keys.static[0].limits.usd_per_day == 2


def test_an_alias_in_a_keys_models_is_named_as_such(tmp_path: Path) -> None:
    text = GOOD.replace("backend: pool", "backend: pool, aliases: [gpt]")
    (problem,) = problems_of(tmp_path, text + static("{name: a, key: {env: LONG}, models: [gpt]}\n"))
    assert problem.hint == "it is an alias; write chat"


def test_with_keys_the_gateway_may_listen_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(GOOD + "server: {host: 0.0.0.0}\nauth: keys\n")
    assert load(path, {}).server.host == "0.0.0.0"


def test_a_tokenizer_without_its_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = GOOD.replace("backend: pool", "backend: pool, tokenizer: tokenizer.json")
    (problem,) = problems_of(tmp_path, text)
    assert problem.path == "models.chat.tokenizer"
    assert "the library tokenizers is not installed; install tidegate[tokenizer]" in str(problem)
