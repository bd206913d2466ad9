"""Keys: their form, their checksum, what is kept of them."""

from __future__ import annotations

import hashlib
import hmac
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.keys import format as key_format

# Computed apart from the program, with Python's zlib.crc32 and a base-62 conversion by hand.
VECTORS = {
    0: "tgk_0000000000000000000000000000000000000000000",
    61: "tgk_000000000000000000000000000000000000000000z",
    62: "tgk_0000000000000000000000000000000000000000010",
}


@pytest.mark.parametrize(("number", "body"), VECTORS.items())
def test_key_spells_its_number_in_base_62(number: int, body: str) -> None:
    assert key_format._key(number)[:-6] == body


def test_vectors() -> None:
    assert key_format._key(0) == "tgk_00000000000000000000000000000000000000000000isq8Z"
    assert key_format._key(2**256 - 1) == "tgk_yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp12YzJqd"
    known = hmac.new(b"pepper", b"tgk_key", hashlib.sha256).digest()
    assert key_format.digest(b"pepper", b"tgk_key") == known
    assert key_format.Digester(b"pepper").digest(b"tgk_key") == known
    # RFC 4231, test case 2
    assert key_format.digest(b"Jefe", b"what do ya want for nothing?").hex() == (
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )


def test_minted_keys_are_well_formed_and_different() -> None:
    keys = {key_format.mint() for _ in range(500)}
    assert len(keys) == 500
    for key in keys:
        assert re.fullmatch(r"tgk_[0-9A-Za-z]{49}", key)
        assert key_format.well_formed(key)
        assert key_format.well_formed(key.encode())
        assert key_format.hint(key) == key[-4:]
        assert key_format.holds_key(f"see {key}.")


@given(position=st.integers(4, 52), letter=st.sampled_from(key_format.ALPHABET))
def test_one_wrong_letter_is_noticed(position: int, letter: str) -> None:
    key = key_format._key(2**255 + 12345)
    changed = key[:position] + letter + key[position + 1 :]
    assert key_format.well_formed(changed) == (changed == key)


@given(st.one_of(st.text(), st.binary()))
def test_nothing_else_is_well_formed(text: str | bytes) -> None:
    assert not key_format.well_formed(text)


def test_lengths_and_line_ends_count() -> None:
    key = key_format.mint()
    for wrong in (key + "\n", key + "0", key[:-1], key.upper(), " " + key, key.replace("tgk_", "tgk-")):
        assert not key_format.well_formed(wrong)


def test_ids_have_their_form() -> None:
    ids = {key_format.new_id() for _ in range(500)}
    assert len(ids) == 500
    assert all(re.fullmatch(r"key_[a-z2-7]{16}", id) for id in ids)


@given(st.binary(max_size=200), st.lists(st.binary(max_size=200), max_size=3))
def test_a_digester_makes_the_same_digests_again_and_again(pepper: bytes, keys: list[bytes]) -> None:
    digester = key_format.Digester(pepper)
    for key in keys:
        assert digester.digest(key) == key_format.digest(pepper, key)
