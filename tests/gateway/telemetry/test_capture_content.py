"""Texts of requests and answers: in the traces of keys that ask for it, and nowhere else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry.content import MAX_CHOICES, Captured
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from tests.support.command import serve_process
from tests.support.keyed_command import ENVIRON, ask, command, http
from tests.support.otlp import Collector, attributes

LIMIT = 4096


def captured(asked: dict[str, Any], limit: int = LIMIT) -> Captured:
    return Captured(asked, limit)


def event(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": index, "delta": delta, "finish_reason": finish}]}).encode()


async def test_only_keys_that_ask_for_it_have_their_texts_kept_and_only_in_their_traces(
    tmp_path: Path, collector: Collector
) -> None:
    log = tmp_path / "usage.jsonl"
    answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "canary-answer"}}]}
    body = json.dumps(answer)
    raw = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    sections: dict[str, Any] = {
        "auth": "keys",
        "database": f"sqlite:///{tmp_path}/tidegate.db",
        "keys": {
            "static": [
                {"name": "open", "key": {"env": "STATIC_KEY"}, "capture_content": True},
                {"name": "closed", "key": {"env": "OTHER_KEY"}},
            ]
        },
        "telemetry": {"endpoint": collector.url, "ratio": 1.0, "metrics": True},
        "usage_log": {"path": str(log)},
    }
    environ = {**ENVIRON, "OTHER_KEY": "tgk-another-key-of-sufficient-length", "OTEL_BSP_SCHEDULE_DELAY": "30"}
    async with (
        FakeEngine(Behaviour(raw=raw)) as engine,
        http() as client,
        serve_process(tmp_path, [engine.url], "--log-level", "debug", environ=environ, **sections) as gateway,
    ):
        url = await gateway.url()
        made = await command(gateway, "keys", "create", "--tenant", "acme", "--capture-content")
        plain = await command(gateway, "keys", "create", "--tenant", "acme")
        assert (made["capture_content"], plain["capture_content"]) == (True, False)
        keys = [environ["STATIC_KEY"], environ["OTHER_KEY"], made["key"], plain["key"]]

        async def said(key: str, word: str) -> None:
            async with asyncio.timeout(20.0):
                while (await ask(client, url, key, messages=[{"role": "user", "content": word}])).status_code == 401:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

        for number, key in enumerate(keys):
            await said(key, f"canary-prompt-{number}")
        changed = await command(gateway, "keys", "update", made["id"], "--no-capture-content")
        assert changed["capture_content"] is False
        engine.script = Behaviour(chunks=3)
        assert (await ask(client, url, keys[0], stream=True)).status_code == 200
        await collector.until(lambda: len([1 for each in collector.spans if each.name.startswith("POST")]) >= 5)
        gateway.signal(15)
        await gateway.ended()
    texts_are_where_they_belong(collector, made["id"])
    assert "canary-" not in "\n".join(gateway.log) + log.read_text()


def texts_are_where_they_belong(collector: Collector, made: str) -> None:
    found = [attributes(each) for each in collector.spans if each.name.startswith("POST")]
    (streamed,) = [each for each in found if each["gen_ai.request.stream"]]
    (message,) = json.loads(streamed["gen_ai.output.messages"])
    assert message["finish_reason"] == "stop"
    assert message["parts"][0]["content"]
    sent = {each["tidegate.key.id"]: each for each in found if each is not streamed}
    kept = {
        id: json.loads(found["gen_ai.input.messages"]) for id, found in sent.items() if "gen_ai.input.messages" in found
    }
    assert kept == {
        id: [{"role": "user", "parts": [{"type": "text", "content": f"canary-prompt-{number}"}]}]
        for id, number in (("static:open", 0), (made, 2))
    }
    said_back = json.loads(sent["static:open"]["gen_ai.output.messages"])
    assert said_back == [
        {"role": "assistant", "parts": [{"type": "text", "content": "canary-answer"}], "finish_reason": "stop"}
    ]
    bodies = b"".join(collector.bodies)
    for number in (1, 3):
        assert b"canary-prompt-%d" % number not in bodies
    assert bodies.count(b"canary-answer") == 2


def test_a_streams_pieces_become_one_answer() -> None:
    found = captured({"messages": [{"role": "user", "content": "hi"}]})
    for delta in ({"role": "assistant"}, {"reasoning_content": "hm"}, {"content": "one "}, {"content": "two"}):
        found.add_events(event(delta) + b"\n\n")
    found.add_events(b": ping\n\n" + event({}, "stop") + b"\r\n\r\ndata: [DONE]\n\n")
    assert json.loads(found.answer()) == [
        {
            "role": "assistant",
            "parts": [{"type": "reasoning", "content": "hm"}, {"type": "text", "content": "one two"}],
            "finish_reason": "stop",
        }
    ]
    assert not found.truncated


def test_tool_calls_and_several_choices_are_kept() -> None:
    found = captured({"prompt": "x"})
    call = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a"'}}
    found.add_events(event({"tool_calls": [call]}) + b"\n\n")
    found.add_events(event({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}, "tool_calls") + b"\n\n")
    found.add_events(event({"content": "b"}, "stop", 1) + b"\n\n")
    first, second = json.loads(found.answer())
    assert first["parts"] == [{"type": "tool_call", "id": "c1", "name": "f", "arguments": '{"a":1}'}]
    assert second["parts"] == [{"type": "text", "content": "b"}]


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"prompt": "x"}, [{"type": "text", "content": "x"}]),
        ({"input": ["x"]}, [{"type": "text", "content": "x"}]),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "x"},
                            {"type": "image_url", "image_url": {"url": "data:secret"}},
                        ],
                    }
                ]
            },
            [{"type": "text", "content": "x"}, {"type": "image_url"}],
        ),
        ({"messages": [{"role": "user", "content": None}]}, []),
    ],
)
def test_prompts_of_all_forms_are_messages_and_pictures_are_only_named(asked: Any, parts: Any) -> None:
    assert json.loads(captured(asked).prompt) == [{"role": "user", "parts": parts}]


@pytest.mark.parametrize("asked", [{}, {"messages": "x"}, {"messages": [1, None]}, {"input": [[1, 2]]}, {"prompt": 5}])
def test_what_makes_no_sense_is_kept_as_nothing(asked: dict[str, Any]) -> None:
    found = captured(asked)
    assert "x" not in found.prompt
    for piece in (b"data: 1\n\n", b"data: {\n\n", b'data: {"choices": [1, {"delta": 3}]}\n\n', b""):
        found.add_events(piece)
    found.add_whole(b"[]")


def test_both_sides_are_bounded_and_what_is_cut_is_said_to_be() -> None:
    found = captured({"messages": [{"role": "user", "content": "ä" * 100_000}] * 50}, 1000)
    assert len(found.prompt.encode()) < 2000
    assert found.truncated
    found = captured({"messages": []}, 1000)
    assert not found.truncated
    for index in range(100):
        found.add_events(event({"content": "z" * 100}, None, index % 50) + b"\n\n")
    assert found.answer().count("z") == 1000
    assert len(json.loads(found.answer())) <= MAX_CHOICES
    assert found.truncated


def test_half_a_character_is_not_kept() -> None:
    found = captured({"prompt": "aä"}, 2)
    assert json.loads(found.prompt)[0]["parts"][0]["content"] == "a"
