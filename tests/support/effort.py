"""How hard tests look that could look for ever: ``TESTS_LONG=1 make test`` takes the time, `make test` does not."""

from __future__ import annotations

import os

LONG = os.environ.get("TESTS_LONG", "") not in ("", "0")
