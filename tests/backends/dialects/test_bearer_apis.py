"""APIs that need no dialect: Together, Fireworks, Groq, a HolySheep-like relay. Engine `openai`, a key, an address."""

from __future__ import annotations

import pytest

from backends.dialects.openai import OpenAI
from backends.dialects.protocol import Readiness
from gateway.config.urls import parse_address
from tests.backends.dialects.asking import ABSENT, asking, ok, recorded


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("https://api.together.xyz/v1", "https://api.together.xyz:443"),
        ("https://api.fireworks.ai/inference/v1", "https://api.fireworks.ai:443/inference"),
        ("https://api.groq.com/openai/v1", "https://api.groq.com:443/openai"),
        ("https://api.holysheep.ai/v1", "https://api.holysheep.ai:443"),
    ],
)
def test_the_base_urls_that_providers_print_are_taken_as_they_are(base: str, kept: str) -> None:
    assert parse_address(base).url == kept


async def test_a_bare_list_of_models_is_read_like_a_wrapped_one() -> None:
    async with asking({"/v1/models": recorded("bearer_apis/together_models.json")}) as api:
        info = await OpenAI().info(api.side)
        assert info.models == ("meta-llama/Llama-3.3-70B-Instruct-Turbo",)
        api.replies["/v1/models"] = ok({"data": [{"id": "m"}, {"name": "no id"}, 7]})
        assert (await OpenAI().info(api.side)).models == ("m",)


async def test_the_probe_of_an_api_with_a_list_only_ends_at_the_list() -> None:
    async with asking({"/v1/models": recorded("bearer_apis/together_models.json")}) as api:
        assert await OpenAI().probe(api.side, "meta-llama/Llama-3.3-70B-Instruct-Turbo") is Readiness.READY
        assert api.asked == ["GET /v1/models/meta-llama/Llama-3.3-70B-Instruct-Turbo", "GET /v1/models"]


async def test_an_api_without_any_list_is_there_all_the_same() -> None:
    async with asking({"/v1/models": ABSENT}) as api:
        assert await OpenAI().probe(api.side, "m") is Readiness.READY
        assert (await OpenAI().info(api.side)).models == ()
