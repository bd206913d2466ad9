"""The API on the wire: the shapes of errors, the request id, and what reaches the engine."""

from __future__ import annotations

import httpx2
import pytest
from openai.types.chat import ChatCompletionMessageParam

from gateway.order import CHAT, COMPLETIONS, EMBEDDINGS
from loadtests.behaviour import Behaviour
from tests.support.http import ask, error_of
from tests.support.sdk import sdk

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


# The shapes of errors.


@EDGES
@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", CHAT, b"nonsense", 400, "invalid_json"),
        ("POST", CHAT, b"", 400, "invalid_json"),
        ("POST", CHAT, b"[]", 400, "invalid_json"),
        ("POST", CHAT, b'{"model":"m","model":"m"}', 400, "duplicate_key"),
        ("POST", CHAT, b"{}", 400, "missing_model"),
        ("POST", CHAT, b'{"model":"x"}', 404, "model_not_found"),
        ("POST", EMBEDDINGS, b'{"model":"x"}', 404, "model_not_found"),
        ("POST", CHAT, b'{"model":"%b"}' % (b"m" * 3000), 413, "request_too_large"),
        ("POST", COMPLETIONS, b'{"model":"m","stream":1}', 400, "invalid_type"),
        ("GET", CHAT, None, 405, "method_not_allowed"),
        ("PUT", EMBEDDINGS, b"{}", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", None, 405, "method_not_allowed"),
        ("POST", "/livez", b"{}", 405, "method_not_allowed"),
        ("GET", "/", None, 404, "unknown_url"),
        ("GET", "/v1", None, 404, "unknown_url"),
        ("POST", "/v1/responses", b"{}", 404, "unknown_url"),
        ("POST", "/v1/chat/completions/", b"{}", 404, "unknown_url"),
        ("POST", "/v1//chat/completions", b"{}", 404, "unknown_url"),
        ("GET", "/livez/", None, 404, "unknown_url"),
        ("GET", "/metrics", None, 404, "unknown_url"),
        ("GET", "/admin/fleet", None, 404, "unknown_url"),
        ("GET", "/v1/models/nope", None, 404, "model_not_found"),
    ],
)
async def test_every_error_has_openais_shape_and_a_request_id(
    edge: str, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    async with sdk(edge, server={"max_body_bytes": 2048}) as (_, engine, gateway):
        async with httpx2.AsyncClient(trust_env=False) as client:
            reply = await client.request(method, gateway.url + path, content=body)
        assert engine.requests == []
    error = error_of(reply.content)
    assert (reply.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("req_")
    assert ("allow" in reply.headers) == (status == 405)


@EDGES
async def test_every_reply_has_a_request_id_of_its_own(edge: str) -> None:
    async with sdk(edge) as (_, _, gateway), httpx2.AsyncClient(trust_env=False, base_url=gateway.url) as client:
        body = {"model": "m", "messages": MESSAGES}
        mine = {"x-request-id": "chosen-by-the-client"}
        replies = [
            await client.get("/livez", headers=mine),
            await client.get("/readyz", headers=mine),
            await client.get("/v1/models", headers=mine),
            await client.get("/v1/models/m", headers=mine),
            await client.get("/nowhere", headers=mine),
            await client.post(CHAT, json=body, headers=mine),
            await client.post(CHAT, json={**body, "stream": True}, headers=mine),
            await client.post(CHAT, json={}, headers=mine),
        ]
    ids = [reply.headers.get_list("x-request-id") for reply in replies]
    assert all(len(each) == 1 and each[0].startswith("req_") for each in ids)
    assert len({each[0] for each in ids}) == len(replies)


@EDGES
async def test_liveness_and_readiness(edge: str) -> None:
    async with sdk(edge) as (_, _, gateway), httpx2.AsyncClient(trust_env=False, base_url=gateway.url) as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        (replica,) = gateway.runtime.fleet.pools["pool"].replicas
        replica.cooldown.until, replica.cooldown.failures = float("inf"), 1
        assert (await client.get("/readyz")).status_code == 200  # one lost connection is no reason to turn away
        replica.cooldown.failures = 2
        unready = await client.get("/readyz")
        replica.cooldown.succeeded()
        assert (await client.get("/readyz")).status_code == 200
        gateway.runtime.draining = True
        draining = await client.get("/readyz")
        assert (await client.get("/livez")).status_code == 200
        gateway.runtime.draining = False
    assert (unready.status_code, unready.json()["pools_without_replica"]) == (503, ["pool"])
    assert draining.status_code == 503


# What reaches the engine.


@EDGES
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
async def test_where_nothing_must_change_the_engine_gets_the_very_same_bytes(edge: str, path: str) -> None:
    raw = (
        b' {\r\n "model" : "gpt-4o-mini",\t"temperature":0.70, "seed":18446744073709551617,"x-unknown":{"a":[1,2.50,'
        b'"\\u00e4"],"a":1},\n"user":"Gr\xc3\xbc\xc3\x9fe \\/ \\ud83d\\ude00" , "stop":null} \n'
    )
    async with sdk(edge) as (_, engine, gateway):
        reply = await ask(gateway, raw, path)
        assert reply.status == 200
        assert engine.requests[0].body == raw
        assert engine.requests[0].path == path


@EDGES
async def test_only_the_spliced_values_change(edge: str) -> None:
    raw = b'{ "model" : "renamed" , "unknown":1.50, "stream_options": {"a" : 1}, "stream": true }'
    async with sdk(edge, backend={"engine": "sglang"}) as (_, engine, gateway):
        reply = await ask(gateway, raw)
        (record,) = await gateway.settled()
        assert engine.requests[0].body == (
            b'{"rid":"%b", "model" : "org/real" , "unknown":1.50, '
            b'"stream_options": {"a":1,"include_usage":true}, "stream": true }' % record.request_id.encode()
        )
    assert reply.complete
    assert record.model == "renamed"


@EDGES
async def test_an_alias_reaches_the_engine_as_the_client_wrote_it_and_is_recorded_as_its_model(edge: str) -> None:
    async with sdk(edge) as (client, engine, gateway):
        await client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
        (record,) = await gateway.settled()
        assert engine.requests[0].json()["model"] == "gpt-4o-mini"
    assert record.model == "m"


@EDGES
async def test_no_credential_and_no_hop_by_hop_header_reaches_the_engine(edge: str) -> None:
    async with sdk(edge) as (client, engine, _):
        await client.chat.completions.create(
            model="m",
            messages=MESSAGES,
            extra_headers={
                "cookie": "session=1",
                "x-api-key": "secret",
                "openai-organization": "org",
                "te": "trailers",
                "x-forwarded-for": "1.2.3.4",
                "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            },
        )
        names = {name for name, _ in engine.requests[0].headers}
    assert names == {
        b"host",
        b"user-agent",
        b"accept-encoding",
        b"content-type",
        b"content-length",
        b"x-request-id",
        b"traceparent",
    }


@EDGES
async def test_no_header_of_the_engine_reaches_the_client_but_the_content_type(edge: str) -> None:
    head = (
        "HTTP/1.1 200 OK\r\ncontent-type: application/json; charset=utf-8\r\nset-cookie: a=1\r\nserver: fake\r\n"
        "x-powered-by: fake\r\nkeep-alive: timeout=5\r\nx-request-id: theirs\r\ncontent-length: 2\r\n\r\n{}"
    )
    async with sdk(edge, Behaviour(raw=head)) as (_, _, gateway):
        reply = await ask(gateway, {"model": "m"})
    assert reply.body == b"{}"
    assert reply.headers["content-type"] == "application/json; charset=utf-8"
    assert reply.headers["x-request-id"] != "theirs"
    assert not {"set-cookie", "x-powered-by", "keep-alive"} & reply.headers.keys()
    assert "fake" not in reply.headers.values()


@EDGES
async def test_the_gateways_own_key_is_sent_and_the_clients_is_not(edge: str) -> None:
    async with sdk(edge, backend={"api_key": "sk-upstream"}) as (client, engine, _):
        await client.chat.completions.create(model="m", messages=MESSAGES)
        assert engine.requests[0].header("authorization") == "Bearer sk-upstream"


@EDGES
async def test_tokens_and_cost_are_recorded(edge: str) -> None:
    models = {"m": {"backend": "pool", "price": {"input": 2.0, "cached_input": 0.5, "output": 8.0}}}
    async with sdk(edge, models=models) as (client, _, gateway):
        await client.chat.completions.create(model="m", messages=MESSAGES)
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        async for _ in stream:
            pass
        records = await gateway.settled(2)
    cost_usd = (128 * 2.0 + 128 * 0.5 + 16 * 8.0) / 1e6
    assert [each.cost_usd for each in records] == [pytest.approx(cost_usd)] * 2
    assert records[0].ttft_s is None  # a whole answer has no first token that could be seen
    assert records[1].ttft_s is not None
    assert 0 < records[1].ttft_s <= records[1].duration_s
    for each in records:
        assert each.dispatched_at is not None
        assert (each.pool, each.replica, each.attempts, each.status) == ("pool", "pool-0", 1, 200)
        assert each.request_bytes > 0
        assert each.response_bytes > 0
