"""What is refused, and in which words: the exact setting, line and message of every kind of problem."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.config import ConfigError, Problem, Settings, load
from gateway.config.problems import show_path, shown
from gateway.config.tree import child, kind_at, setting_paths

MODELS = "models: {chat: {backend: pool}}\n"
POOL = 'backends:\n  pool:\n    engine: sglang\n    replicas:\n      - {url: "http://a"}\n'
GOOD = MODELS + POOL
"""Six lines; what a test adds begins on line 7."""

CANARY = "canary0123456789abcdef"
NO_TOKENIZER = Path(__file__)


def problems_of(folder: Path, text: str | bytes, **environ: str) -> list[Problem]:
    path = folder / "tidegate.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load(path, environ)
    assert all(problem.file in {str(path), "environment"} for problem in caught.value.problems)
    return list(caught.value.problems)


def replica(text: str) -> str:
    return GOOD + f"      - {text}\n"


BAD = [
    # unknown and misplaced keys
    ("server: {prot: 1}", 7, "server.prot", "is not a known setting; did you mean port?"),
    ("sever: {}", 7, "sever", "is not a known setting; did you mean server?"),
    ("_env_file: x", 7, "_env_file", "is not a known setting; known here: admin"),
    ("    enigne: vllm", 7, "backends.pool.enigne", "is not a known setting; did you mean engine?"),
    ("      - {url: http://b, wieght: 1}", 7, "backends.pool.replicas[1].wieght", "did you mean weight?"),
    ("server:\n  port: 1\n  port: 2", 9, "server.port", "the key is given twice, first on line 8"),
    ("admin: {enabled: true, 1: x}", 7, "admin", '"1" as a key is not text; put quotes around the key'),
    # types and bounds
    ("server:\n\n  port: abc", 9, "server.port", '"abc" is not a whole number; write e.g. port: 7400'),
    ("server: {port: yes}", 7, "server.port", "true is not a whole number"),
    ("server: {port: 1.5}", 7, "server.port", "1.5 is not a whole number"),
    ("server: {port: 70000}", 7, "server.port", "70000 is too large; write at most 65535"),
    ("stream: {hold_s: .inf}", 7, "stream.hold_s", "Infinity is not a finite number"),
    (
        "shutdown: {drain_s: 5m}",
        7,
        "shutdown.drain_s",
        '"5m" is not a number; write e.g. drain_s: 300 (seconds)',
    ),
    (
        "    timeouts: {connect_s: 0}",
        7,
        "backends.pool.timeouts.connect_s",
        "0 is too small; write seconds, more than 0",
    ),
    ("admin: {enabled: maybe}", 7, "admin.enabled", '"maybe" is not true or false; write e.g. enabled: true'),
    ("server: 7400", 7, "server", "7400 is not a mapping; it can have: host, port"),
    ("server: []", 7, "server", "a list is not a mapping"),
    (
        "server: {edge: asg}",
        7,
        "server.edge",
        "\"asg\" is not one of 'protocol' or 'asgi'; did you mean asgi?",
    ),
    ("usage_log: {path: 7}", 7, "usage_log.path", "7 is not a path"),
    ("usage_log: {path: ''}", 7, "usage_log.path", "the path is empty"),
    ("server: {uds: /" + "x" * 107 + "}", 7, "server.uds", "the path of a socket can have at most 107 bytes"),
    (
        "    max_response_bytes: 1",
        7,
        "backends.pool.max_response_bytes",
        "1 is too small; write bytes, at least 1024",
    ),
    (
        "      - http://b",
        7,
        "backends.pool.replicas[1]",
        '"http://b" is not a mapping; it can have: url, engine',
    ),
    (
        "      - {region: a}",
        7,
        "backends.pool.replicas[1].url",
        'is missing; write e.g. url: "http://127.0.0.1:30000"',
    ),
    # listeners
    ("server: {host: 0.0.0.0}", 7, "server.host", 'auth is insecure, and "0.0.0.0" can be reached'),
    ("server: {host: gateway.example}", 7, "server.host", "auth is insecure"),
    (
        "server: {host: '127.0.0.1:7400'}",
        7,
        "server.host",
        '"127.0.0.1:7400" is not a host; write the address',
    ),
    ("server: {host: 999.0.0.1}", 7, "server.host", "is neither an IP address nor a host name"),
    ("admin: {port: 7400}", 7, "admin.port", "7400 is also server.port, on the same host"),
    ("admin: {port: 7400, host: localhost}", 7, "admin.port", "7400 is also server.port, on the same host"),
    (
        "admin: {host: '::'}",
        7,
        "admin.host",
        '"::" can be reached from other machines, and admin.token is not set',
    ),
    ("admin: {host: 10.0.0.1, token: null}", 7, "admin.host", "and admin.token is not set"),
    (
        "server: {max_in_flight_bytes: 5000}",
        7,
        "server.max_in_flight_bytes",
        "5000 is less than server.max_body_bytes",
    ),
    # where state is kept
    ("auth: none", 7, "auth", "\"none\" is not one of 'insecure' or 'keys'; write e.g. auth: insecure"),
    ("store: memcached://h", 7, "store", "not the address of a Redis"),
    ("store: redis://u@h", 7, "store", "has credentials in it: a secret in the wrong place"),
    ("store: redis+sentinel://a:1", 7, "store", "write memory, or e.g. redis://127.0.0.1:6379"),
    ("redis: {prefix: '{x}'}", 7, "redis.prefix", "is not a valid name; use at most 64"),
    ("redis: {timeout_ms: 0}", 7, "redis.timeout_ms", "0 is too small; write at least 1"),
    ("database: postgresql://u:p@h/d", 7, "database", "has a password in it: a secret in the wrong place"),
    ("database: 'postgresql://h/d?password=p'", 7, "database", "has a password in its query"),
    ("database: postgresql:///d", 7, "database", "names no host or no database"),
    ("database: postgresql://h", 7, "database", "names no host or no database"),
    # names
    (
        "  po ol: {engine: vllm, replicas: [{url: http://b}]}",
        7,
        'backends["po ol"]',
        "is not a valid name; use at most 63",
    ),
    ("      - {url: http://b, name: a b}", 7, "backends.pool.replicas[1].name", '"a b" is not a valid name'),
    ("      - {url: http://b, region: EU}", 7, "backends.pool.replicas[1].region", "e.g. eu-west"),
    ("      - {url: http://b, name: pool-0}", 7, "backends.pool.replicas[1].name", "the name of replicas[0]"),
    (
        "      - {url: http://A:80/v1}",
        7,
        "backends.pool.replicas[1].url",
        "is already the address of replicas[0]",
    ),
    (
        "      - {url: http://b, kv_events: {endpoint: '127.0.0.1:5557'}}",
        7,
        "backends.pool.replicas[1].kv_events.endpoint",
        '"127.0.0.1:5557" is not a ZeroMQ address; write e.g. tcp://10.0.0.7:5557',
    ),
    (
        "    adapters: [{name: a, path: /x}, {name: a, path: /y}]",
        7,
        "backends.pool.adapters[1].name",
        "is already the name of adapters[0]",
    ),
    (
        "  two:\n    engine: vllm\n    replicas: []",
        9,
        "backends.two.replicas",
        "there are none, and nothing says where some come from",
    ),
    (
        "  two:\n    engine: vllm\n    discovery: {dns: {name: engines.internal}}",
        9,
        "backends.two.discovery.dns.port",
        "is missing: addresses come without one",
    ),
    (
        "  two:\n    engine: vllm\n    discovery: {kubernetes: {port: 8000}}",
        9,
        "backends.two.discovery.kubernetes",
        "names neither a service nor labels",
    ),
    (
        "  two:\n    engine: vllm\n    discovery: {registration: {networks: [10.0.0.1/8]}}",
        9,
        "backends.two.discovery.registration.networks[0]",
        "is not a network",
    ),
    ("  two:", 7, "backends.two", "null is not a mapping; it can have: engine, hosted"),
    # secrets
    ("admin: {token: {}}", 7, "admin.token", "needs exactly one of env and file"),
    ("admin: {token: {env: A, file: b}}", 7, "admin.token", "needs exactly one of env and file"),
    ("admin:\n  token:\n    env: A", 9, "admin.token.env", "the environment variable A is not set"),
    ("admin: {token: {env: EMPTY}}", 7, "admin.token", "the secret is empty"),
    ("admin: {token: {env: SHORT}}", 7, "admin.token", "the token is shorter than 16 bytes (128 bits)"),
    ("admin: {token: {env: TWO_LINES}}", 7, "admin.token", "the secret has spaces, line breaks"),
    ("admin: {token: {env: ''}}", 7, "admin.token.env", "is empty or not text"),
    ("admin: {token: {env: a-b}}", 7, "admin.token.env", "is not the name of an environment variable"),
    (
        "admin: {token: {file: /no/such}}",
        7,
        "admin.token.file",
        '"/no/such" cannot be read: No such file or directory',
    ),
    ("admin: {token: {file: .}}", 7, "admin.token.file", "cannot be read: Is a directory"),
    ('admin: {token: {file: "a\\0b"}}', 7, "admin.token.file", "cannot be read: not a usable path"),
    ("    api_key: 12345678", 7, "backends.pool.api_key", "a literal secret does not belong in this file"),
]


@pytest.mark.parametrize(("addition", "line", "path", "words"), BAD, ids=[bad[0][:40] for bad in BAD])
def test_a_bad_setting_is_reported(tmp_path: Path, addition: str, line: int, path: str, words: str) -> None:
    environ = {"EMPTY": " \n", "SHORT": "123456789012345", "TWO_LINES": "0123456789abcdef\n0123"}
    (problem,) = problems_of(tmp_path, GOOD + addition + "\n", **environ)
    assert (problem.line, problem.path) == (line, path)
    assert words in str(problem)
    assert str(problem).startswith(f"{tmp_path}/tidegate.yaml:{line}: {path}: ")


@pytest.mark.parametrize(
    ("models", "line", "path", "words"),
    [
        (
            "models: {chat: {backend: pol}}",
            1,
            "models.chat.backend",
            '"pol" is not the name of a backend; did you mean pool?',
        ),
        ("models:\n  chat: {}", 2, "models.chat.backend", "is missing"),
        ("models:\n  7: {backend: pool}\n  chat: {backend: pool}", 2, "models", '"7" as a key is not text'),
        ("models: {'a b': {backend: pool}}", 1, 'models["a b"]', "no spaces"),
        (
            "models: {a: {backend: pool, aliases: [7]}}",
            1,
            "models.a.aliases[0]",
            "7 is not text; put quotes around it",
        ),
        ("models: {a: {backend: pool, aliases: x}}", 1, "models.a.aliases", '"x" is not a list'),
        (
            "models: {a: {backend: pool, aliases: [a]}}",
            1,
            "models.a.aliases[0]",
            "is already the name of a model",
        ),
        (
            "models: {a: {backend: pool, aliases: [b, b]}}",
            1,
            "models.a.aliases[1]",
            "already an alias, at models.a.aliases[0]",
        ),
        (
            "models: {a: {backend: pool, tokenizer: /no/such}}",
            1,
            "models.a.tokenizer",
            '"/no/such" cannot be read: No such file or directory',
        ),
        (
            f"models: {{a: {{backend: pool, tokenizer: {json.dumps(str(NO_TOKENIZER))}}}}}",
            1,
            "models.a.tokenizer",
            "is not JSON; name the model's tokenizer.json",
        ),
        (
            "models: {a: {backend: pool, limits: {usd_per_day: 1}}}",
            1,
            "models.a.limits.usd_per_day",
            'nothing is known of the price of "a"',
        ),
        (
            "models: {a: {backend: pool, price: {input: -1}}}",
            1,
            "models.a.price.input",
            "-1 is too small; write at least 0",
        ),
        ("models: {}", 1, "models", "no models configured"),
        ("models:", 1, "models", "no models configured"),
        ("models: []", 1, "models", "a list is not a mapping; write names with their settings below them"),
    ],
)
def test_a_bad_model_is_reported(tmp_path: Path, models: str, line: int, path: str, words: str) -> None:
    problem = problems_of(tmp_path, f"{models}\n{POOL}")[0]
    assert (problem.line, problem.path) == (line, path)
    assert words in str(problem)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("htp://x", '"htp://x" is not an http(s) URL; write e.g. http://127.0.0.1:30000'),
        ("127.0.0.1:30000", "is not an http(s) URL"),
        ("http://", "names no host"),
        ("http://:80", "names no host"),
        ("http:///v1", "names no host"),
        ("http://a:0", "names no usable port"),
        ("http://a:", "names no usable port"),
        ("http://a:99999", "host or port cannot be read"),
        ("http://[::1", "host or port cannot be read"),
        ("http://a b", "it has spaces"),
        ("http://ä", "characters outside ASCII"),
        ("http://a..b", "neither a name nor an address"),
        (f"http://u:{CANARY}@a", "credentials in it: a secret in the wrong place"),
        (f"http://{CANARY}@a", "credentials in it"),
        (f"htp://u:{CANARY}@a", "credentials in it"),
        (f"http://a/?key={CANARY}", "a query or a fragment"),
        (f"http://a#{CANARY}", "a query or a fragment"),
        ("http://a/?", "a query or a fragment"),
        ("http://a/v1/chat/completions", "goes too far: the gateway adds /v1/... itself"),
        ("http://a/v1/models", "goes too far"),
        ("http://a/../v1", "cannot be used"),
        ("http://a//b/v1", "cannot be used"),
        ("unix:///run/x.sock", "write a socket as http+unix://%2Frun%2Fengine.sock"),
        ("http+unix:///run/x.sock", "with every / written as %2F"),
        ("http+unix://" + "%2Fx" * 60, "at most 107 bytes"),
    ],
)
def test_a_bad_url_is_reported(tmp_path: Path, url: str, words: str) -> None:
    (problem,) = problems_of(tmp_path, replica(json.dumps({"url": url}, ensure_ascii=False)))
    assert (problem.line, problem.path) == (7, "backends.pool.replicas[1].url")
    assert words in str(problem)
    assert CANARY not in str(problem)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("- a\n", 1, "the file is not a mapping of settings"),
        ("a\n", 1, "the file is not a mapping of settings"),
        ("!!set {a, b}\n", 1, "it is not a mapping of settings"),
        ("a: 1\nb: [\n", 3, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML: but found another document"),
        ("a: *hunter2\n", 1, "a word beginning with * refers to nothing"),
        ("a: !hunter2 x\n", 1, "a word beginning with ! is not supported"),
        ("a: 1\nb: \x01\n", 2, "a character that YAML does not allow"),
        ("a: &a [*a]\n", 1, "an alias that contains itself"),
        ("a: 2001-99-99\n", None, "a value cannot be read"),
        ("a: " + "[" * 5000, None, "nested too deeply"),
        (b"a: 1\nb: \xff\n", 2, "the file is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported(
    tmp_path: Path, text: str | bytes, line: int | None, words: str
) -> None:
    (problem,) = problems_of(tmp_path, text)
    assert (problem.line, problem.path) == (line, "")
    assert words in str(problem)
    assert "hunter2" not in str(problem)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tidegate\.yaml: there is no such file; check the path"):
        load(tmp_path / "tidegate.yaml", {})
    with pytest.raises(ConfigError, match="the file cannot be read: Is a directory"):
        load(tmp_path, {})


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(path, {}).models


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "server: {host: 0.0.0.0, port: x}\nauth: no-keys\nmodels:\n  a: {backend: no, aliases: [b]}\n  b: {}\n"
    text += POOL.replace("sglang", "sglag") + "    api_key: {env: NO}\nsever: 1\nadmin: {port: 1, port: 2}\n"
    problems = problems_of(tmp_path, text, TIDEGATE_SERVR__PORT="1", TIDEGATE_SHUTDOWN__GRACE_S="x")
    assert [(problem.line, problem.path) for problem in problems] == [
        (1, "server.port"),
        (2, "auth"),
        (4, "models.a.aliases[0]"),
        (4, "models.a.backend"),
        (5, "models.b.backend"),
        (8, "backends.pool.engine"),
        (11, "backends.pool.api_key.env"),
        (12, "sever"),
        (13, "admin.port"),
        (None, ""),
        (None, "shutdown.grace_s"),
    ]


def test_one_bad_replica_does_not_make_its_pool_empty(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, GOOD.replace("http://a", "htp://a"))
    assert problem.path == "backends.pool.replicas[0].url"


def test_a_unix_socket_needs_no_loopback_host(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(GOOD + "server: {uds: /run/x.sock, host: 0.0.0.0}\nadmin: {port: 7400}\n")
    assert load(path, {}).server.uds == Path("/run/x.sock")


OIDC = {
    "issuer": "https://login.example.org",
    "client_id": "tidegate",
    "redirect_url": "https://admin.example.org/admin/session/oidc/callback",
    "roles": {"oncall": "operator"},
}
SECTIONS = sorted({path.rpartition(".")[0] for path, _ in setting_paths(Settings)})
"""Every place that has keys of its own, such as `backends.<name>.replicas[]`; empty for the top."""


def _needed(path: str) -> dict[str, Any]:
    """A section of a backend with what it cannot be without."""
    sections: dict[str, dict[str, Any]] = {
        "discovery.dns": {"discovery": {"dns": {"name": "n", "port": 1}}},
        "discovery.kubernetes": {"discovery": {"kubernetes": {"service": "s"}}},
        "discovery.file": {"discovery": {"file": {"path": "f"}}},
        "launch": {"launch": {"model": "m", "speculative": {"algorithm": "EAGLE"}}},
        "scaling.kubernetes": {"scaling": {"max": 2, "provider": "kubernetes", "kubernetes": {"name": "k"}}},
        "scaling.command": {"scaling": {"max": 2, "provider": "command", "command": {"words": ["w"]}}},
        "scaling.webhook": {"scaling": {"max": 2, "provider": "webhook", "webhook": {"url": "http://w"}}},
        "scaling": {"scaling": {"max": 2}},
    }
    return next((each for name, each in sections.items() if path.startswith(f"backends.pool.{name}")), {})


@given(section=st.sampled_from(SECTIONS), key=st.from_regex(r"[a-z_]{1,12}", fullmatch=True))
def test_an_unknown_key_is_reported_at_any_level(
    tmp_path_factory: pytest.TempPathFactory, section: str, key: str
) -> None:
    path = section.replace("backends.<name>", "backends.pool").replace("models.<name>", "models.chat")
    path = path.replace("model_limits.<name>", "model_limits.chat").replace("tenants.<name>", "tenants.acme")
    path = path.replace("admin.tokens.<name>", "admin.tokens.ci")
    prefix = f"{path}." if path else ""
    kind = kind_at(Settings, tuple(0 if part == "[]" else part for part in re.findall(r"\w+|\[\]", path)))
    assume(child(kind, key) is None)
    data: dict[str, Any] = {
        "auth": "keys",
        "keys": {"static": [{"name": "a", "key": {"env": "LONG"}}]},
        "models": {
            "chat": {
                "backend": "pool",
                "shadow": {"policy": "round_robin"},
                "spill": {"backend": "rented", "price": {"output": 1.0}, "usd_per_hour": 1.0, "usd_per_day": 1.0},
                "fallbacks": [{"backend": "rented"}],
            }
        },
        "backends": {
            "rented": {"engine": "openrouter", "replicas": [{"url": "http://b"}]},
            "pool": {
                "engine": "sglang",
                "replicas": [{"url": "http://a", "dcgm": {"url": "http://d"}}],
                "adapters": [{"name": "a", "path": "/a"}],
            },
        },
    }
    if path.startswith("backends.pool."):
        data["backends"]["pool"] |= _needed(path)
    if path.startswith("admin.tokens"):
        data["admin"] = {"tokens": {"ci": {"role": "reader", "token": {"env": "LONG_TOO"}}}}
    if path == "admin.oidc":
        data["admin"] = {"oidc": dict(OIDC)}
    here: Any = data
    for part in re.findall(r"\w+|\[\]", path):
        here = here[0] if part == "[]" else here.setdefault(part, {})
    here[key] = CANARY
    secrets = {"LONG": "0123456789abcdef", "LONG_TOO": "fedcba9876543210"}
    problems = problems_of(tmp_path_factory.getbasetemp(), json.dumps(data), **secrets)
    assert [problem.path for problem in problems] == [f"{prefix}{key}".replace("[]", "[0]")]
    assert problems[0].message == "is not a known setting"
    assert CANARY not in str(problems[0])


def test_paths_and_values_are_shown_on_one_line() -> None:
    assert show_path(("models", "gpt-4.1", "aliases", 0)) == 'models["gpt-4.1"].aliases[0]'
    assert shown("a\nb\x1b[1m") == '"a\\nb\\u001b[1m"'
    assert len(shown("x" * 1000)) < 100


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(rows))
    with pytest.raises(ConfigError, match="multiply it to more than 200,000 values"):
        load(file, {})


def test_fields_that_are_allowed_in_vain_are_reported(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        "models: {chat: {backend: pool}}\n"
        "backends:\n"
        "  pool:\n"
        "    engine: vllm\n"
        "    replicas: [{url: http://a}, {url: http://b, engine: sglang}]\n"
        "    allow_fields: [chat_templat, kv_transfer_params, temperature, stop_regex, mm_processor_kwargs]\n",
    )
    said = {problem.path: str(problem) for problem in found}
    assert set(said) == {f"backends.pool.allow_fields[{index}]" for index in range(3)}
    assert "did you mean chat_template?" in said["backends.pool.allow_fields[0]"]
    assert "always refused" in said["backends.pool.allow_fields[1]"]
    assert "chat_template" in said["backends.pool.allow_fields[2]"]


@pytest.mark.parametrize("fields", ["[[]]", "[{env: A}]", "[1, chat_template]", "{a: b}"])
def test_fields_of_another_kind_are_reported_as_such(tmp_path: Path, fields: str) -> None:
    found = problems_of(tmp_path, GOOD + f"    allow_fields: {fields}\n")
    assert found
    assert all(problem.path.startswith("backends.pool.allow_fields") for problem in found)


# -- operators


@pytest.mark.parametrize(
    ("admin", "path", "said"),
    [
        ({"tokens": {"ci": {"role": "reader", "token": {"env": "SHORT"}}}}, "admin.tokens.ci.token", "shorter than 16"),
        ({"tokens": {"ci": {"role": "root", "token": {"env": "LONG"}}}}, "admin.tokens.ci.role", "reader"),
        (
            {"token": {"env": "LONG"}, "tokens": {"ci": {"role": "reader", "token": {"env": "LONG"}}}},
            "admin.tokens.ci.token",
            "same token as admin.token",
        ),
        ({"oidc": {**OIDC, "issuer": "http://login.example.org"}}, "admin.oidc.issuer", "https"),
        ({"oidc": {**OIDC, "issuer": "https://a:b@login.example.org"}}, "admin.oidc.issuer", "without user"),
        ({"oidc": {**OIDC, "redirect_url": "https://x.org/elsewhere"}}, "admin.oidc.redirect_url", "callback"),
        ({"oidc": {**OIDC, "scopes": ["email"]}}, "admin.oidc.scopes", "openid"),
        ({"oidc": {**OIDC, "roles": {"oncall": "admin"}}}, "admin.oidc.roles.oncall", "reader"),
        ({"session": {"lifetime_s": 86400}}, "admin.session.lifetime_s", "28800"),
        (
            {"tokens": {"ci": {"role": "operator", "token": {"env": "LONG"}, "pools": ["pool"]}}},
            "admin.tokens.ci.pools",
            "only a registrar's token",
        ),
        (
            {"tokens": {"ci": {"role": "registrar", "token": {"env": "LONG"}, "pools": ["pol"]}}},
            "admin.tokens.ci.pools[0]",
            "did you mean pool?",
        ),
        (
            {"tokens": {"ci": {"role": "registrar", "token": {"env": "LONG"}, "pools": []}}},
            "admin.tokens.ci.pools",
            "is empty",
        ),
    ],
)
def test_operators_that_cannot_be_meant_so(tmp_path: Path, admin: dict[str, Any], path: str, said: str) -> None:
    data = {
        "admin": admin,
        "models": {"chat": {"backend": "pool"}},
        "backends": {"pool": {"engine": "sglang", "replicas": [{"url": "http://a"}]}},
    }
    (problem,) = problems_of(tmp_path, json.dumps(data), LONG="0123456789abcdef", SHORT="0123456789")
    assert problem.path == path
    assert said in f"{problem.message} {problem.hint}"
