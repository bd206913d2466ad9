"""Where the playground's requests come in at the inference listener.

A path of its own, so that a client's request pays nothing for it: the paths of the API are served before the router
that knows this one.
"""

from __future__ import annotations

import hmac
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Scope

from gateway.edges.asgi import InferenceEndpoint
from gateway.errors import InvalidRequest
from gateway.inspection.door import PATH, SECRET_HEADER, TRIAL_HEADER
from gateway.inspection.trial import Trial
from gateway.order import CHAT, COMPLETIONS
from gateway.policy import CALLER, GuardedRoute, Who
from gateway.runtime import Runtime

PLAYED = (CHAT, COMPLETIONS)
_SECRET, _TRIAL = SECRET_HEADER.encode(), TRIAL_HEADER.encode()


def playground_routes(runtime: Runtime) -> list[GuardedRoute]:
    """Routes of the inference listener that exist for this gateway's own playground only."""

    def admit(scope: Scope) -> Trial:
        if not shows_secret(runtime.trial_secret, scope["headers"]):
            raise HTTPException(404)
        return _trial(scope["headers"])

    endpoint = InferenceEndpoint(runtime, _path_of, _trial_of)
    return [GuardedRoute(PATH + path, endpoint, Who.LOCAL, methods=["POST"], admit=admit) for path in PLAYED]


def shows_secret(secret: str, headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a request is the playground's own."""
    given = [value for name, value in headers if name == _SECRET]
    return bool(secret) and len(given) == 1 and hmac.compare_digest(given[0], secret.encode())


def _path_of(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(PATH)


def _trial_of(scope: Scope) -> Trial:
    trial: Any = scope[CALLER]
    assert isinstance(trial, Trial)
    return trial


def _trial(headers: list[tuple[bytes, bytes]]) -> Trial:
    for name, value in headers:
        if name == _TRIAL:
            try:
                return msgspec.json.decode(value, type=Trial)
            except msgspec.MsgspecError as error:
                raise InvalidRequest(f"The trial cannot be read: {error}.") from error
    return Trial()
