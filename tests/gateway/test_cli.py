"""The command line: what is accepted, what is refused in which words, and the exit codes."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal
import socket
import tempfile
from pathlib import Path

import httpx2
import pytest

from gateway import health
from gateway.cli import main
from gateway.logs import JsonLines, TextLines, describe_exception
from loadtests.engine import FakeEngine
from tests.support.command import run_tidegate, serve_process, write_config
from tests.support.serving import serving, settings_for

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDEGATE_STATE_DIR", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tidegate.yaml"
    write_config(path, [NOBODY])
    return path


# -- commands that answer and end


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"version", "python"}
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("tidegate ")


def test_schema_is_json_with_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert {"server", "admin", "models", "backends"} <= set(json.loads(capsys.readouterr().out)["properties"])


def test_check_of_a_good_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "models": ["m"], "backends": ["pool"]}
    assert main(["check", str(config)]) == 0
    assert "ok: 1 models, 1 backends" in capsys.readouterr().out


def test_check_of_a_bad_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("server:", "sever:"))
    assert main(["check", str(config), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert set(report["problems"][0]) == {"file", "line", "path", "message", "hint"}
    assert main(["check", str(config)]) == 2
    assert "sever: is not a known setting; did you mean server?" in capsys.readouterr().err


def test_the_state_directory_is_no_unknown_setting(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_STATE_DIR", "/nowhere")
    assert main(["check", str(config)]) == 0
    monkeypatch.setenv("TIDEGATE_STATE_DIRR", "/nowhere")
    assert main(["check", str(config)]) == 2


# -- serve: what is refused before anything runs


@pytest.mark.parametrize("workers", ["0", "-1", "65", "two", "1.5", ""])
def test_the_number_of_workers_is_checked(config: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "--config", str(config), f"--workers={workers}"])
    assert end.value.code == 2
    assert "is not a whole number from 1 to 64" in capsys.readouterr().err


async def test_serve_without_anything_to_serve_says_what_to_do() -> None:
    code, _, said = await run_tidegate("serve")
    assert code == 2
    assert "no models are configured" in said
    assert "--config FILE" in said
    assert "TIDEGATE_MODELS=" in said


async def test_serve_refuses_a_bad_file_in_the_words_of_check(tmp_path: Path) -> None:
    config = tmp_path / "tidegate.yaml"
    write_config(config, [NOBODY], sever={})
    code, _, refused = await run_tidegate("serve", "--config", str(config))
    assert code == 2
    assert (2, "", refused) == await run_tidegate("check", str(config))


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_port_in_use_is_named(config: Path, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, said = await run_tidegate("serve", "--config", str(config), "--port", port, "--workers", workers)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "choose another port" in said


async def test_a_usage_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = {"path": str(tmp_path / "missing" / "usage.jsonl")}
    async with serve_process(tmp_path, [NOBODY], usage_log=log) as gateway:
        assert await gateway.ended() == 1
        await gateway.logged("usage_log.path: cannot write .*usage.jsonl: No such file or directory")


async def test_models_can_come_from_the_environment_alone() -> None:
    environ = {
        "TIDEGATE_MODELS": '{"m": {"backend": "pool"}}',
        "TIDEGATE_BACKENDS": '{"pool": {"engine": "openai", "replicas": [{"url": "http://127.0.0.1:9"}]}}',
    }
    with socket.create_server(("127.0.0.1", 0)) as taken:  # far enough to see that it was understood
        port = str(taken.getsockname()[1])
        code, _, said = await run_tidegate("serve", "--port", port, environ=environ)
    assert code == 2
    assert "cannot listen" in said


# -- serve: one process


async def test_one_worker_serves_admin_and_stops(tmp_path: Path) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--log-format", "json") as gateway:
        url = await gateway.url()
        async with httpx2.AsyncClient(trust_env=False) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "a secret question"}]}
            assert (await client.post(f"{url}/v1/chat/completions", json=body)).status_code == 200
            (worker,) = await gateway.fleet(client)
            assert worker["pid"] == gateway.process.pid
            assert 'worker="0"' in (await gateway.admin(client, "/metrics")).text
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
    lines = [json.loads(line) for line in gateway.log]
    assert all({"time", "level", "logger", "pid", "message"} <= set(line) for line in lines)
    assert {line["logger"].partition(".")[0] for line in lines} <= {"tidegate", "gateway", "backends"}
    text = "\n".join(gateway.log)
    assert str(gateway.state / "admin-token") in text
    assert gateway.token not in text
    assert "secret question" not in text


async def test_without_a_place_for_the_token_only_admin_is_closed(tmp_path: Path) -> None:
    nowhere = {"TIDEGATE_STATE_DIR": "", "XDG_STATE_HOME": "", "HOME": ""}
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], environ=nowhere) as gateway:
        url, admin = await gateway.url(), await gateway.admin_url()
        await gateway.logged("admin stays closed, since no owner token can be kept: neither .* is set")
        async with httpx2.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{url}/readyz")).status_code == 200
            assert (await client.get(f"{admin}/metrics")).status_code == 200
            for header in ("", "Bearer", "Bearer None"):
                answer = await client.get(f"{admin}/admin/fleet", headers={"authorization": header})
                assert answer.status_code == 401
                assert "there is no owner token" in answer.text


async def test_a_configured_token_wins_and_nothing_is_stored(tmp_path: Path) -> None:
    environ = {"TIDEGATE_ADMIN__TOKEN": "0123456789abcdef0123456789abcdef"}
    async with serve_process(tmp_path, [NOBODY], environ=environ) as gateway:
        admin = await gateway.admin_url()
        await gateway.url()
        async with httpx2.AsyncClient(trust_env=False) as client:
            headers = {"authorization": "Bearer 0123456789abcdef0123456789abcdef"}
            assert (await client.get(f"{admin}/admin/fleet", headers=headers)).status_code == 200
    assert not (gateway.state / "admin-token").exists()
    assert "0123456789abcdef" not in "\n".join(gateway.log)


# -- health


async def check(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["health", "--timeout", "5", *arguments])


async def test_health_tells_ready_from_not_ready(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(settings_for([NOBODY])) as gateway:
        assert await check("--url", gateway.url) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "ready"
        assert await check("--url", f"{gateway.url}/livez") == 0
        gateway.runtime.draining = True
        assert await check("--url", gateway.url) == 1
        assert "draining" in capsys.readouterr().err
    assert await check("--url", gateway.url) == 1
    assert "no answer from http://127.0.0.1" in capsys.readouterr().err


async def test_health_learns_the_address_from_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tidegate.yaml"
    async with serving(settings_for([NOBODY])) as gateway:
        path.write_text(f"server: {{host: 127.0.0.1, port: {gateway.port}}}\nmodels: not yet right")
        assert await check("--config", str(path)) == 0  # the rest of the file is not its business
        monkeypatch.setenv("TIDEGATE_SERVER__PORT", str(gateway.port))
        path.write_text("server: {port: 9}")
        assert await check("--config", str(path)) == 0
        assert await check() == 0


async def test_health_of_a_gateway_on_a_unix_socket() -> None:
    with tempfile.TemporaryDirectory() as short:
        path = Path(short, "t.sock")
        async with (
            FakeEngine() as engine,
            serve_process(Path(short), [engine.url], server={"uds": str(path)}) as gateway,
        ):
            await gateway.logged("serving on unix:")
            assert await check("--config", str(gateway.config)) == 0
            assert await check("--url", "http+unix://" + str(path).replace("/", "%2F")) == 0
            gateway.signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        assert await check("--url", "http+unix://" + str(path).replace("/", "%2F")) == 1


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("{host: 0.0.0.0, port: 80}", "http://127.0.0.1:80"),
        ('{host: "::", port: 80}', "http://[::1]:80"),
        ("{host: gateway.internal}", "http://gateway.internal:7400"),
        ("{uds: /run/a b%.sock}", "http+unix://%2Frun%2Fa b%25.sock"),
        ("null", "http://127.0.0.1:7400"),
    ],
)
def test_the_address_that_health_asks(tmp_path: Path, server: str, url: str) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(f"server: {server}")
    assert health.configured_url(path, {}) == url


@pytest.mark.parametrize("server", ["{port: 0}", "{port: many}", "[]"])
def test_an_address_that_cannot_be_known_is_not_healthy(
    tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(f"server: {server}")
    assert main(["health", "--config", str(path)]) == 1
    assert main(["health", "--config", str(tmp_path / "missing.yaml")]) == 1
    assert "there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:7400", "http://x:port", "https://127.0.0.1"])
def test_a_url_that_health_cannot_ask(url: str) -> None:
    assert main(["health", "--url", url]) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan"])
def test_the_patience_of_health_is_checked(seconds: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["health", f"--timeout={seconds}"])
    assert end.value.code == 2


# -- log lines


def _raise() -> None:
    try:
        raise KeyError("the prompt")
    except KeyError as error:
        raise ValueError("a header") from error


@pytest.mark.parametrize("formatter", [TextLines(3), JsonLines(3)])
def test_exceptions_are_logged_without_what_they_quote(formatter: logging.Formatter) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("uvicorn.error")
    logger.addHandler(handler)
    try:
        _raise()
    except ValueError:
        logger.exception("Exception in ASGI application\n")
    written = stream.getvalue()
    assert "the prompt" not in written
    assert "a header" not in written
    assert "ValueError" in written
    assert "caused by KeyError" in written
    assert "in _raise" in written


def test_a_message_can_neither_steer_a_terminal_nor_pass_for_another_line() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextLines())
    logger = logging.Logger("tidegate")
    logger.addHandler(handler)
    logger.warning("replica %s says: %s", "a", "\x1b[2Jno\r\n2026-01-31T12:00:00.000Z INFO tidegate: all is well\u202e")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("WARNING tidegate: replica a says: \\x1b[2Jno\\r")
    assert second == "  2026-01-31T12:00:00.000Z INFO tidegate: all is well\\u202e"


def test_errors_of_the_operating_system_keep_their_text() -> None:
    assert describe_exception(OSError(24, "Too many open files")) == "OSError: Too many open files"
