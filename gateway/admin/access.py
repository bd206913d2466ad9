"""Whom the admin listener knows: bearers of tokens, and who has logged in."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from functools import cached_property

from pydantic import SecretStr

from gateway.admin.sessions import Sessions
from gateway.admin.throttle import Throttle
from gateway.config.schema import Admin
from gateway.policy import Operator, Who

OWNER_NAME = "admin"
"""How the audit has always called whoever has the owner's token."""


class Access:
    """Tokens and sessions of one gateway."""

    def __init__(self, settings: Callable[[], Admin] = Admin, owner: SecretStr | None = None) -> None:
        """`settings` is first asked when somebody comes: the `admin` section, which only a restart changes."""
        self.settings = settings
        self.owner = owner
        """The owner's token. None: it is not known, and nobody has it."""
        self.sessions = Sessions(lambda: settings().session)
        self.throttle = Throttle(time.monotonic())

    @property
    def closed(self) -> bool:
        """Whether there is no token at all."""
        return not self._tokens

    def bearer(self, token: bytes) -> Operator | None:
        """Who has this token. Takes as long whichever it is, and whether it is any."""
        given, found = hashlib.sha256(token).digest(), None
        for digest, operator in self._tokens:
            if hmac.compare_digest(given, digest):
                found = operator
        return found

    @cached_property
    def _tokens(self) -> list[tuple[bytes, Operator]]:
        known = [
            (
                each.token,
                Operator(
                    f"token:{name}", Who(each.role), "token", None if each.pools is None else frozenset(each.pools)
                ),
            )
            for name, each in self.settings().tokens.items()
        ]
        if self.owner is not None:
            known.append((self.owner, Operator(OWNER_NAME, Who.OWNER, "token")))
        return [(hashlib.sha256(token.get_secret_value().encode()).digest(), operator) for token, operator in known]


def session_name(operator: Operator) -> str:
    """How somebody is called who has logged in with a token.

    >>> session_name(Operator("token:ci", Who.READER, "token"))
    'session:ci'
    """
    return f"session:{operator.name.removeprefix('token:')}"
