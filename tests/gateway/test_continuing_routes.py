"""Which routes go on with an answer that breaks off: all of a model that says so, by whatever name and wherever."""

from __future__ import annotations

from typing import Any

import pytest

from backends.ticker import Ticker
from gateway.config import Settings
from gateway.elsewhere import route_at
from gateway.fleet import build_fleet


def settings(**model: Any) -> Settings:
    pool = {"engine": "sglang", "replicas": [{"url": "http://127.0.0.1:1"}]}
    data: dict[str, Any] = {
        "models": {"m": {"backend": "pool", "aliases": ["also"], **model}},
        "backends": {"pool": {**pool, "adapters": [{"name": "tone", "path": "/tone"}]}, "other": pool},
    }
    return Settings(**data)


@pytest.mark.parametrize("name", ["m", "also", "m:tone", "tone"])
@pytest.mark.parametrize(("model", "continues"), [({}, False), ({"continuation": True}, True)])
async def test_every_name_of_a_model_goes_on_or_none_does(name: str, model: dict[str, Any], continues: bool) -> None:
    route = build_fleet(settings(**model), Ticker(), 0.0).route(name)
    assert route is not None
    assert route.continues is continues


async def test_a_route_led_to_another_pool_goes_on_too() -> None:
    given = settings(continuation=True)
    fleet = build_fleet(given, Ticker(), 0.0)
    assert route_at(fleet.models["m"], fleet.pools["other"], given, None, None, None).continues
