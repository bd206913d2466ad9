"""Azure OpenAI's v1 route. The recorded answers come from Microsoft's documentation; each file says how."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.azure import Azure
from backends.dialects.protocol import EngineInfo, Fault, Readiness
from backends.usage import Usage
from gateway.config.urls import parse_address
from tests.backends.dialects.asking import ABSENT, asking, body_of, recorded
from tests.backends.dialects.hosted import ERRORS, STATUSES, judged, relayed


def test_the_key_has_a_header_of_its_own() -> None:
    assert Azure().head_fields("k") == [("api-key", "k")]
    assert Azure().head_fields(None) == []


@pytest.mark.parametrize("host", ["res.openai.azure.com", "res.services.ai.azure.com"])
def test_both_hosts_v1_routes_are_addresses(host: str) -> None:
    for ending in ("", "/"):
        assert parse_address(f"https://{host}/openai/v1{ending}").url == f"https://{host}:443/openai"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("content_filter", Fault.REQUEST),
        ("deployment_not_found", Fault.REQUEST),
        ("unauthorized", Fault.CREDENTIAL),
        ("blocked", Fault.CREDENTIAL),
        ("throttled", Fault.OVERLOAD),
    ],
)
def test_an_error_is_laid_at_the_right_door(name: str, fault: Fault) -> None:
    assert judged(Azure(), f"azure/{name}.json") is fault


def test_a_filtered_prompt_is_the_callers_also_inside_a_stream() -> None:
    assert Azure().judge_error(500, body_of("azure/content_filter.json")["error"]) is Fault.REQUEST


@given(STATUSES, ERRORS)
def test_any_error_object_gets_a_verdict(status: int, error: Any) -> None:
    assert isinstance(Azure().judge_error(status, error), Fault)


@given(st.integers(1, 4000))
def test_annotations_of_the_filter_pass_and_are_no_content(piece_bytes: int) -> None:
    passed, reader = relayed(Azure(), "azure/stream_annotated.json", piece_bytes)
    assert passed == recorded("azure/stream_annotated.json")[1]
    assert reader.complete
    assert reader.done
    assert reader.error is None
    assert reader.usage == Usage(13, 3, 0)


def test_the_annotation_before_all_content_begins_nothing() -> None:
    _, body = recorded("azure/stream_annotated.json")
    first = body.index(b"\n\n") + 2
    assert b"prompt_filter_results" in body[:first]
    passed, reader = relayed(Azure(), "azure/stream_annotated.json", first)
    assert passed
    reader = type(reader)(hide_usage=True)
    assert reader.feed(body[:first]) == body[:first]
    assert not reader.content_started
    assert reader.usage is None


def test_only_the_usage_is_hidden_from_who_did_not_ask_for_it() -> None:
    passed, reader = relayed(Azure(), "azure/stream_annotated.json", 1 << 20, hide_usage=True)
    events = [event for event in passed.split(b"\n\n") if event]
    assert (
        len(events) == len([event for event in recorded("azure/stream_annotated.json")[1].split(b"\n\n") if event]) - 1
    )
    assert b"prompt_filter_results" in events[0]
    assert b"prompt_tokens" not in passed
    assert reader.usage is not None


@given(st.integers(1, 4000))
def test_an_answer_that_the_filter_cut_is_complete(piece_bytes: int) -> None:
    passed, reader = relayed(Azure(), "azure/stream_cut_by_filter.json", piece_bytes)
    assert passed.endswith(b"data: [DONE]\n\n")
    assert reader.complete
    assert reader.error is None


async def test_the_probe_takes_an_unknown_model_for_an_answer() -> None:
    """A deployment's name is not a model's; the list of all models would say no more, at length."""
    async with asking({"/v1/models/prod-chat": ABSENT}) as api:
        assert await Azure().probe(api.side, "prod-chat") is Readiness.READY
        assert api.asked == ["GET /v1/models/prod-chat"]


@pytest.mark.parametrize(
    ("name", "readiness"),
    [("model", Readiness.READY), ("unauthorized", Readiness.UNAUTHORIZED), ("blocked", Readiness.UNAUTHORIZED)],
)
async def test_what_the_probe_is_answered(name: str, readiness: Readiness) -> None:
    async with asking({"/v1/models/m%2F1": recorded(f"azure/{name}.json")}) as api:
        assert await Azure().probe(api.side, "m/1") is readiness


async def test_the_catalogue_is_not_taken_for_what_is_deployed() -> None:
    async with asking({"/v1/models": (200, json.dumps({"data": [{"id": "gpt-4o"}]}).encode())}) as api:
        assert await Azure().info(api.side) == EngineInfo()
        assert api.asked == []
