"""What is wrong with discovery beyond single settings; the rest is in test_problems."""

from __future__ import annotations

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
