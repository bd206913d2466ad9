"""What an API key looks like, and what is kept of it.

`tgk_`, 43 characters that spell 256 random bits, and 6 that are a checksum over all before them. The prefix lets secret
scanners recognise a leaked key; the checksum lets them, and the gateway, drop what cannot be one without a look-up (the
form of GitHub's tokens, https://github.blog/2021-04-05-behind-githubs-new-authentication-token-formats/). The key
itself is shown once and kept nowhere: what is kept is its HMAC-SHA-256 under the server's pepper. A slow password hash
would add nothing, since 256 random bits cannot be guessed, and would hand every caller a lever on the CPU.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from zlib import crc32

PREFIX = "tgk_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""Base 62, the digit of value 0 first."""
RANDOM_LENGTH = 43
"""Enough for 256 bits: 62^43 is about 2^256.03."""
CHECKSUM_LENGTH = 6
"""Enough for 32 bits."""
KEY_LENGTH = len(PREFIX) + RANDOM_LENGTH + CHECKSUM_LENGTH

_KEY = re.compile(rb"tgk_[0-9A-Za-z]{49}")
_HIDDEN_KEY = re.compile(r"tgk_[0-9A-Za-z]{49}")
_LIKE_KEY = re.compile(r"tgk_[0-9A-Za-z]{8,}")
_VALUES = {ord(letter): value for value, letter in enumerate(ALPHABET)}


def mint() -> str:
    """A new key: 53 characters, 256 bits of the system's randomness."""
    return _key(secrets.randbits(256))


def well_formed(key: str | bytes) -> bool:
    """Whether this has the prefix, alphabet, length and checksum of a key: whether looking for it is worth anything."""
    if isinstance(key, str):
        if not key.isascii():
            return False
        key = key.encode("ascii")
    if _KEY.fullmatch(key) is None:
        return False
    value = 0
    for digit in key[-CHECKSUM_LENGTH:]:
        value = value * 62 + _VALUES[digit]
    return value == crc32(key[:-CHECKSUM_LENGTH])


def holds_key(text: str) -> bool:
    """Whether something that may be a key stands anywhere in the text, as it would after a slip of the clipboard."""
    return _HIDDEN_KEY.search(text) is not None


def hidden(text: str) -> str:
    """The text with everything taken out that begins as a key does, be it a key or the larger part of one."""
    return _LIKE_KEY.sub("tgk_...", text)


def digest(pepper: bytes, key: bytes) -> bytes:
    """What is kept of a key, and what it is looked up by: 32 bytes."""
    return hmac.digest(pepper, key, "sha256")


class Digester:
    """`digest` under one pepper, for many keys: what depends on the pepper alone (RFC 2104's inner and outer pad) is
    hashed once, which leaves less than half of the work."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, pepper: bytes) -> None:
        block = (pepper if len(pepper) <= 64 else hashlib.sha256(pepper).digest()).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def digest(self, key: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(key)
        outer.update(inner.digest())
        return outer.digest()


def new_id() -> str:
    """A new key's public name: `key_` and 16 characters, 80 random bits in base 32."""
    return "key_" + base64.b32encode(secrets.token_bytes(10)).decode("ascii").lower()


def hint(key: str) -> str:
    """The last four characters, by which a person finds a key again. They are of the checksum alone."""
    return key[-4:]


def _key(number: int) -> str:
    body = PREFIX + _base62(number, RANDOM_LENGTH)
    return body + _base62(crc32(body.encode("ascii")), CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    letters = []
    for _ in range(length):
        number, value = divmod(number, 62)
        letters.append(ALPHABET[value])
    return "".join(reversed(letters))
