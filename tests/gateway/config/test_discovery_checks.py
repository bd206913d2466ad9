"""What is wrong with discovery beyond single settings; the rest is in test_problems."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gateway.config.discovery import Dns
from gateway.config.discovery_checks import check_discovery


def test_kubernetes_without_its_library_is_told_before_anything_starts() -> None:
    pool = {
        "discovery": {"kubernetes": {"service": "s"}},
        "scaling": {"max": 2, "provider": "kubernetes", "kubernetes": {"name": "s"}},
    }
    data = {"backends": {"pool": pool}}
    missing = list(check_discovery(data, lambda name: None))
    assert [each.path for each in missing] == [
        ("backends", "pool", "discovery", "kubernetes"),
        ("backends", "pool", "scaling", "kubernetes"),
    ]
    assert "tidegate[kubernetes]" in missing[0].hint
    assert list(check_discovery(data, lambda name: name)) == []


def test_name_servers_are_named_by_their_addresses() -> None:
    dns = {"name": "x.org", "record": "srv", "servers": ["10.0.0.53", "ns.x.org", "::1"]}
    (problem,) = check_discovery({"backends": {"pool": {"discovery": {"dns": dns}}}})
    assert problem.path == ("backends", "pool", "discovery", "dns", "servers", 1)


@pytest.mark.parametrize("name", ["pods.models.svc.cluster.local.", "x.", "_sglang._tcp.models.test.", "x.org"])
def test_a_name_to_look_up_may_be_absolute(name: str) -> None:
    assert Dns(name=name, port=1).name == name


@pytest.mark.parametrize("name", [".", "x..", ".x.", "10.0.0.1.", "::1.", "a b.", "fe80::1."])
def test_a_dot_does_not_make_a_name(name: str) -> None:
    with pytest.raises(ValidationError, match="host"):
        Dns(name=name, port=1)
