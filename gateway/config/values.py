"""The kinds of value that settings share, each with the rule it obeys and what to write instead."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from gateway.config.problems import shown, wrong
from gateway.config.urls import MAX_SOCKET_PATH_BYTES, normal_url

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
REPLICA_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
MODEL_NAME = r"^[!-~]{1,200}$"
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$"
PREFIX = r"^[A-Za-z0-9._:-]{1,64}$"
REGION = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$"

PATTERN_HINTS = {
    NAME: "use at most 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit",
    REPLICA_NAME: "use at most 80 letters, digits, dots, dashes and underscores, the first a letter or digit",
    MODEL_NAME: "use 1 to 200 printable ASCII characters and no spaces",
    ADAPTER_NAME: "use at most 200 letters, digits, dots, dashes, slashes and underscores, the first a letter or digit",
    PREFIX: "use at most 64 letters, digits, dots, colons, dashes and underscores",
    REGION: "use at most 32 lower-case letters, digits and dashes, e.g. eu-west",
}
"""What to write where a pattern was not met."""

HOUR_S = 3600
DAY_S = 24 * HOUR_S


class Section(BaseModel):
    """A part of the configuration: frozen, refuses keys it does not know, keeps values out of errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_host(text: str) -> str:
    """An address or name to listen on, or an error that says how to write it."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    if ":" in text or "/" in text or "[" in text:
        raise wrong(f"{shown(text)} is not a host", "write the address or name alone, e.g. 127.0.0.1 or ::1")
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?", text) or re.fullmatch(r"[0-9.]+", text):
        raise wrong(f"{shown(text)} is neither an IP address nor a host name", "write e.g. 127.0.0.1")
    return text


def _looked_up(text: str) -> str:
    """A name may end in a dot, which says that it is whole: no search domain is tried."""
    if text.endswith(".") and ":" not in text and re.search(r"[A-Za-z_]", text):
        return checked_host(text.removesuffix(".")) + "."
    return checked_host(text)


def _path(value: Any) -> Any:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise wrong("the path is empty", "write a path, or leave the setting out")
    return value


def _socket_path(value: Path) -> Path:
    if len(str(value).encode()) > MAX_SOCKET_PATH_BYTES:
        raise wrong(f"the path of a socket can have at most {MAX_SOCKET_PATH_BYTES} bytes", "use a shorter path")
    return value


def _store(text: str) -> str:
    if text == "memory":
        return text
    # Only needed where there is a Redis, and nothing of the value is repeated: it may hold a password.
    from gateway.store.redis.address import parse_address

    if "@" in text:
        raise wrong(
            "the address of the store has credentials in it: a secret in the wrong place",
            "take them out; give redis.username and redis.password",
        )
    try:
        parse_address(text)
    except ValueError as error:
        raise wrong(str(error), "write memory, or e.g. redis://127.0.0.1:6379") from None
    return text


def _database(text: str) -> str:
    try:
        parts = urlsplit(text)
        password = parts.password
    except ValueError:
        raise wrong("the database URL cannot be read", "write e.g. sqlite:///tidegate.db") from None
    if password is not None:
        raise wrong(
            "the database URL has a password in it: a secret in the wrong place",
            "leave it out, and give it as database_password: {env: NAME} or {file: PATH}",
        )
    if "password" in parts.query.lower():
        raise wrong(
            "the database URL has a password in its query: a secret in the wrong place",
            "leave it out, and give it as database_password: {env: NAME} or {file: PATH}",
        )
    if parts.scheme not in {"sqlite", "postgresql"}:
        raise wrong(f"{shown(text)} is not a database this gateway knows", "write e.g. sqlite:///tidegate.db")
    if parts.scheme == "sqlite" and not re.fullmatch(r"sqlite:///.+", text):
        raise wrong(f"{shown(text)} names no database file", "write e.g. sqlite:///tidegate.db")
    if parts.scheme == "postgresql" and (not parts.hostname or len(parts.path) < 2):
        raise wrong(
            "the database URL names no host or no database", "write e.g. postgresql://tidegate@db.internal/tidegate"
        )
    return text


Name = Annotated[str, Field(pattern=NAME)]
ModelName = Annotated[str, Field(pattern=MODEL_NAME)]
AdapterName = Annotated[str, Field(pattern=ADAPTER_NAME)]
Region = Annotated[str, Field(pattern=REGION)]
OptionalName = Annotated[
    str,
    BeforeValidator(lambda value: "" if value is None else value),
    AfterValidator(lambda value: _checked_name(value)),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": REPLICA_NAME}, {"type": "null"}]}),
]
"""A name that something else fills in: null and nothing are kept as an empty text."""

Host = Annotated[str, AfterValidator(checked_host)]
LookedUpName = Annotated[str, AfterValidator(_looked_up)]
HostName = Annotated[
    str,
    Field(pattern=r"^(\*|\.?[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?|\[?[0-9A-Fa-f:.]+\]?)$"),
    AfterValidator(lambda text: _checked_host_name(text)),
]
"""A name in a list of those that are meant: in full, all below one (`.x.org`), or any (`*`)."""
FilePath = Annotated[Path, BeforeValidator(_path)]
SocketPath = Annotated[Path, AfterValidator(_socket_path), BeforeValidator(_path)]
ReplicaUrl = Annotated[str, AfterValidator(normal_url)]
DatabaseUrl = Annotated[str, AfterValidator(_database)]
Store = Annotated[str, AfterValidator(_store)]

# Strict: `port: true` is not 1, and "10" is text. Environment variables are turned into numbers before.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
RequestLines = Annotated[
    Literal["true", "false", "errors"],
    BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool) else value),
    WithJsonSchema({"enum": [True, False, "true", "false", "errors"]}),
]
"""All, none or some. Words, since an environment variable has no other truth; YAML's own true and false are taken."""


def _checked_host_name(text: str) -> str:
    """As it is compared later: an IPv6 address as browsers write it. `10.0.0.5:7400` would match nothing, ever."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if re.fullmatch(r"\*|\.?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", text):
        return text
    try:
        return str(ipaddress.IPv6Address(bare))
    except ValueError:
        raise wrong(f"{shown(text)} is not a host", "write the name or address alone, without a port") from None


def _checked_name(value: str) -> str:
    if value and not re.fullmatch(REPLICA_NAME, value):
        raise wrong(f"{shown(value)} is not a valid name", PATTERN_HINTS[REPLICA_NAME])
    return value
