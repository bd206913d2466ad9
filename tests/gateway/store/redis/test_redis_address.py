"""Addresses of Redis as they are configured."""

from __future__ import annotations

import pytest

from gateway.store.redis.address import Address, parse_address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://cache", Address((("cache", 6379),))),
        ("redis://cache:7000/3", Address((("cache", 7000),), db=3)),
        ("redis://[::1]:7000", Address((("::1", 7000),))),
        ("rediss://[::1]", Address((("::1", 6379),), tls=True)),
        ("rediss://cache.example/1", Address((("cache.example", 6379),), db=1, tls=True)),
        ("redis+sentinel://a,b:2/main", Address((("a", 26379), ("b", 2)), service="main")),
        ("rediss+sentinel://a:1/main/4", Address((("a", 1),), service="main", db=4, tls=True)),
        ("unix:///run/redis.sock", Address(path="/run/redis.sock")),
        ("unix:///run/redis.sock?db=2", Address(path="/run/redis.sock", db=2)),
    ],
)
def test_an_address_is_read_and_shown(url: str, address: Address) -> None:
    assert parse_address(url) == address
    assert parse_address(address.shown) == address


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hunter2", "must look like redis://"),
        ("http://hunter2", "must look like redis://"),
        ("redis://", "has no host"),
        ("redis://:hunter2@cache", "use redis.username and redis.password"),
        ("rediss://hunter2@cache/1", "use redis.username and redis.password"),
        ("redis+sentinel://:hunter2@a,b/main", "use redis.username and redis.password"),
        ("unix://:hunter2@/run/redis.sock", "use redis.username and redis.password"),
        ("redis://cache?password=hunter2", "no parameters"),
        ("unix:///run/redis.sock?password=hunter2", "no parameter 'password'"),
        ("redis://cache#hunter2", "no fragment"),
        ("redis://cache:hunter2", "port of a Redis must be 1 to 65535"),
        ("redis://cache:0", "port of a Redis must be 1 to 65535"),
        ("redis://cache:65536", "port of a Redis must be 1 to 65535"),
        ("redis://cache:", "port of a Redis must be 1 to 65535"),
        ("redis://cache/hunter2", "whole number"),
        ("redis://cache/-1", "whole number"),
        ("redis://a,b", "several hosts need Sentinel"),
        ("redis+sentinel://a,b", "needs the name of the service"),
        ("redis+sentinel://a,/main", "has no host"),
        ("redis://[::1", "written in brackets"),
        ("redis://[::1]hunter2", "written in brackets"),
        ("unix://run/redis.sock", "absolute path"),
    ],
)
def test_a_wrong_address_is_refused_without_repeating_it(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parse_address(url)
    assert "hunter2" not in str(refused.value)
