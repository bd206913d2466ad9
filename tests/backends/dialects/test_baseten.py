"""Baseten. The recorded answers are written after docs.baseten.co; each file names its page."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from backends.dialects.baseten import Baseten
from backends.dialects.protocol import Fault, NotOffered, Readiness
from backends.side import SideChannel
from gateway.config.urls import parse_address
from tests.backends.dialects.asking import asking, recorded
from tests.backends.dialects.hosted import ERRORS, STATUSES, judged

DEDICATED = [
    ("https://model-abcd1234.api.baseten.co/environments/production/sync/v1", "/environments/production/sync"),
    ("https://model-abcd1234.api.baseten.co/deployment/wxyz789/sync/v1", "/deployment/wxyz789/sync"),
    ("https://model-abcd1234.api.baseten.co/development/sync/v1", "/development/sync"),
    ("https://model-abcd1234-eu-prod.api.baseten.co/sync/v1", "/sync"),
]


@pytest.mark.parametrize(("url", "prefix"), DEDICATED)
def test_the_forms_of_a_deployments_url_are_addresses(url: str, prefix: str) -> None:
    assert parse_address(url).path_prefix == prefix


@pytest.mark.parametrize(("url", "prefix"), DEDICATED)
async def test_a_deployment_is_never_asked_aside_for_that_would_start_it(url: str, prefix: str) -> None:
    address = parse_address(url)
    side = SideChannel(origin=address.origin, path_prefix=prefix)
    try:
        with pytest.raises(NotOffered, match="sleeps"):
            await Baseten().probe(side, "m")
        with pytest.raises(NotOffered, match="sleeps"):
            await Baseten().info(side)
        for question in (Baseten().load(side, None), Baseten().adapters(side)):
            with pytest.raises(NotOffered):
                await question
    finally:
        await side.aclose()


async def test_model_apis_are_probed_like_openai() -> None:
    async with asking({"/v1/models": recorded("baseten/models.json")}) as api:
        assert await Baseten().probe(api.side, "zai-org/GLM-4.7") is Readiness.READY
        assert (await Baseten().info(api.side)).models == ("openai/gpt-oss-120b", "zai-org/GLM-4.7")
        api.replies["/v1/models"] = recorded("baseten/unauthorized.json")
        assert await Baseten().probe(api.side, None) is Readiness.UNAUTHORIZED
        api.replies["/v1/models"] = recorded("baseten/billing.json")
        assert await Baseten().probe(api.side, None) is Readiness.UNAUTHORIZED


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("unauthorized", Fault.CREDENTIAL),
        ("billing", Fault.CREDENTIAL),
        ("wrong_model", Fault.REQUEST),
        ("too_many", Fault.OVERLOAD),
        ("not_yet", Fault.OVERLOAD),
        ("crashed", Fault.FAILURE),
        ("timed_out", Fault.FAILURE),
    ],
)
def test_an_error_is_laid_at_the_right_door(name: str, fault: Fault) -> None:
    assert judged(Baseten(), f"baseten/{name}.json") is fault


@given(STATUSES, ERRORS)
def test_any_error_object_gets_a_verdict(status: int, error: Any) -> None:
    assert isinstance(Baseten().judge_error(status, error), Fault)
