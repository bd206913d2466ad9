"""Replicas behind TLS: an authority of one's own, a certificate to show, and what is said of files that do not fit."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import Any

import pytest

from backends.addresses import resolved
from backends.side import SideChannel
from gateway.config import ConfigError, load
from tests.backends.scripted import Peer, scripted
from tests.support.http import ask
from tests.support.redis_tls import Certificates, make_certificates
from tests.support.serving import serving, settings_for

ANSWER = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}]}'
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def engine_side(certificates: Certificates) -> ssl.SSLContext:
    """An engine that takes nobody without a certificate of the test's own authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.ca)
    context.load_cert_chain(certificates.certificate, certificates.key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def answer(peer: Peer) -> None:
    await peer.serve(OK)


def pool(tls: dict[str, Any]) -> dict[str, Any]:
    return {"backend": {"tls": tls, "health": {"probe": False}}}


async def test_engines_that_ask_for_a_certificate_get_one(certificates: Certificates) -> None:
    own = {"ca_file": certificates.ca, "cert_file": certificates.certificate, "key_file": certificates.key}
    async with scripted(answer, ssl_context=engine_side(certificates)) as engine:
        url = f"https://localhost:{engine.origin.port}"
        async with serving(settings_for([url], **pool(own))) as gateway:
            assert (await ask(gateway, CHAT)).status == 200
        for less in ({"ca_file": certificates.ca}, {}):
            async with serving(settings_for([url], **pool(less))) as gateway:
                reply = await ask(gateway, CHAT)
                assert reply.status == 502
                assert b"hi" not in reply.body


async def test_an_absolute_name_is_looked_up_whole_and_told_without_its_dot(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 6066 §3. curl does so with certificates; httpx with a dot finds that no certificate fits."""
    looked_up, names, hosts = [], [], []

    def look_up(host: str, port: int) -> Any:
        looked_up.append(host)
        return resolved("127.0.0.1", port)

    async def note(peer: Peer) -> None:
        request = await peer.request()
        hosts.append((request.partition(b" ")[0], re.findall(rb"(?i)\r\nhost: (.*)\r\n", request)))
        await peer.send(OK)

    monkeypatch.setattr("backends.addresses.resolved", look_up)
    context = engine_side(certificates)
    context.verify_mode = ssl.CERT_NONE
    context.sni_callback = lambda _, name, __: names.append(name)
    async with scripted(note, ssl_context=context) as engine:
        port = engine.origin.port
        settings = settings_for([f"https://LocalHost.:{port}"], backend={"tls": {"ca_file": certificates.ca}})
        async with serving(settings) as gateway:
            assert (await ask(gateway, CHAT)).status == 200
        # As probes ask: with the other of the two clients.
        authority = ssl.create_default_context(cafile=certificates.ca)
        side = SideChannel(origin=f"https://localhost.:{port}", ssl_context=authority)
        assert (await side.get("/health")).ok
        await side.aclose()
    assert {method for method, _ in hosts} == {b"GET", b"POST"}
    assert set(looked_up) == {"localhost."}
    assert set(names) == {"localhost"}
    assert {host for _, (host,) in hosts} == {b"localhost:%d" % port}


async def test_a_renewed_certificate_is_read_at_a_reload(certificates: Certificates, tmp_path: Path) -> None:
    settings = settings_for(["https://localhost:1"], **pool({"ca_file": certificates.ca}))
    async with serving(settings) as gateway:
        (before,) = gateway.runtime.fleet.upstreams()
        gateway.runtime.reload(settings)
        assert list(gateway.runtime.fleet.upstreams()) == [before]
        os.utime(certificates.ca)
        gateway.runtime.reload(settings)
        assert before not in list(gateway.runtime.fleet.upstreams())


@pytest.mark.parametrize("section", ["backends.pool.tls", "redis"])
def test_files_that_do_not_fit_are_named(section: str, certificates: Certificates, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    for files, said in (
        ({"cert_file": certificates.certificate}, f"{section}.cert_file"),
        ({"key_file": certificates.key}, f"{section}.key_file"),
        ({"ca_file": str(tmp_path / "none.pem")}, "none.pem cannot be read: No such file"),
        ({"ca_file": str(nonsense)}, "the certificates cannot be used"),
        ({"cert_file": certificates.ca, "key_file": certificates.key}, "the certificates cannot be used"),
    ):
        lines = "".join(f", {name}: {path}" for name, path in files.items()).removeprefix(", ")
        file = tmp_path / "tidegate.yaml"
        redis, tls = (lines, "") if section == "redis" else ("", lines)
        file.write_text(
            f"models: {{m: {{backend: pool}}}}\nredis: {{{redis}}}\n"
            f"backends: {{pool: {{engine: sglang, replicas: [{{url: 'https://x'}}], tls: {{{tls}}}}}}}\n"
        )
        with pytest.raises(ConfigError) as error:
            load(file, {})
        assert said in str(error.value)
