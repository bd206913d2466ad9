from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from pathlib import Path

import httpx2
import pytest
import yaml

from gateway.config import load
from gateway.demo.child import Child
from gateway.demo.fleet import (
    ALIAS,
    MODEL,
    NotYet,
    Ports,
    StartError,
    ask,
    gateway_config,
    next_delay_s,
    together,
    token_file,
)

PORTS = Ports(server=7400, admin=7401)


def test_delay_doubles_up_to_half_a_minute() -> None:
    delays, delay = [], 0.0
    for _ in range(7):
        delay = next_delay_s(delay, ran_for_s=1)
        delays.append(delay)
    assert delays == [1, 2, 4, 8, 16, 30, 30]


def test_delay_starts_again_after_a_stable_run() -> None:
    assert next_delay_s(30.0, ran_for_s=61) == 1.0


def test_generated_configuration_is_one_the_gateway_accepts(tmp_path: Path) -> None:
    token_file(tmp_path).write_text("a-token-long-enough-to-be-taken\n")
    urls = {"smollm2-1": "http://127.0.0.1:8001", "smollm2-2": "http://127.0.0.1:8002"}
    config = tmp_path / "tidegate.yaml"
    config.write_text(yaml.safe_dump(gateway_config(PORTS, urls, tmp_path)))
    settings = load(config, {})
    assert settings.models[MODEL].aliases == (ALIAS,)
    assert [replica.name for replica in settings.backends["demo"].replicas] == list(urls)
    assert settings.admin.token is not None
    assert settings.admin.token.get_secret_value() == "a-token-long-enough-to-be-taken"


async def test_together_raises_the_first_failure_itself_and_ends_the_rest() -> None:
    ended = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def fails() -> None:
        raise StartError("no")

    with pytest.raises(StartError, match="no"):
        await together([waits(), fails()])
    assert ended == [True]


async def test_child_that_ignores_sigterm_is_ended_all_the_same(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("one last word", file=sys.stderr, flush=True)
        print("ready", flush=True)
        time.sleep(600)
        """
    )
    command = [sys.executable, "-c", script]
    child = await Child.start("stubborn", command, tmp_path / "log", dict(os.environ), reports=True)
    assert await child.read_line() == "ready"
    await child.stop(grace_s=0.05)
    assert not child.running
    assert await child.ended() == "was ended by SIGKILL"
    assert child.tail() == "    one last word"


def client_answering(status: int, body: object) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: httpx2.Response(status, json=body)))


async def test_answer_is_read_with_its_tokens_and_replica() -> None:
    body = {"choices": [{"message": {"content": " It pulls. "}}], "usage": {"completion_tokens": 4}}
    async with client_answering(200, body) as client:
        answer = await ask(client, PORTS.base_url)
    assert (answer.text, answer.tokens) == ("It pulls.", 4)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_gateway_that_is_still_starting_is_asked_again(status: int) -> None:
    async with client_answering(status, {"error": "starting"}) as client:
        with pytest.raises(NotYet, match=str(status)):
            await ask(client, PORTS.base_url)


async def test_refusal_that_will_not_pass_ends_the_start() -> None:
    async with client_answering(404, {"error": {"message": "no such model"}}) as client:
        with pytest.raises(StartError, match="no such model"):
            await ask(client, PORTS.base_url)
