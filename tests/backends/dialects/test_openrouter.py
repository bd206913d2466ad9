"""OpenRouter. The recorded answers come from its documentation; each file names its page."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.openrouter import OpenRouter
from backends.dialects.protocol import Fault, Readiness
from backends.usage import Usage
from gateway.config.urls import parse_address
from gateway.upstream_errors import from_stream_event
from tests.backends.dialects.asking import ABSENT, asking, ok, recorded
from tests.backends.dialects.hosted import ERRORS, STATUSES, judged, relayed


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("guardrail", Fault.REQUEST),
        ("moderation", Fault.REQUEST),
        ("region_restricted", Fault.REQUEST),
        ("insufficient_permissions", Fault.CREDENTIAL),
        ("key_limit", Fault.CREDENTIAL),
        ("insufficient_credits", Fault.CREDENTIAL),
        ("in_flight_budget", Fault.OVERLOAD),
        ("unauthorized", Fault.CREDENTIAL),
        ("timed_out", Fault.FAILURE),
        ("provider_failed", Fault.FAILURE),
        ("no_provider", Fault.OVERLOAD),
        ("provider_overloaded", Fault.OVERLOAD),
    ],
)
def test_an_error_is_laid_at_the_right_door(name: str, fault: Fault) -> None:
    assert judged(OpenRouter(), f"openrouter/{name}.json") is fault


@pytest.mark.parametrize(
    "error",
    [
        {"metadata": {"flagged_input": "x"}},
        {"metadata": {"reasons": ["hate"]}},
        {"metadata": {"patterns": []}},
        {"message": "Request blocked: sensitive information"},
        {"message": "Your input was flagged"},
    ],
)
def test_flagged_input_cannot_take_the_key_out_of_service(error: dict[str, Any]) -> None:
    assert OpenRouter().judge_error(403, error) is Fault.REQUEST


def test_words_excuse_no_refused_key() -> None:
    assert OpenRouter().judge_error(401, {"message": "Request blocked"}) is Fault.CREDENTIAL


@given(STATUSES, ERRORS)
def test_any_error_object_gets_a_verdict(status: int, error: Any) -> None:
    assert isinstance(OpenRouter().judge_error(status, error), Fault)


@given(st.integers(1, 2000))
def test_comments_pass_and_the_unasked_usage_is_read(piece_bytes: int) -> None:
    passed, reader = relayed(OpenRouter(), "openrouter/stream.json", piece_bytes)
    assert passed == recorded("openrouter/stream.json")[1]
    assert passed.startswith(b": OPENROUTER PROCESSING\n\n")
    assert reader.complete
    assert reader.usage == Usage(194, 2, 64, 100)


@given(st.integers(1, 2000))
def test_an_error_in_the_stream_is_found_though_it_has_choices(piece_bytes: int) -> None:
    passed, reader = relayed(OpenRouter(), "openrouter/stream_error.json", piece_bytes)
    assert b"Once" in passed
    assert b"error" not in passed
    assert not reader.complete
    assert reader.error is not None
    said = from_stream_event(reader.error)
    assert OpenRouter().judge_error(said.upstream_status, said.fields) is Fault.OVERLOAD


def test_a_caller_cannot_name_other_models_beside_the_one_that_was_checked() -> None:
    assert {"models", "route", "preset"} <= OpenRouter().reserved


def test_the_base_url_is_taken_as_it_is_printed() -> None:
    assert parse_address("https://openrouter.ai/api/v1").url == "https://openrouter.ai:443/api"


async def test_the_probe_asks_for_the_key_since_the_list_of_models_needs_none() -> None:
    replies = {"/v1/key": recorded("openrouter/key.json"), "/v1/models": ok({"data": []})}
    async with asking(replies) as api:
        assert await OpenRouter().probe(api.side, "openai/gpt-4o") is Readiness.READY
        assert api.asked == ["GET /v1/key"]
        api.replies["/v1/key"] = recorded("openrouter/unauthorized.json")
        assert await OpenRouter().probe(api.side, "openai/gpt-4o") is Readiness.UNAUTHORIZED
        assert api.asked == ["GET /v1/key"] * 2


async def test_a_relay_of_openrouters_api_without_the_key_endpoint_is_probed_plainly() -> None:
    async with asking({"/v1/key": ABSENT, "/v1/models": ok({"data": []})}) as api:
        assert await OpenRouter().probe(api.side, "m") is Readiness.READY
        assert api.asked == ["GET /v1/key", "GET /v1/models/m", "GET /v1/models"]


@pytest.mark.parametrize(("tokens", "fault"), [(3919, Fault.OVERLOAD), (0, Fault.CREDENTIAL)])
def test_asking_for_more_than_the_balance_is_no_empty_account(tokens: int, fault: Fault) -> None:
    said = (
        "This request requires more credits, or fewer max_tokens. You requested up to 16384 tokens, but can only "
        f"afford {tokens}. To increase, visit https://openrouter.ai/settings/credits and upgrade to a paid account"
    )
    assert OpenRouter().judge_error(402, {"message": said, "code": 402}) is fault
