"""The fake engine's answers, scripts, routes and records, seen from a raw socket."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator

import pytest
import uvloop

from loadtests.behaviour import BadBehaviour, Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT, STREAM, ask, open_to, read_head, read_reply, request_bytes


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(chunks=3) as engine:
        yield engine


# -- healthy answers


async def test_chat_answers_as_openai_does(engine: FakeEngine) -> None:
    reply = await ask(engine)
    assert (reply.status, reply.complete) == (200, True)
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["object"] == "chat.completion"
    assert reply.json["model"] == "m"
    assert reply.json["choices"][0]["message"]["content"]
    assert reply.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 128
    assert 480 < len(reply.body) < 680


async def test_stream_has_role_content_finish_usage_and_done(engine: FakeEngine) -> None:
    reply = await ask(engine, STREAM)
    role, *content, finish, usage, done = reply.events
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert len(content) == len(reply.texts) == 3
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert done == "[DONE]"
    assert reply.complete


async def test_usage_event_comes_only_when_asked_for(engine: FakeEngine) -> None:
    reply = await ask(engine, {**CHAT, "stream": True})
    assert not [event for event in reply.events if "usage" in event]


async def test_content_events_have_the_size_asked_for(engine: FakeEngine) -> None:
    engine.script = Behaviour(chunks=1, chunk_bytes=300)
    event = (await ask(engine, STREAM)).body.split(b"\n\n")[1]
    assert len(event) + 2 == 300


async def test_n_choices_and_list_prompts_multiply(engine: FakeEngine) -> None:
    body = {"model": "m", "prompt": ["a", "b"], "n": 2}
    reply = await ask(engine, body, "/v1/completions")
    assert [choice["index"] for choice in reply.json["choices"]] == [0, 1, 2, 3]
    stream = await ask(engine, {**body, "stream": True}, "/v1/completions")
    finished = [e["choices"][0]["index"] for e in stream.events[:-1] if e["choices"][0]["finish_reason"]]
    assert finished == [0, 1, 2, 3]


async def test_a_list_of_token_numbers_is_one_prompt(engine: FakeEngine) -> None:
    one = await ask(engine, {"model": "m", "prompt": [1, 2, 3]}, "/v1/completions")
    two = await ask(engine, {"model": "m", "prompt": [[1, 2], [3]]}, "/v1/completions")
    assert (len(one.json["choices"]), len(two.json["choices"])) == (1, 2)


async def test_embeddings_answer_each_input(engine: FakeEngine) -> None:
    reply = await ask(engine, {"model": "m", "input": ["a", "b", "c"]}, "/v1/embeddings")
    assert [item["index"] for item in reply.json["data"]] == [0, 1, 2]


async def test_reasoning_tool_calls_and_refusal(engine: FakeEngine) -> None:
    plain = await ask(engine, {**CHAT, "fake": {"reasoning": 2, "tool_calls": 2}})
    message = plain.json["choices"][0]["message"]
    assert message["reasoning_content"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["tool_0", "tool_1"]
    assert plain.json["choices"][0]["finish_reason"] == "tool_calls"

    stream = await ask(engine, {**STREAM, "fake": {"reasoning": 2, "tool_calls": 1}})
    deltas = [e["choices"][0]["delta"] for e in stream.events[:-1] if e["choices"]]
    assert sum("reasoning_content" in delta for delta in deltas) == 2
    pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert json.loads("".join(pieces)) == {"city": "Paris"}

    refused = await ask(engine, {**CHAT, "fake": {"refusal": True}})
    assert refused.json["choices"][0]["message"]["content"] is None
    assert refused.json["choices"][0]["message"]["refusal"]


# -- which script a request gets


async def test_header_body_queue_and_script_are_understood(engine: FakeEngine) -> None:
    assert len((await ask(engine, STREAM, headers="x-fake: chunks=5; crlf\r\n")).texts) == 5
    assert len((await ask(engine, {**STREAM, "fake": {"chunks": 6}})).texts) == 6
    engine.queue.append(Behaviour(chunks=7))
    assert [len((await ask(engine, STREAM)).texts) for _ in range(2)] == [7, 3]


async def test_unknown_or_ill_typed_keys_are_refused(engine: FakeEngine) -> None:
    assert (await ask(engine, {**CHAT, "fake": {"chunk": 5}})).status == 400
    assert (await ask(engine, {**CHAT, "fake": {"chunks": "many"}})).status == 400
    with pytest.raises(BadBehaviour, match="unknown behaviour: chunk"):
        Behaviour().updated({"chunk": 5})
    assert engine.running == 0


async def test_broken_requests_get_400(engine: FakeEngine) -> None:
    reader, writer = await open_to(engine)
    writer.write(b"NONSENSE\r\n\r\n")
    assert (await read_head(reader))[0] == 400
    writer.close()
    assert (await ask(engine, body=[1, 2])).status == 400


# -- other routes


async def test_models_health_stats_and_unknown_routes(engine: FakeEngine) -> None:
    models = await ask(engine, None, "/v1/models", method="GET")
    assert [model["id"] for model in models.json["data"]] == ["fake-model"]
    assert (await ask(engine, None, "/health", method="GET")).status == 200
    assert (await ask(engine, None, "/nowhere", method="GET")).status == 404
    assert (await ask(engine, None, "/stats", method="GET")).json["served"] == 0
    assert engine.requests == []


async def test_probe_behaviour_is_its_own(engine: FakeEngine) -> None:
    engine.probe = Behaviour(status=503)
    assert (await ask(engine, None, "/health", method="GET")).status == 503
    assert (await ask(engine)).status == 200
    assert [probe.path for probe in engine.probes] == ["/health"]


async def test_abort_is_recorded(engine: FakeEngine) -> None:
    assert (await ask(engine, {"rid": "abc"}, "/abort_request")).status == 200
    assert engine.aborted_rids == ["abc"]


# -- what is recorded


async def test_requests_are_recorded_as_they_came(engine: FakeEngine) -> None:
    await ask(engine, headers="X-Mark: 1\r\nx-mark: 2\r\n")
    request = await engine.received(1)
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert [value for name, value in request.headers if name == b"x-mark"] == [b"1", b"2"]
    assert request.header("X-Mark") == "1"
    assert request.json() == CHAT
    assert request.done.is_set()
    assert not request.gone.is_set()
    assert request.closed_at is None


async def test_a_client_that_leaves_is_noticed(engine: FakeEngine) -> None:
    engine.script = Behaviour(hang=True)
    _, writer = await open_to(engine)
    writer.write(request_bytes(CHAT))
    request = await engine.received(1)
    assert engine.running == 1
    writer.close()
    await request.gone.wait()
    assert request.closed_at is not None
    assert request.completed_at is None
    assert engine.running == 0


async def test_connections_are_counted_and_reused(engine: FakeEngine) -> None:
    reader, writer = await open_to(engine)
    for _ in range(2):
        writer.write(request_bytes(CHAT))
        assert (await read_reply(reader)).complete
    writer.close()
    await ask(engine)
    assert [request.connection for request in engine.requests] == [1, 1, 2]
    assert engine.accepted == 2


async def test_pipelined_requests_are_answered_in_order(engine: FakeEngine) -> None:
    reader, writer = await open_to(engine)
    slow = {**CHAT, "model": "slow", "fake": {"delay_head_s": 0.02}}
    writer.write(request_bytes(slow) + request_bytes(CHAT))
    assert [(await read_reply(reader)).json["model"] for _ in range(2)] == ["slow", "m"]
    writer.close()


async def test_unix_socket(tmp_path_short: str) -> None:
    async with FakeEngine(uds=tmp_path_short) as engine:
        assert engine.url == "http+unix://" + tmp_path_short.replace("/", "%2F")
        assert (await ask(engine)).status == 200
        cut = await ask(engine, {**STREAM, "fake": {"cut_after": 1}})
        assert (len(cut.texts), cut.complete) == (1, False)


@pytest.fixture
def tmp_path_short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path that fits into a socket address (108 bytes)."""
    return str(tmp_path_factory.mktemp("u") / "s")


async def test_stop_and_start_keep_the_address(engine: FakeEngine) -> None:
    url = engine.url
    reader, writer = await open_to(engine)
    await engine.stop()
    assert await reader.read() == b""
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await ask(engine)
    await engine.start()
    assert engine.url == url
    assert (await ask(engine)).status == 200


# -- uvloop and the command line


def test_the_same_on_uvloop() -> None:
    async def scenario() -> None:
        async with FakeEngine(chunks=3) as engine:
            assert (await ask(engine)).complete
            assert len((await ask(engine, {**STREAM, "fake": {"split": 5, "interval_s": 0.005}})).texts) == 3
            cut = await ask(engine, {**STREAM, "fake": {"cut_after": 2}})
            assert (len(cut.texts), cut.complete) == (2, False)
            _, writer = await open_to(engine)
            writer.write(request_bytes({**STREAM, "fake": {"hang_mid": 1}}))
            request = await engine.received(4)
            writer.close()
            await request.gone.wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


@pytest.mark.parametrize("loop", [[], ["--no-uvloop"]], ids=["uvloop", "asyncio"])
async def test_command_line(loop: list[str]) -> None:
    arguments = ["-m", "loadtests.engine", "--port", "0", "--port", "0", "--chunks", "2", "--crlf", *loop]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    ready = (await process.stdout.readline()).decode().split()
    assert ready[:3] == ["fake", "engine", "ready:"]
    for url in ready[3:]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in range(2):
            writer.write(request_bytes(CHAT))
            assert (await read_reply(reader)).complete
        writer.write(request_bytes(STREAM))
        reply = await read_reply(reader)
        assert len(reply.texts) == 2
        assert b"\r\n\r\n" in reply.body
        writer.close()
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0


async def test_command_line_refuses_nonsense() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests.engine", "--chunks", "many", stderr=asyncio.subprocess.PIPE
    )
    _, message = await process.communicate()
    assert process.returncode == 2
    assert b"chunks" in message
