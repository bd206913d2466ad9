"""What is wrong between the settings of a pool's scaling is said before anything is scaled."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.config.scaling_checks import check_scaling


def _said(launch: object = None, hosted: bool = False, **scaling: Any) -> list[str]:
    data = {"backends": {"pool": {"launch": launch, "hosted": hosted, "scaling": {"max": 4, **scaling}}}}
    return [f"{'.'.join(map(str, each.path[2:]))}: {each.message}" for each in check_scaling(data)]


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"min": 5}, "scaling.max: 4 is less than min"),
        ({"max_usd_per_hour": 10}, "scaling.max_usd_per_hour: has no effect"),
        (
            {"min": 3, "usd_per_hour": 4, "max_usd_per_hour": 10},
            "does not pay for the 3 replicas of min, which cost 12",
        ),
        ({"min": 0, "usd_per_hour": 12, "max_usd_per_hour": 10}, "does not pay for a single replica"),
        ({"provider": "webhook"}, "scaling.provider: webhook needs the section"),
        (
            {"provider": "command", "webhook": {"url": "http://x"}, "command": {"words": ["x"]}},
            "scaling.webhook: is not",
        ),
        ({"provider": "local"}, "local stands for servers that `tidegate fleet up` starts"),
        ({"hosted": True}, "scaling: the replicas are rented"),
    ],
)
def test_contradictions_are_named(scaling: dict[str, Any], said: str) -> None:
    found = _said(**scaling)
    assert len(found) == 1, found
    assert said in found[0]


def test_what_is_right_is_left_alone() -> None:
    assert not _said()
    assert not _said(min=2, usd_per_hour=5, max_usd_per_hour=10)
    assert not _said(launch={"model": "m"}, provider="local")
    assert not _said(provider="command", command={"words": ["x"]})
    assert not _said(min="two", max_usd_per_hour="much", provider=7)  # the schema says so
    assert not list(check_scaling({"backends": ["pool"]}))
