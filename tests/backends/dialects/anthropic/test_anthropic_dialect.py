"""How Anthropic is addressed, probed and understood when it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from backends.dialects.anthropic import API_VERSION, Anthropic
from backends.dialects.protocol import Fault, NotOffered, Readiness
from backends.side import SideChannel
from tests.backends.dialects.anthropic.server import KEY, FakeAnthropic, fake_anthropic
from tests.backends.dialects.anthropic.talking import MODEL, USER, body_of, dialect


@asynccontextmanager
async def beside(key: str = KEY) -> AsyncIterator[tuple[FakeAnthropic, SideChannel]]:
    async with fake_anthropic() as fake:
        side = SideChannel(origin=fake.url, headers=dialect().head_fields(key))
        try:
            yield fake, side
        finally:
            await side.aclose()


def test_the_key_and_the_version_are_sent() -> None:
    assert dialect().head_fields("k") == [("x-api-key", "k"), ("anthropic-version", API_VERSION)]
    assert dialect().head_fields(None) == [("anthropic-version", API_VERSION)]
    assert dialect().hosted


async def test_the_probe_reads_the_model_and_generates_nothing() -> None:
    async with beside() as (fake, side):
        assert await dialect().probe(side, MODEL) is Readiness.READY
        assert fake.paths == [f"/v1/models/{MODEL}"]
        assert fake.requests == []


async def test_the_probe_sees_a_refused_key() -> None:
    async with beside("wrong") as (_, side):
        assert await dialect().probe(side, MODEL) is Readiness.UNAUTHORIZED


async def test_the_models_are_listed_on_one_page() -> None:
    async with beside() as (fake, side):
        assert (await dialect().info(side)).models == (MODEL,)
        assert fake.paths == ["/v1/models?limit=1000"]
        with pytest.raises(NotOffered):
            await dialect().load(side, None)


CREDIT = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade."
LIMITS = "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."
WORKSPACE = "You have reached your specified workspace API usage limits. You will regain access on 2026-12-01."
QUOTED = "thinking: Input tag 'credit balance is too low' found using 'type' does not match any of the expected tags"
FAULTS: list[tuple[int, dict[str, Any], Fault]] = [
    (400, {"type": "invalid_request_error", "message": "max_tokens: too large"}, Fault.REQUEST),
    (400, {"type": "invalid_request_error", "message": CREDIT}, Fault.CREDENTIAL),
    (400, {"type": "invalid_request_error", "message": LIMITS}, Fault.CREDENTIAL),
    (400, {"type": "invalid_request_error", "message": WORKSPACE}, Fault.CREDENTIAL),
    (400, {"type": "invalid_request_error", "message": QUOTED}, Fault.REQUEST),  # a caller's own words
    (400, {"type": "invalid_request_error", "message": None}, Fault.REQUEST),
    (400, {"message": "no", "details": {"error_code": "organization_on_hold"}}, Fault.CREDENTIAL),
    (400, {"message": "no", "details": {"error_code": ["x"]}}, Fault.REQUEST),
    (401, {"type": "authentication_error", "message": "no"}, Fault.CREDENTIAL),
    (402, {"type": "billing_error", "message": "no"}, Fault.CREDENTIAL),
    (403, {"type": "permission_error", "message": "no"}, Fault.CREDENTIAL),
    (404, {"type": "not_found_error", "message": "model: x"}, Fault.REQUEST),
    (413, {"type": "request_too_large", "message": "no"}, Fault.REQUEST),
    (429, {"type": "rate_limit_error", "message": "no"}, Fault.OVERLOAD),
    (429, {"message": "no", "details": {"error_code": "enforced_spend_limit_reached"}}, Fault.CREDENTIAL),
    (500, {"type": "api_error", "message": "no"}, Fault.FAILURE),
    (504, {"type": "timeout_error", "message": "no"}, Fault.FAILURE),
    (529, {"type": "overloaded_error", "message": "Overloaded"}, Fault.OVERLOAD),
]


@pytest.mark.parametrize(("status", "error", "fault"), FAULTS)
def test_whose_fault_an_error_is(status: int, error: dict[str, Any], fault: Fault) -> None:
    assert dialect().judge_error(status, error) is fault


def test_the_limit_for_callers_who_name_none_can_be_set() -> None:
    assert body_of({"messages": [USER]})["max_tokens"] == 32_000
    assert Anthropic(default_max_tokens=7)._default_max_tokens == 7
