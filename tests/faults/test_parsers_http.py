"""Experiments 32 and 33: requests that two readers could see differently, and header values that end too early."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.admin.app import admin_app
from gateway.listener import admin_listener, bind_tcp, listen
from gateway.order import CHAT
from gateway.state import LocalSource
from loadtests.engine import FakeEngine
from loadtests.hammer_runs import Finding
from loadtests.ports import free_port
from loadtests.rawclient import Reply
from tests.faults.conftest import Report
from tests.gateway.test_framing import FORMS
from tests.support.client import connect, post, until
from tests.support.serving import Serving
from tests.support.talking import ASK, SHORT, both_edges, gateway_of, talking

NGINX = shutil.which("nginx")
TOKEN = "tg_admin_" + "t" * 43
HIDDEN = b"GET /v1/models/hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""Behind every request of the matrix: whoever answers it has taken a body for a request."""


async def told(host: str, port: int, sent: bytes) -> tuple[int, bytes]:
    """The status of the first answer (0: none), and all that came up to the end of the connection."""
    async with connect(host, port) as client:
        await client.send(sent)
        answer = await client.rest(15.0)
    status = answer.split(b" ", 2)[1] if answer.startswith(b"HTTP/1.") else b"0"
    return int(status), answer


def answers_to_hidden(answer: bytes) -> bool:
    return b"hidden" in answer or len(_STATUS_LINE.findall(answer)) > 1


_STATUS_LINE = re.compile(rb"HTTP/1\.[01] \d{3} ")


@both_edges
async def test_32_no_request_can_be_read_in_two_ways(edge: str, report: Report) -> None:
    statuses: dict[str, int] = {}
    hidden = []
    async with FakeEngine() as engine, gateway_of(engine, edge, **SHORT) as gateway:
        for name, form in FORMS.items():
            statuses[name], answer = await told(gateway.host, gateway.port, form + HIDDEN)
            if answers_to_hidden(answer):
                hidden.append(name)
        reached = len(engine.requests)
    others = {name: status for name, status in statuses.items() if status != 400}
    report(
        "32",
        Finding(
            f"framing, edge {edge}",
            f"{len(FORMS)} requests with unclear lengths, codings, line ends, names or versions; another request "
            "is hidden behind each",
            "400 and the connection closed; the hidden request never answered; nothing at the engine",
            f"{len(statuses) - len(others)} times 400; {len(hidden)} hidden ones answered; {reached} at the engine",
            not others and not hidden and not reached,
            {"others": others, "hidden": hidden},
        ),
    )


@contextlib.asynccontextmanager
async def admin_of(gateway: Serving) -> AsyncIterator[tuple[str, int]]:
    """The operators' listener of this gateway."""
    app = admin_app([LocalSource(gateway.runtime)], host="127.0.0.1", token=SecretStr(TOKEN))
    sock = bind_tcp("127.0.0.1", 0, "admin.port")
    listen([sock])
    listener = admin_listener(app)
    task = asyncio.create_task(listener.serve([sock]))
    await listener.ready.wait()
    try:
        yield sock.getsockname()[:2]
    finally:
        listener.cut()
        listener.should_exit = True
        await task


async def test_32_nor_on_the_admin_listener(report: Report) -> None:
    """There with the token and a name that it answers to, so that nothing but the framing is wrong."""
    statuses: dict[str, int] = {}
    hidden = []
    async with FakeEngine() as engine, gateway_of(engine, "protocol", **SHORT) as gateway, admin_of(gateway) as admin:
        head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
        assert (await told(*admin, b"GET /admin/fleet HTTP/1.1\r\nConnection: close\r\n" + head + b"\r\n"))[0] == 200
        forms = [
            form.replace(b"POST " + CHAT.encode(), b"POST /admin/explain").replace(b"Host: localhost\r\n", head, 1)
            for form in FORMS.values()
        ]
        answers = await asyncio.gather(*(told(*admin, form + HIDDEN) for form in forms))
        for name, (status, answer) in zip(FORMS, answers, strict=True):
            statuses[name] = status
            if answers_to_hidden(answer):
                hidden.append(name)
    others = {name: status for name, status in statuses.items() if status != 400}
    report(
        "32",
        Finding(
            "framing, admin listener",
            f"the same {len(FORMS)}, with the owner's token",
            "400 and the connection closed; the hidden request never answered",
            f"{len(statuses) - len(others)} times 400; {len(hidden)} hidden ones answered",
            not others and not hidden,
            {"others": others, "hidden": hidden},
        ),
    )


# -- a second parser in front


@contextlib.asynccontextmanager
async def nginx_before(gateway: Serving, folder: Path) -> AsyncIterator[int]:
    """nginx on a port of its own, with one connection to the gateway that all its requests share."""
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        "events { worker_connections 64; }\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n"
        f" fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
        f" upstream gateway {{ server 127.0.0.1:{gateway.port}; keepalive 1; }}\n"
        f" server {{ listen 127.0.0.1:{port}; client_body_timeout 1s; client_header_timeout 1s;\n"
        "  keepalive_timeout 300ms; lingering_timeout 300ms;\n"
        "  location / { proxy_pass http://gateway; proxy_http_version 1.1; proxy_set_header Connection '';\n"
        "   proxy_set_header Host localhost;\n"
        "   proxy_request_buffering off; } } }\n"
    )
    assert NGINX is not None
    process = await asyncio.create_subprocess_exec(
        NGINX, "-p", str(folder), "-c", str(config), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(15):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    break
        yield port
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed here")
async def test_32_a_proxy_in_front_and_the_gateway_see_the_same_requests(tmp_path: Path, report: Report) -> None:
    """After each form a well-formed request through the same proxy must get its own answer."""
    out_of_step, more, served = [], [], 0
    async with (
        FakeEngine() as engine,
        gateway_of(engine, "protocol", body_timeout_s=1, header_timeout_s=1) as gateway,
        nginx_before(gateway, tmp_path) as port,
    ):
        for number, (name, form) in enumerate(FORMS.items()):
            before = len(engine.requests)
            status, answer = await told("127.0.0.1", port, form + HIDDEN)
            served += status == 200
            if len(engine.requests) - before > 1:
                more.append(name)
            probe = b"GET /v1/models/probe-%d HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % number
            _, answer = await told("127.0.0.1", port, probe)
            if b"'probe-%d'" % number not in answer:
                out_of_step.append(name)
    report(
        "32",
        Finding(
            "framing, nginx in front",
            f"the same {len(FORMS)} through nginx, whose one kept connection to the gateway all clients share",
            "whatever of it is let through is one request for both; the next client gets its own answer",
            f"{served} served as a request that both read alike; {len(more)} became two; {len(out_of_step)} answers "
            "went to the wrong client",
            not more and not out_of_step,
            {"became_two": more, "out_of_step": out_of_step},
        ),
    )


# -- header values

FEW = (
    "two Hosts", "no Host", "Host with a path", "Host with a user", "two Authorizations", "NUL in a value",
    "CR in a value", "NUL in a name", "one bare LF",
)  # fmt: skip


def with_headers(*lines: str) -> bytes:
    return post(CHAT, ASK, *lines)


@both_edges
async def test_33_heads_that_are_wrong_or_too_large_are_refused(edge: str, report: Report) -> None:
    forms: dict[str, tuple[bytes, int]] = {
        **{name: (FORMS[name], 400) for name in FEW},
        "100 KB in one header": (with_headers("X: " + "a" * 100_000), 431),
        "2,000 headers": (with_headers(*[f"X-{n}: a" for n in range(2000)]), 431),
        "a target of 100 KB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        "CR in a region": (with_headers("x-tidegate-region: a\rb"), 400),
        "NUL in a key": (with_headers("Authorization: Bearer a\0b"), 400),
        "a key of two lines": (with_headers("x-api-key: a\r\n b"), 400),
    }
    seen: dict[str, int] = {}
    async with FakeEngine() as engine, gateway_of(engine, edge, **SHORT) as gateway:
        for name, (form, _) in forms.items():
            seen[name], _ = await told(gateway.host, gateway.port, form)
        reached = engine.accepted
    wrong = {name: status for name, status in seen.items() if status != forms[name][1]}
    report(
        "33",
        Finding(
            f"request headers, edge {edge}",
            f"{len(forms)} heads: control characters, none or two of what comes once, 100 KB, 2,000 headers",
            "400, or 431 for what is too large; nothing at the engine",
            f"{len(forms) - len(wrong)} refused as they should be; {reached} connections to the engine",
            not wrong and not reached,
            {"seen": seen},
        ),
    )


BREAKING = (
    "a\r\nX-Injected: 1",
    "a\nX-Injected: 1",
    "a\rX-Injected: 1",
    "a\0b",
    "a\r\n\r\n<html>",
    "ä\u2028\u0085",
    "a" * 5000,
)
"""Put where text of a client or of a model server could come out in a header."""


async def asked_with(gateway: Serving, text: str) -> Sequence[Reply]:
    """The text as model, as key, as user, as session and in the path."""
    replies = []
    for body, headers in (
        ({**ASK, "model": text}, ()),
        ({**ASK, "model": f"m:{text}"}, ()),
        ({**ASK, "user": text, "prompt_cache_key": text, "service_tier": text}, ()),
        ({**ASK, "lora_path": text}, ()),
        (ASK, (f"x-request-id: {text.encode('ascii', 'ignore').decode()[:40]}".replace("\r", "").replace("\n", ""),)),
    ):
        async with connect(gateway.host, gateway.port) as client:
            await client.send(post(CHAT, body, *headers))
            replies.append(await client.reply())
    return replies


@both_edges
async def test_33_no_text_of_a_client_or_an_engine_becomes_a_header(edge: str, report: Report) -> None:
    """With a replica, a region and a model's alias as odd as the configuration allows."""
    dirty: list[tuple[str, dict[str, str]]] = []
    count = 0
    async with talking(edge) as talk:
        for text in BREAKING:
            replies = list(await asked_with(talk.gateway, text))
            said = {"error": {"message": text, "type": text, "param": text, "code": text}}
            for status in (400, 429, 503):
                script = {"status": status, "error_body": json.dumps(said)}
                async with connect(talk.gateway.host, talk.gateway.port) as client:
                    await client.send(post(CHAT, {**ASK, "fake": script}))
                    replies.append(await client.reply())
            for reply in replies:
                count += 1
                values = "".join([*reply.headers, *reply.headers.values()])
                if "x-injected" in reply.headers or not values.isprintable() or not values.isascii():
                    dirty.append((text[:20], reply.headers))
                assert reply.complete
        await until(lambda: talk.gateway.runtime.in_flight == 0)
    report(
        "33",
        Finding(
            f"response headers, edge {edge}",
            f"CR, LF, NUL, NEL and 5,000 characters in names, keys, users and an engine's errors: {count} answers",
            "no header more than without them; every value printable ASCII",
            f"{len(dirty)} answers with another header or a value that is not clean",
            not dirty,
            {"dirty": dirty},
        ),
    )
