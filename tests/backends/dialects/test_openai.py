"""What every API that is compatible with OpenAI's is asked for, and how its answers are taken.

The recorded answers are written after OpenAI's published schemas; each file names its source.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from backends.dialects.openai import OpenAI, models_in, usage_option
from backends.dialects.protocol import CHAT, EMBEDDINGS, Fault, Readiness, Untranslatable, Wish
from backends.side import SideChannelError
from tests.backends.dialects.asking import ABSENT, asking, ok, recorded
from tests.backends.dialects.hosted import ERRORS, JSON, STATUSES, judged


def wish(path: str = CHAT, *, stream: bool = True, fields: dict[str, Any] | None = None, **more: Any) -> Wish:
    return Wish(path, {} if fields is None else fields, "r-1", stream, **more)


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"include_obfuscation": False}, {"include_obfuscation": False, "include_usage": True}),
        ({"include_usage": True}, None),
        ({"include_usage": "yes"}, {"include_usage": True}),
        ({"include_usage": None}, {"include_usage": True}),
        ({"include_usage": 0}, {"include_usage": True}),
        ("all", None),
    ],
)
def test_a_stream_is_asked_for_its_usage_whatever_the_caller_makes_of_it(options: Any, sent: Any) -> None:
    option = usage_option(wish(fields={"stream_options": options}))
    assert (None if option is None else json.loads(option)) == sent


def test_what_is_no_stream_is_not_touched() -> None:
    assert usage_option(wish(stream=False)) is None
    assert usage_option(wish(EMBEDDINGS)) is None


def test_the_upstream_name_is_sent_and_an_adapter_is_refused() -> None:
    assert OpenAI().prepare(wish(stream=False, model="gpt-4o")).values == {"model": b'"gpt-4o"'}
    assert OpenAI().prepare(wish(stream=False)).values == {}
    with pytest.raises(Untranslatable, match="LoRA adapter"):
        OpenAI().prepare(wish(adapter="a"))


def test_the_key_is_a_bearer_token() -> None:
    assert OpenAI().head_fields("sk-1") == [("authorization", "Bearer sk-1")]
    assert OpenAI().head_fields(None) == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("insufficient_quota", Fault.CREDENTIAL),  # money in the dress of a rate limit
        ("rate_limited", Fault.OVERLOAD),
        ("invalid_key", Fault.CREDENTIAL),
        ("no_such_country", Fault.CREDENTIAL),
        ("no_access_to_model", Fault.REQUEST),
        ("no_such_model", Fault.REQUEST),
        ("overloaded", Fault.OVERLOAD),
        ("server_error", Fault.FAILURE),
    ],
)
def test_an_error_is_laid_at_the_right_door(name: str, fault: Fault) -> None:
    assert judged(OpenAI(), f"openai/{name}.json") is fault


@pytest.mark.parametrize(
    ("statuses", "fault"),
    [
        ((400, 404, 405, 413, 415, 422), Fault.REQUEST),
        ((401, 402, 403, 407), Fault.CREDENTIAL),
        ((409, 425, 429, 529), Fault.OVERLOAD),
        ((301, 408, 500, 501, 502, 503, 504, 524), Fault.FAILURE),
    ],
)
def test_a_status_without_words_is_judged_alone(statuses: tuple[int, ...], fault: Fault) -> None:
    assert {OpenAI().judge_error(status, {}) for status in statuses} == {fault}


@given(STATUSES, ERRORS)
def test_any_error_object_gets_a_verdict_and_no_rejected_caller_counts_as_failure(status: int, error: Any) -> None:
    fault = OpenAI().judge_error(status, error)
    if status in (400, 404, 413, 422):
        assert fault in (Fault.REQUEST, Fault.CREDENTIAL)
    if fault is Fault.REQUEST:
        assert 400 <= status < 500


@given(JSON)
def test_any_answer_of_any_shape_can_be_read(tree: Any) -> None:
    for card in models_in(tree):
        assert isinstance(card["id"], str)
    OpenAI().read_usage({"usage": tree})


async def test_the_probe_reads_one_model_and_nothing_else() -> None:
    async with asking({"/v1/models/gpt-4o": recorded("openai/model.json")}) as api:
        assert await OpenAI().probe(api.side, "gpt-4o") is Readiness.READY
        assert api.asked == ["GET /v1/models/gpt-4o"]


async def test_a_name_with_slashes_stays_a_path_and_stranger_characters_are_encoded() -> None:
    async with asking({}) as api:
        await OpenAI().probe(api.side, "org/model:v1 ?#")
        assert api.asked[0] == "GET /v1/models/org/model:v1%20%3F%23"


@pytest.mark.parametrize(
    ("name", "readiness"),
    [
        ("invalid_key", Readiness.UNAUTHORIZED),
        ("no_such_country", Readiness.UNAUTHORIZED),
        ("missing_scopes", Readiness.READY),
        ("rate_limited", Readiness.READY),
        ("overloaded", Readiness.NOT_READY),
    ],
)
async def test_what_the_probe_is_answered(name: str, readiness: Readiness) -> None:
    async with asking({"/v1/models/gpt-4o": recorded(f"openai/{name}.json")}) as api:
        assert await OpenAI().probe(api.side, "gpt-4o") is readiness


async def test_a_server_error_is_no_answer_to_the_probe() -> None:
    async with asking({"/v1/models/gpt-4o": recorded("openai/server_error.json")}) as api:
        with pytest.raises(SideChannelError, match="answered 500"):
            await OpenAI().probe(api.side, "gpt-4o")


async def test_a_server_without_the_model_endpoint_is_asked_for_the_list() -> None:
    replies = {"/v1/models/m": ABSENT, "/v1/models": ok({"object": "list", "data": [{"id": "m"}]})}
    async with asking(replies) as api:
        assert await OpenAI().probe(api.side, "m") is Readiness.READY
        api.replies["/v1/models"] = (401, b"{}")
        assert await OpenAI().probe(api.side, "m") is Readiness.UNAUTHORIZED
        assert (await OpenAI().probe(api.side, None)) is Readiness.UNAUTHORIZED


@pytest.mark.parametrize("status", [401, 403])
def test_a_restricted_key_is_no_bad_key(status: int) -> None:
    said = "You have insufficient permissions for this operation. Missing scopes: model.request."
    assert OpenAI().judge_error(status, {"message": said, "code": None}) is Fault.REQUEST
    assert OpenAI().judge_error(status, {"message": "Incorrect API key provided."}) is Fault.CREDENTIAL


def test_a_prompt_that_was_refused_is_no_refused_key() -> None:
    said = "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO"  # xAI
    assert OpenAI().judge_error(403, {"message": said}) is Fault.REQUEST
    assert OpenAI().judge_error(403, {"message": "Access to the chat endpoint is denied"}) is Fault.CREDENTIAL
