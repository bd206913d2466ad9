"""Providers that act through real processes and real sockets, and what is said when they do not."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.config.scaling import CommandScale, KubernetesScale, Scaling, WebhookScale
from gateway.scaling.providers import Command, Nobody, Order, ProviderError, Webhook, provider_of

ORDER = Order("pool", 4, 3, ("gpu-2",), ("arrivals: many",))


def _command(folder: Path, code: str, timeout_s: float = 20.0) -> Command:
    script = folder / "scale.py"
    script.write_text(code)
    words = (sys.executable, str(script), "{pool}", "--count={count}", "{current};{leave}", "$HOME `id`")
    return Command("pool", CommandScale(words=words, timeout_s=timeout_s), {**os.environ, "SECRET_KEY": "do not tell"})


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_command_gets_its_words_filled_without_a_shell_and_no_secrets(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = f"import json,os,sys\njson.dump([sys.argv[1:], dict(os.environ)], open({str(out)!r}, 'w'))"
    provider = _command(tmp_path, code)
    assert provider.chooses
    await provider.apply(ORDER)
    words, environ = json.loads(out.read_text())
    assert words == ["pool", "--count=4", "3;gpu-2", "$HOME `id`"]
    assert environ["TIDEGATE_SCALE_COUNT"] == "4"
    assert "SECRET_KEY" not in environ


async def test_a_command_that_fails_says_the_end_of_what_it_has_said(tmp_path: Path) -> None:
    provider = _command(tmp_path, "print('x' * 10000)\nprint('quota\\x1b[2J exceeded')\nraise SystemExit(3)")
    with pytest.raises(ProviderError) as failed:
        await provider.apply(ORDER)
    text = str(failed.value)
    assert "exit code 3" in text
    assert text.endswith("quota?[2J exceeded")
    assert len(text) < 2300


async def test_a_command_that_hangs_is_ended_with_all_it_has_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess,sys,time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "print('waiting', flush=True)\ntime.sleep(600)"
    )
    provider = _command(tmp_path, code, timeout_s=3.0)
    with pytest.raises(ProviderError, match=r"longer than 3 s: waiting"):
        await provider.apply(ORDER)
    child = int(pid.read_text())
    async with asyncio.timeout(10.0):
        while _runs(child):  # noqa: ASYNC110 - nobody tells of the end of somebody else's child
            await asyncio.sleep(0.02)


async def test_what_a_command_leaves_running_does_not_hold_it_up_and_lives(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess,sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))"
    )
    await _command(tmp_path, code).apply(ORDER)
    child = int(pid.read_text())
    os.kill(child, 0)
    os.kill(child, 9)


async def test_a_command_that_is_not_there_says_so() -> None:
    provider = Command("pool", CommandScale(words=("/no/such/thing", "{count}")))
    assert not provider.chooses
    with pytest.raises(ProviderError, match=r"/no/such/thing cannot be run: No such file"):
        await provider.apply(ORDER)


class Hook:
    """Takes requests down, and answers as it is told."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[dict[str, str], dict[str, object]]] = []
        self.answer: Callable[[], bytes] = lambda: b"HTTP/1.1 204 No Content\r\n\r\n"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.requests.append((headers, json.loads(body)))
        answer = self.answer()
        if answer:
            writer.write(answer)
            await writer.drain()
        else:
            await reader.read()
        writer.close()


@asynccontextmanager
async def hook() -> AsyncIterator[Hook]:
    found = Hook()
    server = await asyncio.start_server(found.handle, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/scale"
    async with server:
        yield found


async def test_a_webhook_is_told_everything_and_the_same_order_has_the_same_key() -> None:
    async with hook() as found:
        provider = Webhook(WebhookScale(url=found.url, token=SecretStr("s3cret")))
        await provider.apply(ORDER)
        await provider.apply(ORDER)
        await provider.apply(Order("pool", 5, 3))
        headers, body = found.requests[0]
        assert body == {"pool": "pool", "count": 4, "current": 3, "leave": ["gpu-2"], "reasons": ["arrivals: many"]}
        assert headers["authorization"] == "Bearer s3cret"
        keys = [each["idempotency-key"] for each, _ in found.requests]
        assert keys[0] == keys[1] != keys[2]


async def test_a_webhook_that_refuses_hangs_redirects_or_is_away_says_so() -> None:
    async with hook() as found:
        provider = Webhook(WebhookScale(url=found.url, timeout_s=1.0))
        found.answer = lambda: b"HTTP/1.1 500 No\r\ncontent-length: 9\r\n\r\nno quota\n"
        with pytest.raises(ProviderError, match="answers 500: no quota"):
            await provider.apply(ORDER)
        found.answer = lambda: b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
        with pytest.raises(ProviderError, match="answers 302"):
            await provider.apply(ORDER)
        found.answer = lambda: b""
        with pytest.raises(ProviderError, match=r"did not answer within 1 s|cannot be reached"):
            await provider.apply(ORDER)
    with pytest.raises(ProviderError, match="cannot be reached"):
        await provider.apply(ORDER)


async def test_kubernetes_without_a_cluster_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = KubernetesScale(name="sglang", kubeconfig=tmp_path / "nowhere")
    provider = provider_of("pool", Scaling(max=4, provider="kubernetes", kubernetes=settings))
    with pytest.raises(ProviderError, match="nowhere"):
        await provider.apply(ORDER)
    with pytest.raises(ProviderError, match="nowhere"):
        await provider.roll()
    await provider.aclose()


async def test_nobody_is_told_where_there_is_no_provider() -> None:
    provider = provider_of("pool", Scaling(max=4))
    assert isinstance(provider, Nobody)
    assert not provider.acts
    await provider.apply(ORDER)
    with pytest.raises(ProviderError):
        await provider.roll()
