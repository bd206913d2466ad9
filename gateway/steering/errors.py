"""What an operator is told when a change of the configuration cannot be made."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.config import ConfigError
from gateway.errors import GatewayError, InvalidRequest


class VersionRequired(InvalidRequest):
    status = 428
    code = "version_required"


class VersionConflict(InvalidRequest):
    """Somebody else has changed the overrides meanwhile."""

    status = 412
    code = "version_conflict"

    def __init__(self, version: int) -> None:
        super().__init__(
            f"The overrides have been changed meanwhile: they are at version {version}. Look at them again, then send "
            f'If-Match: "{version}".'
        )
        self.version = version

    def body(self) -> bytes:
        return _with(self, "version", self.version)


class UnknownSetting(InvalidRequest):
    status = 404
    code = "unknown_setting"


class NotChangeable(InvalidRequest):
    """A setting that only file and environment can have."""

    code = "not_changeable"


class UnknownVersion(InvalidRequest):
    status = 404
    code = "unknown_version"


class NoStateDirectory(InvalidRequest):
    status = 409
    code = "no_state_directory"


class _Problems(InvalidRequest):
    """A configuration that cannot be used, with every reason."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error), param=error.problems[0].path or None)
        self.problems = [
            {"file": each.file, "line": each.line, "path": each.path, "message": each.message, "hint": each.hint}
            for each in error.problems
        ]

    def body(self) -> bytes:
        return _with(self, "problems", self.problems)


class BadOverride(_Problems):
    """With the value that was sent the configuration would not be right."""

    code = "invalid_override"


class ConfigUnusable(_Problems):
    """File or environment, as they are now, cannot be used; what is in force stays."""

    status = 409
    code = "configuration_unusable"


class ComparisonRunning(InvalidRequest):
    status = 409
    code = "comparison_running"


class UnknownComparison(InvalidRequest):
    status = 404
    code = "unknown_comparison"


def _with(error: GatewayError, name: str, value: Any) -> bytes:
    body = msgspec.json.decode(GatewayError.body(error))
    body["error"][name] = value
    return msgspec.json.encode(body)
