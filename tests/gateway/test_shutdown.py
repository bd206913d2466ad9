"""The life of the real process: drain, hurry, reload, and starts that fail."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gateway.order import CHAT
from loadtests.engine import FakeEngine
from tests.support.client import RawClient, connect, post
from tests.support.process import Gateway, gateway_process, run_serve, write_config

LOOPS = ("uvloop",)

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**ASK, "stream": True}


def config_for(url: str, *, grace_s: float = 0.0, drain_s: float = 10.0, **sections: Any) -> dict[str, Any]:
    return {
        "server": {"port": 0, **sections.pop("server", {})},
        "admin": {"enabled": False},
        "shutdown": {"grace_s": grace_s, "drain_s": drain_s},
        "models": {"m": {"backend": "pool"}},
        "backends": {"pool": {"engine": "sglang", "replicas": [{"url": url}], **sections.pop("backend", {})}},
        **sections,
    }


@contextlib.asynccontextmanager
async def running(tmp_path: Path, config: dict[str, Any]) -> AsyncIterator[Gateway]:
    file = write_config(tmp_path / "tidegate.yaml", config)
    async with gateway_process("--config", str(file)) as gateway:
        yield gateway


@contextlib.asynccontextmanager
async def sdk(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def refused(port: int) -> bool:
    """Whether a new connection is turned away."""
    try:
        async with connect("127.0.0.1", port):
            return False
    except ConnectionRefusedError:
        return True


@contextlib.asynccontextmanager
async def opened_stream(gateway: Gateway) -> AsyncIterator[RawClient]:
    """A client in the middle of a stream."""
    async with connect("127.0.0.1", gateway.port) as client:
        await client.send(post(CHAT, STREAM))
        await client.until(b'"content"')
        yield client


# -- stopping


async def test_sigterm_fails_readiness_serves_on_and_then_refuses(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, config_for(engine.url, grace_s=1.0)) as gateway:
        async with httpx2.AsyncClient(trust_env=False, base_url=gateway.url) as client:
            assert (await client.get("/readyz")).status_code == 200
            sent_at = gateway.send(signal.SIGTERM)
            await gateway.logged("not ready any more")
            while time.monotonic() < sent_at + 0.7:
                ready = await client.get("/readyz")
                assert ready.status_code == 503
                assert ready.json() == {"status": "draining"}
                assert (await client.get("/livez")).status_code == 200
                answer = await client.post(CHAT, json=ASK)
                assert answer.status_code == 200
                assert answer.headers["connection"] == "close"
        assert await gateway.exit_code() == 0
        assert 1.0 <= time.monotonic() - sent_at <= 3.0
        assert await refused(gateway.port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_running_streams_finish_and_end_cleanly(tmp_path: Path, number: signal.Signals, edge: str) -> None:
    config = config_for("", grace_s=0.1, server={"edge": edge})
    async with FakeEngine(chunks=20, interval_s=0.05) as engine:
        config["backends"]["pool"]["replicas"] = [{"url": engine.url}]
        async with running(tmp_path, config) as gateway, opened_stream(gateway) as client:
            sent_at = gateway.send(number)
            rest = await client.rest()
            assert rest.count(b'"content"') >= 18
            assert b"data: [DONE]" in rest
            assert rest.endswith(b"\r\n0\r\n\r\n")
            assert b"error" not in rest
            assert await gateway.exit_code() == 0
            assert time.monotonic() - sent_at <= 3.0  # it does not wait for drain_s


async def test_new_connections_are_refused_while_streams_finish(tmp_path: Path) -> None:
    async with FakeEngine(chunks=30, interval_s=0.05) as engine, running(tmp_path, config_for(engine.url)) as gateway:
        async with opened_stream(gateway) as client:
            gateway.send(signal.SIGTERM)
            await gateway.logged("may finish")
            assert await refused(gateway.port)
            assert b"data: [DONE]" in await client.rest()
        assert await gateway.exit_code() == 0


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_a_stream_past_the_limit_ends_with_an_error_event(tmp_path: Path, edge: str) -> None:
    async with FakeEngine(hang_mid=3) as engine:
        config = config_for(engine.url, drain_s=0.3, server={"edge": edge})
        async with running(tmp_path, config) as gateway, sdk(gateway) as client:
            stream = await client.chat.completions.create(model="m", messages=[], stream=True)
            events = aiter(stream)
            await anext(events)
            gateway.send(signal.SIGTERM)
            with pytest.raises(openai.APIError) as raised:
                async for _ in events:
                    pass
            assert raised.value.code == "gateway_draining"
            assert await gateway.exit_code() == 0
            request = await engine.received()
            await request.gone.wait()
            assert engine.aborted_rids == [request.json()["rid"]]


async def test_requests_past_the_limit_without_an_answer_get_a_503(tmp_path: Path) -> None:
    """Those that wait for their answer, and those that still wait for a connection to the model server."""
    async with FakeEngine(hang=True) as engine:
        config = config_for(engine.url, drain_s=0.3, backend={"connections": {"max": 1}})
        async with running(tmp_path, config) as gateway, sdk(gateway) as client:
            waiting = [
                asyncio.create_task(client.chat.completions.create(model="m", messages=[], stream=stream))
                for stream in (False, True)
            ]
            await engine.received()
            await asyncio.sleep(0.05)
            gateway.send(signal.SIGTERM)
            errors = await asyncio.gather(*waiting, return_exceptions=True)
            assert await gateway.exit_code() == 0
        codes = [error.code for error in errors if isinstance(error, openai.APIStatusError)]
        assert codes == ["gateway_draining"] * 2, errors
        assert len(engine.requests) == 1


async def test_a_second_sigterm_hurries(tmp_path: Path) -> None:
    async with (
        FakeEngine(hang_mid=1) as engine,
        running(tmp_path, config_for(engine.url, grace_s=30, drain_s=30)) as gateway,
        opened_stream(gateway) as client,
    ):
        gateway.send(signal.SIGTERM)
        await gateway.logged("not ready any more")
        again_at = gateway.send(signal.SIGTERM)
        assert b"gateway_draining" in await client.rest()
        assert await gateway.exit_code() == 0
        assert time.monotonic() - again_at <= 2.0


async def test_sigint_has_no_grace(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, config_for(engine.url, grace_s=30)) as gateway:
        sent_at = gateway.send(signal.SIGINT)
        assert await gateway.exit_code() == 0
        assert time.monotonic() - sent_at <= 2.0


async def test_sigint_during_the_grace_of_sigterm_hurries(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, config_for(engine.url, grace_s=30)) as gateway:
        gateway.send(signal.SIGTERM)
        await gateway.logged("not ready any more")
        sent_at = gateway.send(signal.SIGINT)
        assert await gateway.exit_code() == 0
        assert time.monotonic() - sent_at <= 2.0


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_an_answer_still_being_fetched_is_not_cut_short(tmp_path: Path, edge: str) -> None:
    size = 6_000_000
    async with (
        FakeEngine(huge_body_bytes=size) as engine,
        running(tmp_path, config_for(engine.url, server={"edge": edge})) as gateway,
    ):
        async with connect("127.0.0.1", gateway.port, receive_buffer_bytes=16_384) as client:
            await client.send(post(CHAT, ASK))
            head = await client.until(b"\r\n\r\n")
            (length,) = (int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"content-length:")
            gateway.send(signal.SIGTERM)
            await gateway.logged("stopping")
            received = 0
            while piece := await client.reader.read(65_536):
                received += len(piece)
                await asyncio.sleep(0.004)
            assert received == length
        assert await gateway.exit_code() == 0


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_a_request_still_being_sent_is_served(tmp_path: Path, edge: str) -> None:
    async with FakeEngine() as engine, running(tmp_path, config_for(engine.url, server={"edge": edge})) as gateway:
        async with connect("127.0.0.1", gateway.port) as client:
            request = post(CHAT, ASK)
            await client.send(request[:-10])
            await asyncio.sleep(0.1)
            gateway.send(signal.SIGTERM)
            await gateway.logged("stopping")
            await asyncio.sleep(0.3)
            await client.send(request[-10:])
            reply = await client.reply()
            assert reply.status == 200
            assert reply.headers["connection"] == "close"
        assert await gateway.exit_code() == 0


# -- reloading


async def test_reload_under_load_drops_nothing_and_brings_the_new_model(tmp_path: Path) -> None:
    script: dict[str, Any] = {"chunks": 5, "interval_s": 0.02}
    async with FakeEngine(**script) as engine, FakeEngine(**script) as other:
        config = config_for(engine.url, backend={"connections": {"max": 4}})
        async with running(tmp_path, config) as gateway, sdk(gateway) as client:
            answered = {"m": 0, "new": 0}
            over = asyncio.Event()

            async def ask_on(model: str) -> None:
                while not over.is_set():
                    stream = await client.chat.completions.create(model=model, messages=[], stream=True)
                    finishes = [chunk.choices[0].finish_reason async for chunk in stream if chunk.choices]
                    assert finishes[-1] == "stop"
                    answered[model] += 1

            async with asyncio.TaskGroup() as load:
                for _ in range(8):
                    load.create_task(ask_on("m"))
                for number in range(5):
                    await engine.received(10 * (number + 1))
                    # Every reload changes what a connection pool depends on, so that pools are replaced.
                    config["backends"]["pool"]["connections"] = {"max": 5 + number}
                    config["models"]["new"] = {"backend": "other"}
                    config["backends"]["other"] = {"engine": "openai", "replicas": [{"url": other.url}]}
                    write_config(tmp_path / "tidegate.yaml", config)
                    gateway.log = ""
                    gateway.send(signal.SIGHUP)
                    await gateway.logged("configuration reloaded")
                    load.create_task(ask_on("new"))
                await other.received(10)
                over.set()
            assert min(answered.values()) >= 10
            listed = {model.id async for model in client.models.list()}
            assert listed == {"m", "new"}
            assert "ERROR" not in gateway.log


async def test_a_stream_survives_the_removal_of_its_model(tmp_path: Path) -> None:
    async with FakeEngine(chunks=30, interval_s=0.03) as engine, FakeEngine() as other:
        config = config_for(engine.url)
        async with running(tmp_path, config) as gateway, opened_stream(gateway) as client:
            config["models"] = {"new": {"backend": "other"}}
            config["backends"] = {"other": {"engine": "openai", "replicas": [{"url": other.url}]}}
            write_config(tmp_path / "tidegate.yaml", config)
            gateway.send(signal.SIGHUP)
            await gateway.logged("configuration reloaded")
            async with connect("127.0.0.1", gateway.port) as second:
                await second.send(post(CHAT, ASK))
                assert (await second.reply()).status == 404
            (request,) = engine.requests
            assert not request.done.is_set()
            rest = await client.until(b"data: [DONE]\n\n")
            assert b"error" not in rest
            async with asyncio.timeout(5.0):
                await engine.until(lambda: not engine.connections)  # nothing holds on to the old pool


async def test_a_bad_new_file_keeps_the_old_configuration_and_says_why(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        config = config_for(engine.url)
        async with running(tmp_path, config) as gateway, sdk(gateway) as client:
            for bad in ({**config, "modles": {}}, {**config, "models": {"m": {"backend": "nowhere"}}}):
                write_config(tmp_path / "tidegate.yaml", bad)
                gateway.log = ""
                gateway.send(signal.SIGHUP)
                await gateway.logged("reload refused")
                await gateway.logged("modles" if "modles" in bad else "nowhere")
                assert (await client.chat.completions.create(model="m", messages=[])).choices
            (tmp_path / "tidegate.yaml").write_text("{")
            gateway.send(signal.SIGHUP)
            await gateway.logged("tidegate.yaml")
            (tmp_path / "tidegate.yaml").unlink()
            gateway.log = ""
            gateway.send(signal.SIGHUP)
            await gateway.logged("reload refused")
            assert (await client.chat.completions.create(model="m", messages=[])).choices


# -- starts that fail


@pytest.mark.parametrize("key", ["server.port", "admin.port"])
async def test_a_port_in_use_is_named_with_its_key(tmp_path: Path, key: str) -> None:
    section = key.partition(".")[0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = config_for("http://127.0.0.1:1")
        config["admin"] = {"enabled": True, "port": 0}
        config[section]["port"] = port
        file = write_config(tmp_path / "tidegate.yaml", config)
        code, said = await run_serve("--config", str(file))
    assert code == 2
    assert f"127.0.0.1:{port}" in said
    assert key in said
    assert "Traceback" not in said


# -- too few file descriptors


async def test_a_process_out_of_descriptors_survives_and_recovers(tmp_path: Path) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    async with FakeEngine() as engine:
        config = config_for(engine.url)
        file = write_config(tmp_path / "tidegate.yaml", config)
        async with gateway_process("--config", str(file), preexec=few) as gateway:
            async with contextlib.AsyncExitStack() as held:
                for _ in range(200):
                    await held.enter_async_context(connect("127.0.0.1", gateway.port))
                before = _cpu_s(gateway)
                await asyncio.sleep(1.0)
                assert _cpu_s(gateway) - before < 0.3  # it does not spin
                assert len(gateway.log) < 20_000
            async with sdk(gateway) as client:
                assert (await client.chat.completions.create(model="m", messages=[])).choices


def _cpu_s(gateway: Gateway) -> float:
    fields = Path(f"/proc/{gateway.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
