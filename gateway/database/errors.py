"""What the database says when it cannot do what it was asked.

DatabaseError
├── DatabaseUnavailable   it cannot be reached or used now; the outcome of a change is unknown; try again later
├── DatabaseInvalid       not one that this program may use: damaged, of a newer version, a wrong URL
├── InvalidValue          a value that may not be stored; names the field
├── NotFound              no such key or tenant
└── Conflict              it does not go with what is there: the same id or key again, too many keys
    └── VersionConflict   it was changed since whoever orders this looked at it

The messages name the database without its password, and never a value that may be secret.
"""

from __future__ import annotations


class DatabaseError(Exception):
    """The database did not do what it was asked."""


class DatabaseUnavailable(DatabaseError):
    """It cannot be reached, is locked, read-only or full. What became of a change at its commit is unknown."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"the database {address} is not available: {reason}")
        self.address = address
        self.reason = reason


class DatabaseInvalid(DatabaseError):
    """Trying again will not help: somebody has to look at it."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"the database {address} cannot be used: {reason}")
        self.address = address
        self.reason = reason


class InvalidValue(DatabaseError):
    """A value that was refused before it reached the database."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class NotFound(DatabaseError):
    """There is no such key or tenant, or it was removed."""


class Conflict(DatabaseError):
    """It does not go with what is there. Nothing was changed."""


class VersionConflict(Conflict):
    """It was changed since whoever orders this looked at it. Nothing was changed now."""

    def __init__(self, what: str, version: int) -> None:
        super().__init__(f"{what} was changed in the meantime: it has the version {version} now")
        self.version = version
