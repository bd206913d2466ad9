"""Experiment 37: nothing that a client or an upstream says makes the gateway connect anywhere but to the operator's
addresses."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backends.dialects import DIALECTS
from backends.side import SideChannel
from gateway.config import ConfigError, load
from loadtests.engine import FakeEngine
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.forms import LONG
from tests.support.command import serve_process
from tests.support.serving import serving, settings_for

ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/models/m",
    "/livez",
    "/nowhere",
)
FIELDS = (
    *(
        "base_url",
        "api_base",
        "api_url",
        "url",
        "endpoint",
        "host",
        "proxy",
        "proxies",
        "callback",
        "webhook",
        "upstream",
    ),
    *(
        "user_config",
        "model_list",
        "litellm_params",
        "extra_headers",
        "extra_body",
        "provider",
        "custom_host",
        "fallbacks",
    ),
    *(
        "config",
        "targets",
        "azure_endpoint",
        "vertex_credentials",
        "aws_bedrock_runtime_endpoint",
        "metadata",
        "source",
    ),
    *("bootstrap_host", "kv_transfer_params", "ec_transfer_params", "disaggregated_params", "migration_request"),
)
HEADERS = (
    *(
        "x-forwarded-host",
        "x-forwarded-server",
        "forwarded",
        "x-original-url",
        "x-rewrite-url",
        "x-host",
        "destination",
    ),
    *("x-custom-host", "x-portkey-custom-host", "x-portkey-config", "x-litellm-api-base", "x-base-url", "x-api-base"),
    *("x-target-url", "x-upstream", "x-proxy-url", "proxy", "x-real-ip", "referer", "x-tidegate-region", "location"),
    *("openai-base-url", "x-stainless-base-url", "x-backend", "via", "x-forwarded-for", "x-forwarded-proto", "alt-svc"),
)
MEDIA = ("image_url", "video_url", "audio_url")


class Canary:
    """A listener that nobody has a reason to connect to."""

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def forms(self) -> list[str]:
        """Its address in all the ways that parsers have read differently."""
        port = self.port
        return [
            *(
                f"http://127.0.0.1:{port}/v1",
                f"http://2130706433:{port}",
                f"http://0x7f000001:{port}",
                f"http://127.1:{port}",
            ),
            *(f"http://[::ffff:127.0.0.1]:{port}/", f"http://ok.example@127.0.0.1:{port}/", f"//127.0.0.1:{port}"),
            *(f"http://127.0.0.1:{port}#@ok.example/", f"127.0.0.1:{port}", f"gopher://127.0.0.1:{port}/_x"),
            f"http://localhost:{port}/?x=http://ok.example",
        ]


@asynccontextmanager
async def canary() -> AsyncIterator[Canary]:
    bird = Canary()

    def met(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bird.connections += 1
        writer.close()

    server = await asyncio.start_server(met, "127.0.0.1", 0)
    bird.port = server.sockets[0].getsockname()[1]
    try:
        yield bird
    finally:
        server.close()
        await server.wait_closed()


_watching: list[Counter[str]] = []


def _audited(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells of every connect and every look-up of a name, as a packet capture would; hooks stay for good."""
    if _watching and event in ("socket.connect", "socket.getaddrinfo"):
        where = arguments[1] if event == "socket.connect" else arguments[:2]
        if isinstance(where, tuple) and len(where) >= 2:
            _watching[-1][f"{where[0]}:{where[1]}"] += 1


@contextmanager
def capture() -> Iterator[Counter[str]]:
    """Where this process connects to, with the default event loop: uvloop's sockets are not Python's."""
    if not hasattr(sys, "_tidegate_audit"):
        sys._tidegate_audit = True  # type: ignore[attr-defined]
        sys.addaudithook(_audited)
    _watching.append(Counter())
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


def bodies(form: str) -> Iterator[dict[str, Any]]:
    """What a client could hope that somebody reads an address from."""
    yield from ({field: form} for field in (FIELDS if LONG else FIELDS[-6:]))
    yield dict.fromkeys(FIELDS[:-5], form)
    yield {"model": form}
    yield {"user_config": {"model_list": [{"litellm_params": {"api_base": form}}]}, "extra_body": {"base_url": form}}
    for kind in MEDIA:
        yield {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": form}}]}]}
    yield {"tools": [{"type": "mcp", "server_url": form}], "functions": [{"name": "f", "url": form}]}


@pytest.mark.parametrize(
    ("edge", "engine_name"), [("protocol", "sglang"), ("asgi", "vllm"), ("protocol", "openai")][: 3 if LONG else 2]
)
async def test_37_nothing_in_a_request_leads_anywhere_else(report: Report, edge: str, engine_name: str) -> None:
    sent = 0
    async with canary() as bird, FakeEngine() as engine:
        settings = settings_for([engine.url], engine=engine_name, edge=edge)
        async with serving(settings) as gateway, httpx2.AsyncClient(trust_env=False, base_url=gateway.url) as client:
            with capture() as seen:
                for path in ROUTES:
                    base: dict[str, Any] = {"model": "m", "messages": [], "prompt": "x", "input": "x"}
                    for form in bird.forms() if LONG else bird.forms()[::5]:
                        headers = dict.fromkeys(HEADERS, form)
                        await client.get(path, params={"base_url": form, "url": form}, headers=headers)
                        await client.post(path, json=base, headers=headers)
                        for fields in bodies(form):
                            await client.post(path, json={**base, **fields})
                            sent += 1
    own = engine.url.removeprefix("http://")
    elsewhere = {where: seen[where] for where in seen.keys() - {f"{gateway.host}:{gateway.port}", own}}
    texts = [text for request in engine.requests for text in parts_with(request.body, str(bird.port))]
    report(
        "37",
        Finding(
            f"addresses in bodies and headers, {engine_name}, {edge} edge",
            f"{sent} requests over {len(ROUTES)} routes: {len(FIELDS)} fields, {len(HEADERS)} headers, pictures, "
            "each with several spellings of a canary's address",
            "no connection and no name look-up but the configured replica's; no picture by address reaches an engine",
            f"{sum(elsewhere.values())} connections elsewhere, {bird.connections} at the canary; "
            f"{len(texts)} pictures; {seen[own]} connections to the replica",
            not elsewhere and bird.connections == 0 and not texts and bool(engine.requests),
            {"elsewhere": elsewhere, "pictures": texts[:3]},
        ),
    )


def parts_with(body: bytes, text: str) -> list[str]:
    messages = json.loads(body).get("messages") or []
    return [json.dumps(each) for each in messages if text in json.dumps(each)]


def answering(status: int, location: str) -> str:
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_37_redirects_of_upstreams_are_failures(report: Report, status: int) -> None:
    asked: list[Any] = []
    async with canary() as bird, FakeEngine() as engine:
        locations = [
            f"{bird.url}/latest/meta-data/",
            "http://169.254.169.254/",
            f"//127.0.0.1:{bird.port}/",
            "/v1/models",
        ]
        async with serving(settings_for([engine.url])) as gateway, httpx2.AsyncClient(trust_env=False) as client:
            with capture() as seen:
                for location in locations:
                    engine.script = engine.probe = type(engine.script)(raw=answering(status, location))
                    for stream in (False, True):
                        chat: dict[str, Any] = {"model": "m", "messages": [], "stream": stream}
                        reply = await client.post(f"{gateway.url}{ROUTES[0]}", json=chat)
                        asked.append((reply.status_code, "location" in reply.headers))
                    side = SideChannel(origin=engine.url)
                    for dialect in DIALECTS.values():
                        for question in (dialect.probe(side, "m"), dialect.info(side), dialect.load(side, None)):
                            try:
                                await question
                            except Exception as error:  # whatever it is, it must not have followed
                                assert not isinstance(error, AssertionError)  # noqa: PT017
                    await side.aclose()
    allowed = {f"{gateway.host}:{gateway.port}", engine.url.removeprefix("http://")}
    elsewhere = {where: count for where, count in seen.items() if where not in allowed}
    good = all(code in (502, 503, 504) and not shown for code, shown in asked)
    report(
        "37",
        Finding(
            f"an upstream that answers {status}",
            "redirects to a canary, to 169.254.169.254 and to itself, of requests and of all questions beside them",
            "a failed attempt (502 or 503), never followed, never shown to the client",
            f"statuses {sorted({code for code, _ in asked})}; {sum(elsewhere.values())} connections elsewhere, "
            f"{bird.connections} at the canary",
            good and not elsewhere and bird.connections == 0,
            {"elsewhere": elsewhere},
        ),
    )


async def test_37_proxies_and_netrc_of_the_environment_are_not_used(report: Report, tmp_path: Path) -> None:
    async with canary() as bird, FakeEngine() as engine:
        home = tmp_path / "home"
        home.mkdir()
        (home / ".netrc").write_text("machine 127.0.0.1 login canary password canary-of-netrc\n")
        (home / ".netrc").chmod(0o600)
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        environ = {**dict.fromkeys(names, bird.url), "NO_PROXY": "", "no_proxy": "", "HOME": str(home)}
        backends = {"pool": {"engine": "sglang", "replicas": [{"url": engine.url}]}}
        async with (
            serve_process(tmp_path, [engine.url], environ=environ, backends=backends) as gateway,
            httpx2.AsyncClient(trust_env=False, timeout=20.0) as client,
        ):
            url = await gateway.url()
            reply = await client.post(f"{url}{ROUTES[0]}", json={"model": "m", "messages": []})
            await engine.until(lambda: len(engine.probes) >= 2)
    heads = [*(each.headers for each in engine.requests), *(each.headers for each in engine.probes)]
    credentials = [name for head in heads for name, _ in head if name == b"authorization"]
    report(
        "37",
        Finding(
            "proxies and netrc in the environment",
            f"a gateway process with {', '.join(names[:3])} naming a canary, and a .netrc for the replica",
            "requests and probes go straight to the replica, without a credential",
            f"status {reply.status_code}, {bird.connections} connections at the canary, {len(heads)} requests with "
            f"{len(credentials)} credentials",
            reply.status_code == 200 and bird.connections == 0 and not credentials,
        ),
    )


REFUSED_URLS = (
    *(
        "http://ok.example@127.0.0.1",
        "http://user:pass@127.0.0.1",
        "http://127.0.0.1#x",
        "http://127.0.0.1/#",
        "http://a?b=c",
    ),
    *(
        "http://127.0.0.1/?",
        "http://2130706433",
        "http://0x7f000001",
        "http://017700000001",
        "http://127.1",
        "http://0/",
    ),
    *("http://0x7f.0.0.1", "http://127.0.0.1.", "http://127.0.0.01", "http://127.0.0.1:0", "http://127.0.0.1:99999"),
    *("http://127.0.0.1\\@evil", "http://evil\\.example", "http://ev il", "http://exämple.org", "http://①②⑦.⓪.⓪.①"),
    *(
        "file:///etc/passwd",
        "ftp://127.0.0.1",
        "127.0.0.1:30000",
        "//127.0.0.1",
        "http://",
        "http:///x",
        "unix:///run/x",
    ),
    *(
        "http://[::1",
        "http://[::1]x",
        "http://[::g]",
        "http://a..b",
        "http://-a",
        "http://127.0.0.1/../x",
        "http://a/%zz/v1",
    ),
    *("http://127.0.0.1\t", "http://127.0.0.1\n", "http://127.0.0.1/v1/chat/completions", "http://127.0.0.1/x;y"),
)


def test_37_addresses_of_the_configuration_mean_one_thing(report: Report, tmp_path: Path) -> None:
    taken = []
    for url in REFUSED_URLS:
        file = tmp_path / "tidegate.yaml"
        backends = {"pool": {"engine": "openai", "replicas": [{"url": url}]}}
        file.write_text(json.dumps({"models": {"m": {"backend": "pool"}}, "backends": backends}))
        try:
            load(file, {})
            taken.append(url)
        except ConfigError as error:
            problems = str(error)
            if "replicas[0].url" not in problems or "Traceback" in problems:
                taken.append(f"{url}: {problems}")
    report(
        "37",
        Finding(
            "addresses that two programs could read differently",
            f"{len(REFUSED_URLS)} replica URLs: user names, fragments, numbers for hosts, backslashes, other schemes",
            "each is refused when the configuration is read, with the setting's name and what to write instead",
            f"{len(REFUSED_URLS) - len(taken)} of {len(REFUSED_URLS)} refused",
            not taken,
            {"taken": taken},
        ),
    )
