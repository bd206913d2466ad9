"""S2, S3, S6: what an address may try, what a key is looked up by, and what of it is kept."""

from __future__ import annotations

import hashlib
import hmac
import inspect
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.keys import failures
from gateway.keys.directory import Directory, Freshness
from gateway.keys.failures import BURST, MAX_ADDRESSES, PER_S, FailedKeys
from gateway.keys.format import Digester, digest, mint, well_formed
from loadtests.engine import FakeEngine
from tests.gateway.admission.keyed import KEY, admitting, bearer, keyed
from tests.gateway.keys.records_of_tests import NOW, bearing, directory_of, made
from tests.support.http import ask, error_of

LOOPS = ("uvloop",)
BODY = {"model": "m", "messages": []}

VECTORS = (
    # pepper, key, HMAC-SHA-256 as RFC 4231 has it (test cases 1, 2 and 6)
    (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
    (b"Jefe", b"what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
    (
        b"\xaa" * 131,
        b"Test Using Larger Than Block-Size Key - Hash Key First",
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
    ),
)


@pytest.mark.parametrize(("pepper", "key", "expected"), VECTORS)
def test_digests_are_hmac_sha_256(pepper: bytes, key: bytes, expected: str) -> None:
    assert digest(pepper, key).hex() == expected
    assert Digester(pepper).digest(key).hex() == expected


def test_a_key_has_256_random_bits_a_prefix_and_a_checksum() -> None:
    keys = {mint() for _ in range(2000)}
    assert len(keys) == 2000
    for key in keys:
        assert key.startswith("tgk_")
        assert len(key) == 53
        assert well_formed(key)
    key = next(iter(keys))
    for at in range(4, 53):  # any other letter breaks the checksum
        other = key[:at] + ("0" if key[at] != "0" else "1") + key[at + 1 :]
        assert not well_formed(other), at


@given(st.binary(min_size=1, max_size=100), st.binary(min_size=1, max_size=100))
def test_different_credentials_have_different_digests_of_full_length(one: bytes, other: bytes) -> None:
    pepper = b"p" * 32
    assert len(digest(pepper, one)) == 32
    assert (digest(pepper, one) == digest(pepper, other)) == (one == other)


@pytest.mark.parametrize("shared", [20, 40, 49, 52])
def test_keys_that_begin_alike_are_not_each_other(shared: int) -> None:
    """CVE-2026-35030 was a cache that was keyed by the first twenty characters."""
    key, record = made()
    directory = directory_of(record)
    assert directory.authenticate(bearing(key), NOW).key_id == record.id
    for other in (mint(), key + "x", key[:-1]):
        near = key[:shared] + other[shared:]
        if near != key:
            with pytest.raises(Exception, match="API key"):
                directory.authenticate(bearing(near), NOW)


@given(st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=300))
def test_no_text_in_authorization_is_anybody(text: str) -> None:
    """S4, S6: SQL, formats, unicode: it is a digest before it meets anything, and the digest is unknown."""
    directory = Directory(b"p" * 32, freshness=Freshness.CURRENT)
    for value in (text, f"Bearer {text}", f"bearer {text}", f"Basic {text}"):
        for name in (b"authorization", b"x-api-key", b"api-key"):
            with pytest.raises(Exception, match="API key is missing"):
                directory.authenticate([(name, value.encode("latin-1"))], NOW)


def test_an_unknown_key_costs_one_digest_and_no_question() -> None:
    """A million of them: nothing is remembered, nothing but a dictionary is asked."""
    source = inspect.getsource(Directory.authenticate)
    assert "await" not in source
    directory = directory_of(made()[1])
    before = len(directory)
    for number in range(1000):
        with pytest.raises(Exception, match="API key"):
            directory.authenticate(bearing(f"tgk_{number}"), NOW)
    assert len(directory) == before


async def test_a_tenants_salt_is_a_digest_and_differs_by_tenant_and_by_what_it_says() -> None:
    directory = Directory(b"p" * 32)
    salts = [
        directory.cache_salt(*each)
        for each in (("acme", ""), ("other", ""), ("acme", "a"), ("other", "a"), ("acm", "ea"))
    ]
    assert len(set(salts)) == len(salts)
    assert directory.cache_salt("acme", "") == salts[0] == Directory(b"p" * 32).cache_salt("acme", "")
    assert salts[0] == hmac.new(b"p" * 32, b"\0cache\0acme\0", hashlib.sha256).hexdigest()[:32]
    assert Directory(b"q" * 32).cache_salt("acme", "") != salts[0]


# -- how often


def test_the_burst_passes_and_then_ten_a_second() -> None:
    failed = FailedKeys()
    assert [failed.take("a", 0.0) for _ in range(int(BURST))] == [0.0] * int(BURST)
    wait_s = failed.take("a", 0.0)
    assert 0 < wait_s <= 1 / PER_S + 0.001
    assert failed.take("b", 0.0) == 0.0
    assert failed.take("a", wait_s) == 0.0
    assert failed.take("a", wait_s) > 0
    passed = sum(failed.take("a", 1 + number / 1000) == 0 for number in range(10_000))
    assert passed <= BURST + 10 * PER_S + 1


def test_addresses_are_bounded_and_the_quietest_makes_room() -> None:
    failed = FailedKeys(burst=1)
    for number in range(3 * MAX_ADDRESSES):
        failed.take(f"10.0.{number >> 8}.{number & 255}", float(number))
        failed.take("1.2.3.4", float(number) / 1e6)
    assert len(failed) <= MAX_ADDRESSES
    assert "1.2.3.4" in failed._buckets


def test_an_ipv6_network_counts_as_one_address() -> None:
    place = failures.network_of
    assert place("2001:db8::1") == place("2001:db8::ffff:1:2") != place("2001:db8:0:1::1")
    assert place("::ffff:10.0.0.1") == "10.0.0.1"
    assert place("fe80::1%eth0") == place("fe80::2")
    assert place("nonsense:") == "nonsense:"


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_guessers_are_told_so_and_valid_keys_are_served_all_the_same(tmp_path: Path, edge: str) -> None:
    async with FakeEngine() as engine, admitting(keyed(tmp_path, [engine.url], edge=edge)) as gateway:
        gateway.runtime.gate._failed_keys = FailedKeys(per_s=0.001, burst=5)
        replies = [await ask(gateway, BODY, "/v1/chat/completions", bearer(mint())) for _ in range(8)]
        assert [reply.status for reply in replies] == [401] * 5 + [429] * 3
        refused = replies[-1]
        assert error_of(refused.body)["code"] == "too_many_failed_keys"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["x-should-retry"] == "false"
        assert (await ask(gateway, BODY, "/v1/chat/completions", bearer(KEY))).status == 200
        assert (await ask(gateway, BODY, "/v1/chat/completions")).status == 429
        assert json.loads(replies[0].body)["error"]["code"] == "invalid_api_key"
