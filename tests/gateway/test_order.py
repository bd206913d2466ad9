"""What is read from a call, and what body is made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.ticker import Ticker
from gateway.errors import InvalidRequest, ModelNotFound
from gateway.fleet import Fleet, build_fleet
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.order import CHAT, COMPLETIONS, EMBEDDINGS, MAX_REGIONS, Call, Order, read_order
from tests.support.serving import settings_for


def fleet() -> Fleet:
    models = {
        "m": {"backend": "pool", "aliases": ["gpt-4o-mini", "org/name:tag"], "timeouts": {"total_s": 60}},
        "renamed": {"backend": "pool", "upstream_model": "org/real:one"},
    }
    return build_fleet(settings_for(["http://127.0.0.1:1"], models=models), Ticker(), 0.0)


def order(fields: dict[str, Any], path: str = CHAT, headers: list[tuple[bytes, bytes]] | None = None) -> Order:
    body = json.dumps({"model": "m", **fields}).encode()
    return read_order(Call(path, headers or [], body, 0.0), fleet(), "req_1", Principal(None, ANONYMOUS))


def refused(
    fields: dict[str, Any], path: str = CHAT, headers: list[tuple[bytes, bytes]] | None = None
) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        order(fields, path, headers)
    return caught.value


def test_the_request_is_reduced_to_what_routing_needs() -> None:
    read = order({"stream": True, "max_tokens": 7}, headers=[(b"x-tidegate-region", b"eu-west, us-east")])
    request = read.request
    assert (request.id, request.model, request.stream) == ("req_1", "m", True)
    assert (request.max_output_tokens, request.regions) == (7, ("eu-west", "us-east"))
    assert request.prompt_bytes == len(read.body.raw)


@pytest.mark.parametrize("name", ["gpt-4o-mini", "org/name:tag"])
def test_an_alias_is_resolved_for_routing_and_sent_as_the_client_wrote_it(name: str) -> None:
    read = order({"model": name})
    assert read.request.model == "m"
    assert read.route.upstream_model is None


def test_the_engines_name_replaces_the_clients() -> None:
    read = order({"model": "renamed", "x": 1})
    assert read.route.upstream_model == "org/real:one"


@pytest.mark.parametrize("model", [None, "", 7, ["m"], {"m": 1}, True])
def test_the_model_must_be_named_as_text(model: Any) -> None:
    error = refused({"model": model})
    assert (error.status, error.param, error.code) == (400, "model", "missing_model")


def test_an_unknown_model_is_not_found_and_its_name_is_cut() -> None:
    error = refused({"model": "x" * 10_000})
    assert isinstance(error, ModelNotFound)
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert len(error.message) < 400


@pytest.mark.parametrize("model", ["M", " m", "m ", "pool", "pool-0"])
def test_names_are_compared_exactly(model: str) -> None:
    assert refused({"model": model}).status == 404


@pytest.mark.parametrize(("value", "stream"), [(True, True), (False, False), (None, False)])
def test_stream_is_a_flag(value: bool | None, stream: bool) -> None:
    assert order({"stream": value}).request.stream is stream


@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_a_stream_flag_of_another_type_is_refused(value: Any) -> None:
    error = refused({"stream": value})
    assert (error.status, error.param, error.code) == (400, "stream", "invalid_type")


def test_embeddings_never_stream() -> None:
    read = order({"stream": True}, EMBEDDINGS)
    assert not read.request.stream
    assert not read.hide_usage


@pytest.mark.parametrize(
    ("fields", "hidden"),
    [
        ({}, False),
        ({"stream": True}, True),
        ({"stream": True, "stream_options": None}, True),
        ({"stream": True, "stream_options": {}}, True),
        ({"stream": True, "stream_options": {"include_usage": False}}, True),
        ({"stream": True, "stream_options": {"include_usage": True}}, False),
        ({"stream": True, "stream_options": "nonsense"}, True),
    ],
)
def test_usage_is_hidden_from_streams_that_did_not_ask(fields: dict[str, Any], hidden: bool) -> None:
    assert order(fields).hide_usage is hidden


@pytest.mark.parametrize(
    ("path", "fields", "choices"),
    [
        (CHAT, {}, 1),
        (CHAT, {"n": 3}, 3),
        (CHAT, {"n": None}, 1),
        (CHAT, {"prompt": ["a", "b"]}, 1),
        (COMPLETIONS, {"prompt": "a"}, 1),
        (COMPLETIONS, {"prompt": ["a", "b"]}, 2),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, 4),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 1),
        (COMPLETIONS, {"prompt": [[1, 2], [3]], "n": 3}, 6),
        (COMPLETIONS, {"prompt": []}, 1),
    ],
)
def test_how_many_choices_must_finish(path: str, fields: dict[str, Any], choices: int) -> None:
    assert order(fields, path).expected_choices == choices


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6, "max_tokens": 5}, 6),
        ({"max_completion_tokens": None, "max_tokens": 5}, 5),
        ({"max_completion_tokens": 1, "max_tokens": 9}, 9),
        ({"max_tokens": 9, "n_predict": 99}, 99),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 5, "n_predict": -1}, None),
    ],
)
def test_the_bound_on_output(fields: dict[str, Any], tokens: int | None) -> None:
    assert order(fields).request.max_output_tokens == tokens


@pytest.mark.parametrize("value", ["5", " 5 ", "+5", 5.0, 1e4, True, [5], {}])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict", "n", "best_of"])
def test_what_bounds_the_output_has_to_be_a_whole_number(name: str, value: Any) -> None:
    assert (refused({name: value}).param, refused({name: value}).code) == (name, "invalid_type")


@pytest.mark.parametrize("value", [0, -1])
def test_there_is_at_least_one_choice(value: int) -> None:
    assert refused({"n": value}).param == "n"


def test_completions_are_not_bounded_by_the_field_of_chat() -> None:
    read = order({"prompt": "a", "max_completion_tokens": 1}, COMPLETIONS)
    assert read.request.max_output_tokens is None


def test_two_region_headers_are_refused_since_either_could_be_the_lock() -> None:
    error = refused({}, headers=[(b"x-tidegate-region", b"eu-west"), (b"x-tidegate-region", b"us-east")])
    assert (error.status, error.param, error.code) == (400, "x-tidegate-region", "invalid_header")


def test_a_region_header_is_no_way_to_keep_the_gateway_busy() -> None:
    some = b",".join(b"r%d" % number for number in range(MAX_REGIONS))
    twice = order({}, headers=[(b"x-tidegate-region", some + b"," + some)])
    assert len(twice.request.regions) == MAX_REGIONS
    error = refused({}, headers=[(b"x-tidegate-region", some + b",another")])
    assert (error.status, error.param, error.code) == (400, "x-tidegate-region", "invalid_header")


@pytest.mark.parametrize("value", [b"", b" ", b",", b" , ,"])
def test_a_region_header_without_a_region_is_refused(value: bytes) -> None:
    error = refused({}, headers=[(b"x-tidegate-region", value)])
    assert (error.status, error.param, error.code) == (400, "x-tidegate-region", "invalid_header")


@pytest.mark.parametrize(("value", "total_s"), [(b"1", 0.001), (b"2500", 2.5), (b"86400000", 60.0), (b"0060000", 60.0)])
def test_a_deadline_shortens_the_time_and_never_lengthens_it(value: bytes, total_s: float) -> None:
    assert order({}, headers=[(b"x-tidegate-deadline-ms", value)]).total_s == total_s


@pytest.mark.parametrize(
    "value",
    [b"", b"0", b"-5", b"1.5", b"1e3", b"soon", b"86400001", b"9" * 5000, b"1_000", "٣".encode(), b" 5", b"+5"],
    ids=lambda value: repr(value[:10]),
)
def test_a_deadline_that_is_no_number_of_milliseconds_is_refused(value: bytes) -> None:
    error = refused({}, headers=[(b"x-tidegate-deadline-ms", value)])
    assert (error.status, error.param, error.code) == (400, "x-tidegate-deadline-ms", "invalid_header")


def test_only_trace_headers_go_on_to_the_engine() -> None:
    trace = [(b"traceparent", b"00-1-2-01"), (b"tracestate", b"a=1")]
    others = [
        (b"authorization", b"Bearer secret"),
        (b"cookie", b"a=1"),
        (b"x-api-key", b"secret"),
        (b"connection", b"keep-alive"),
        (b"x-request-id", b"mine"),
        (b"x-fake", b"1"),
    ]
    assert order({}, headers=[*others, *trace]).passed_on == trace
