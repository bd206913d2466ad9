"""Records for the tests of the database."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from gateway.keys.format import new_id
from gateway.keys.records import KeyRecord


def key(**fields: Any) -> KeyRecord:
    """A key that may be stored, with these fields."""
    return msgspec.structs.replace(KeyRecord(new_id(), os.urandom(32), "acme"), **fields)
