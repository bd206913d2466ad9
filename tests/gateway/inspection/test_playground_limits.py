"""The playground where keys are asked for: its requests are somebody's, and count as theirs."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.api import build_app
from gateway.config import Settings
from gateway.database.answers import Changes
from gateway.errors import InvalidRequest
from gateway.inspection.door import Door, _host, door_to
from gateway.inspection.playground import MAX_COLUMNS, Asked, Column, _read
from gateway.keys.records import TenantRecord
from gateway.listener import bind_uds, inference_listener, listen
from loadtests.engine import FakeEngine
from tests.gateway.admission.keyed import admitting, keyed
from tests.support.serving import Serving

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SECRET = "s" * 43
TENANTS = {"acme": {"limits": {"requests_per_minute": 1, "burst_s": 1}}}


@asynccontextmanager
async def played(folder: Path, engine: FakeEngine, **sections: Any) -> AsyncIterator[tuple[Serving, Door]]:
    """A gateway with keys, and the door to it."""
    async with admitting(keyed(folder, [engine.url], tenants=TENANTS, **sections)) as gateway:
        gateway.runtime.trial_secret = SECRET
        directory = gateway.runtime.gate.directory
        assert directory is not None
        directory.apply(Changes(1, tenants=(TenantRecord("closed", disabled=True),)))
        yield gateway, Door((gateway.host, gateway.port), SECRET)


async def send(
    gateway: Serving, door: Door, body: dict[str, Any] | None = None, **trial: Any
) -> tuple[int, dict[str, str], bytes]:
    headers = [("x-tidegate-trial", msgspec.json.encode(trial).decode())]
    raw = msgspec.json.encode(body or CHAT)
    async with door.ask(gateway.runtime.settings, "/v1/chat/completions", headers, raw) as answer:
        return answer.status, answer.headers, await answer.whole(2**20)


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_it_comes_in_without_a_key_as_its_own_tenant(tmp_path: Path, edge: str) -> None:
    async with FakeEngine() as engine, played(tmp_path, engine, server={"edge": edge}) as (gateway, door):
        status, headers, _ = await send(gateway, door)
        assert status == 200
        assert headers["x-tidegate-replica"] == "pool-0"
        (record,) = await gateway.settled()
        assert (record.tenant, record.key_id, record.route) == ("playground", "", "/v1/chat/completions")
        stranger = Door(door.address, "t" * 43)
        assert (await send(gateway, stranger))[0] == 404


async def test_the_limits_of_the_tenant_hold(tmp_path: Path) -> None:
    async with FakeEngine() as engine, played(tmp_path, engine) as (gateway, door):
        assert (await send(gateway, door, tenant="acme"))[0] == 200
        status, _, body = await send(gateway, door, tenant="acme")
        assert (status, msgspec.json.decode(body)["error"]["code"]) == (429, "rate_limit_exceeded")
        assert (await send(gateway, door))[0] == 200


@pytest.mark.parametrize(("tenant", "status"), [("closed", 403), ("nobody", 404)])
async def test_not_every_tenant_will_do(tmp_path: Path, tenant: str, status: int) -> None:
    async with FakeEngine() as engine, played(tmp_path, engine) as (gateway, door):
        assert (await send(gateway, door, tenant=tenant))[0] == status
        assert engine.requests == []


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_a_long_prompt_comes_in_too_and_strangers_large_bodies_do_not(tmp_path: Path, edge: str) -> None:
    long = {**CHAT, "messages": [{"role": "user", "content": "word " * 50_000}]}
    async with FakeEngine() as engine, played(tmp_path, engine, server={"edge": edge}) as (gateway, door):
        assert (await send(gateway, door, long))[0] == 200
        stranger = Door(door.address, "t" * 43)
        assert (await send(gateway, stranger, long))[0] in (401, 404)
        assert len(engine.requests) == 1


async def test_an_unknown_policy_is_refused_by_name(tmp_path: Path) -> None:
    async with FakeEngine() as engine, played(tmp_path, engine) as (gateway, door):
        status, _, body = await send(gateway, door, policy="os:system")
        assert (status, msgspec.json.decode(body)["error"]["param"]) == (400, "policy")


async def test_a_pinned_request_does_not_fall_back(tmp_path: Path) -> None:
    async with FakeEngine(status=500) as engine, FakeEngine() as other:
        sections: dict[str, Any] = {
            "models": {"m": {"backend": "pool", "fallbacks": [{"model": "n"}]}, "n": {"backend": "other"}},
            "backends": {
                "pool": {"engine": "openai", "replicas": [{"url": engine.url}]},
                "other": {"engine": "openai", "replicas": [{"url": other.url}]},
            },
        }
        async with played(tmp_path, engine, **sections) as (gateway, door):
            assert (await send(gateway, door, replica="pool-0"))[0] == 502
            assert other.requests == []
            assert (await send(gateway, door))[0] == 200
            assert len(other.requests) == 1


async def test_it_goes_through_a_unix_socket_too(tmp_path: Path) -> None:
    async with FakeEngine() as engine, played(tmp_path, engine) as (gateway, _):
        with tempfile.TemporaryDirectory() as folder:
            sock = bind_uds(f"{folder}/tidegate.sock", "server.uds")
            listen([sock])
            door = door_to([sock])
            assert door is not None
            assert (door.address, door.url) == (f"{folder}/tidegate.sock", f"unix:{folder}/tidegate.sock")
            gateway.runtime.trial_secret = door.secret
            listener, _ = inference_listener(build_app(gateway.runtime), gateway.runtime)
            serving = asyncio.create_task(listener.serve([sock]))
            await listener.ready.wait()
            try:
                assert (await send(gateway, door))[0] == 200
            finally:
                listener.cut()
                listener.should_exit = True
                await serving


def test_two_starts_have_two_secrets() -> None:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        first, second = door_to([sock]), door_to([sock])
    assert first is not None
    assert second is not None
    assert first.address == ("127.0.0.1", sock_port(first))
    assert first.secret != second.secret
    assert len(first.secret) >= 43
    assert first.secret not in repr(first)
    assert door_to([]) is None


def sock_port(door: Door) -> int:
    assert not isinstance(door.address, str)
    return door.address[1]


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b'{"request": {}, "colour": 1}',
        b'{"request": {}, "path": "/v1/embeddings"}',
        b'{"request": {}, "columns": []}',
        msgspec.json.encode(Asked({}, columns=(Column(),) * (MAX_COLUMNS + 1))),
        b'{"request": {}, "tenant": ""}',
        b'{"request": {}, "tenant": "a\\r\\nx-evil: 1"}',
        b'{"request": {}, "regions": ["\\u00fc"]}',
        b'{"request": {}, "columns": [{"policy": "a\\nb"}]}',
    ],
)
def test_what_cannot_be_sent_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        _read(body)


def test_settings_are_what_the_host_comes_from() -> None:
    assert _host(Settings()) == "localhost"
    assert _host(Settings(server={"allowed_hosts": ["gateway.internal"]})) == "gateway.internal"  # type: ignore[arg-type]
    assert _host(Settings(server={"allowed_hosts": [".internal"]})) == "playground.internal"  # type: ignore[arg-type]
    assert _host(Settings(server={"allowed_hosts": ["*"]})) == "localhost"  # type: ignore[arg-type]
